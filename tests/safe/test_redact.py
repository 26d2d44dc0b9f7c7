"""Keys stay out of whatever is kept: by their looks, by their names, by their values."""

import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.report.writers import MetricsWriter
from jaxdistill.safe import redact as redacting
from jaxdistill.safe.redact import learn, redact, redacted

CANARY = "c4narykey-0123456789"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("api_key: sk-verysecretvalue", "api_key: [redacted]"),
        ('{"hf_token": "hf_abcdefghijklmnopqrst"}', '{"hf_token": "[redacted]"}'),
        ("train --api-key abc x=1", "train --api-key [redacted] x=1"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer [redacted]"),
        ("x hf_abcdefghijklmnopqrst y", "x [redacted] y"),
        ("PASSWORD=hunter2", "PASSWORD=[redacted]"),
        ("https://me:word@host/x", "https://[redacted]@host/x"),
        (r'password: "ab\"cd", x', 'password: "[redacted]", x'),
        ('password: "it\'s", x', 'password: "[redacted]", x'),
        (r"{\"api_key\": \"abc\", \"b\": 1}", r"{\"api_key\": \"[redacted]\", \"b\": 1}"),
        ("https://host/x?a=1&sig=abc&b=2", "https://host/x?a=1&sig=[redacted]&b=2"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("api_key_env: OPENAI_API_KEY", "api_key_env: OPENAI_API_KEY"),
        ("max_new_tokens: 5\ntokens_per_second: 3", "max_new_tokens: 5\ntokens_per_second: 3"),
        ("tokenizer: models/a", "tokenizer: models/a"),
    ],
)
def test_secrets_do_not_reach_a_page_that_is_sent_around(text, shown):
    assert redact(text) == shown


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789" * 4
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFU"
PEM = "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----"
SSH2 = "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\n{}\n---- END SSH2 ENCRYPTED PRIVATE KEY ----"
HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (text.replace("@@", secret), secret)
        for text, secret in [
            ("@@", "github_pat_" + "11ABCDEFG0abcdefghij_klmnopqrst"),
            ("@@", "ghp_" + LETTERS[:36]),
            ("@@", "glpat-" + LETTERS[:20]),
            ("token @@.", JWT),
            ("Authorization: Basic @@", "dXNlcjpodW50ZXIy"),
            ("auth = basic @@", "dXNlcjpodW50ZXI="),
            ("auth = basic @@", "dXNlcjpwYXNz"),
            ("curl -H 'Proxy-Auth: Basic @@'", "bWU6aHVudGVyMg"),
            ("PGPASSWORD=@@ psql", "hunter2"),
            ("password: '@@'", "correct horse battery"),
            ("MYSQL_PWD=@@", "hunter2"),
            ("AWS_SECRET_ACCESS_KEY=@@", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
            ("@@", "AKIAIOSFODNN7EXAMPLE"),
            ("@@", "ASIAIOSFODNN7EXAMPLE"),
            ("@@", "AIza" + LETTERS[:35]),
            ("@@", "xoxb-123456789012-123456789012-" + LETTERS[:24]),
            ("https://hooks.slack.com/services/@@", f"T0000/B0000/{LETTERS[:34]}"),
            ("@@", "sk_live_" + LETTERS[:24]),
            ("@@", "npm_" + LETTERS[:36]),
            ("@@", "pypi-AgEIcHlwaS5vcmc" + LETTERS[:60]),
            ("@@", "sk-proj-" + LETTERS[:60]),
            ("@@", "sk-ant-api03-" + LETTERS[:60]),
            ("@@", PEM.format(LETTERS)),
            ("postgres://me:@@@db/x", "hunter2"),
            ("redis://:@@@cache:6379", "hunter2"),
            ("@@", PEM.format(f"Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,0F\n\n{LETTERS}")),
            ("@@", PEM.replace("RSA", "PGP").format(f"Comment: a-b\n\n{LETTERS}")),
            ("@@", SSH2.format(f'Comment: "rsa-key-20200101"\n{LETTERS}')),
            ("Private-Lines: 2\n@@\nPrivate-MAC: 0a", LETTERS[:64]),
            ("Private-Lines: 2\n@@\nPrivate-MAC: 0a", f"{LETTERS[:64]}\n{LETTERS[:64]}"),
            ("eyJhbGciOiJSU0EtT0FFUCJ9.UGhIOgXDy.48V1_ALb6US04U3b.5eym8TW_c8Su.@@", LETTERS[:22]),
            ("eyJhbGciOiJkaXIifQ..48V1_ALb6US04U3b.5eym8TW_c8Su.@@", LETTERS[:22]),
            ("AccountName=a;AccountKey=@@;EndpointSuffix=x", LETTERS[:40] + "=="),
            ("@@", f"SG.{LETTERS[:22]}.{LETTERS[:43]}"),
            ("@@", "123456789:AA" + LETTERS[:33]),
            ("@@", f"M{LETTERS[:23]}.{LETTERS[:6]}.{LETTERS[:27]}"),
            ("@@", "dop_v1_" + "0123456789abcdef" * 4),
            ("@@", "hvs." + LETTERS[:60]),
            ("@@", "hf_" + LETTERS[:34]),
            ('{"auths": {"x": {"auth": "@@"}}}', "dXNlcjpodW50ZXIyMzQ="),
            ("machine x login me password @@", "hunter2"),
            ("//registry.npmjs.org/:_authToken=@@", "hunter2"),
            ("Cookie: a=1; @@", "session=hunter2"),
            ("X-Api-Key: @@", "hunter2"),
            ("client_secret => @@", "hunter2"),
            ('{"token": "@@"}', "s3cr3t-0123456789"),
            ("MY_TOKEN=@@", "hunter2hunter"),
            ('MY_TOKEN="@@" make', "hunter2hunter"),
            ("export MY_SECRET='@@'", "correct horse battery"),
            ("my_token=@@", "s3cr3t-0123456789"),
            ("DB_PASS=@@ make", "hunter2"),
            ("db_pass=@@", "hunter2"),
            ('{"smtp_pass": "@@"}', "hunter2"),
            ("push --token @@ x", "abc.def"),
            ("push --token=@@ x", "abc"),
            ("push --token '@@'", "abc def"),
            ("push --api-key @@", "abc"),
            ("push --my-api-key '@@'", "abc def"),
            (r'"{\"api_key\": \"@@\"}"', "abc"),
            (r'"{\\\"password\\\": \\\"@@\\\"}"', "hunter2"),
            ("id_token=@@&state=x", "abc"),
            ("wandb login @@", "0123456789abcdef" * 2 + "01234567"),
            ("wandb login --relogin --host=https://x @@", "0123456789abcdef" * 2 + "01234567"),
            ("@@", "xai-" + LETTERS[:80]),
            ("git clone https://@@@host/x", "0123456789abcdef0123"),
            ("postgres://me:@@@db/x", "hunt@er2"),
            ("@@", "ATATT3xFfGF0" + LETTERS[:60] + "=0123ABCD"),
            ("Ocp-Apim-Subscription-Key: @@", "hunter2"),
            ("Server=x;Uid=me;Pwd=@@;", "hunter2"),
            ("curl -s -u @@ https://host", "me:hunter2"),
            ("curl --user @@ https://host", "me:hunter2"),
            ("mysql -u root -p@@ db", "hunter2"),
            ("sshpass -p @@ ssh host", "hunter2"),
            ("docker login -u me -p @@", "hunter2"),
            ("client-key-data: @@", LETTERS[:60]),
            ("@@", "GOCSPX-" + LETTERS[:28]),
            ("@@", "sq0atp-" + LETTERS[:22]),
            ("@@,", "sq0csp-" + LETTERS[:43]),
            ("(@@)", "EAAAE" + LETTERS[:59]),
            ("@@.", "NRAK-" + LETTERS[:26] + "7"),
            ("@@", "NRII-" + LETTERS[:32]),
            ("@@", "tfp_" + LETTERS[:59]),
            ("@@", "tfp_" + LETTERS[26:70]),
            ("@@,", "figd_" + LETTERS[:40]),
            ("@@", "amzn.mws.4ea38b7b-f563-7709-4bae-87aea0123456"),
            ("@@,", HEX[:32] + "-us12"),
            ("@@,", "key-" + HEX[:32]),
            ("@@,", HEX[:32] + "-01234567-89abcdef"),
            ("@@,", "secret_" + LETTERS[:43]),
            ("https://discord.com/api/webhooks/123456789012345678/@@", LETTERS[:68]),
            ("https://discordapp.com/api/v10/webhooks/123456789012345678/@@", LETTERS[:68]),
            ("https://hooks.slack.com/workflows/@@", f"T00/A00/123456/{LETTERS[:24]}"),
            ("https://api.telegram.org/bot@@/getMe", "123456789:AA" + LETTERS[:33]),
            ("PASS=@@ make", "hunter2hunter"),
            ("export TOKEN='@@'", "correct horse battery"),
            ("SECRET=@@", "hunter2hunter"),
            ("export OPENAI_KEY=@@", LETTERS[40:64]),
            ("os.environ['X_KEY'] = '@@'", "hunter2hunter"),
            (r'{"code": "os.environ[\"MY_TOKEN\"]=\"@@\"\n"}', "hunter2hunter"),
            ("os.environ.setdefault('X_SECRET', '@@')", "hunter2hunter"),
            ("process.env.X_KEY = '@@'", "hunter2hunter"),
            ("auth: {user: 'me', pass: '@@'}", "hunter2"),
            ('{"Cookie": "@@"}', "session=hunter2"),
            ("//registry.npmjs.org/:_auth=@@", "bWU6aHVudGVyMg=="),
            (
                "Authorization: AWS4-HMAC-SHA256 Credential=A/2013/us-east-1/s3/aws4_request, "
                "SignedHeaders=host;range, Signature=@@",
                HEX,
            ),
            ("https://x/y?a=1&X-Goog-Signature=@@&b=2", HEX),
            ("secret_key: @@", "hunter2hunter"),
            ('{"identitytoken": "@@"}', LETTERS[:30]),
            ('{"env": {"MY_TOKEN": "@@"}}', "abc123def456"),
            ("@@", f"pat{LETTERS[:14]}.{HEX}"),
            ("@@", "sbp_" + HEX[:40]),
            # What stands behind a key that gitleaks knows.
            *[("@@" + end, "dapi" + HEX[:32]) for end in ("", ",", ")", ".", "]", "<br>", "&")],
            ("@@", "AGE-" + f"SECRET-KEY-1{'QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L' * 2}"[:74]),
        ]
    ],
)  # fmt: skip
def test_one_of_each_kind_of_secret_is_known(text, secret):
    assert secret in text and secret not in redact(text) and "[redacted]" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "the bearer of bad news needs basic arithmetic and a token",
        "task-0123456789-0123456789 of run 2026-11-29T01:02:03",
        "eos_token: <end>, pad_token_id: 3, max_new_tokens: 5, key: value",
        "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "global-batch-size-and-more-of-it",
        "PWD=/home/me/run, token: <|end_of_text|>, token=words-without-any-digit-in-them",
        "ssh://git@github.com/x, https://user@host/x, basic arithmetic, basic Algebra2",
        "forward_pass: 12 ms, valid_token: 5, grid_token: 7, eos_token=128001",
        "curl -u https://host:8000 and mkdir -p runs/a, docker run -p 8000:8000 x",
        "stop_token = 128001, bos_token: <s>, one token: 0.123456 nats",
        f"commit {HEX[:40]}, md5 {HEX[:32]}, Signature={HEX}, sha256-{HEX}",
        "4ea38b7b-f563-7709-4bae-87aea0123456, {4EA38B7B-F563-7709-4BAE-87AEA0123456}",
        # Pictures: whatever stands in them at the border of a word.
        f"data:image/png;base64,iVBORw0KGgo/AKIAAAQAxdoAEAAQEAAE+EAAAE{LETTERS[:59]}/AAAE",
        "os.environ['X_KEY'], os.environ[new_key] = 'another value', env.SORT_KEY == 'created'",
        'key = os.environ["OPENAI_API_KEY"]; if os.environ["X_KEY"] == "value of it":',
        "PASS=12 FAIL=3, TOKEN=<your token>, PASS=$OTHER, TOKEN=$(cat file), TOKEN=[a-z]+|[0-9]+",
        "PAD_TOKEN=<|endoftext|>, SORT_KEY=created_at, CACHE_KEY=v1-linux/x64-0123456789abcdef",
        "tfp_distributions_mixture_same_family_components_and_more_of_it, figd_a, key-value-store",
        "the pass: 3 of 10; user: 'me', path: 'x'; Cookie clicker; {'cookie': 'chocolate'}",
        "a line ---- BEGIN of it ---- and its end, -----BEGIN CERTIFICATE-----, Private-Lines: few",
        "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0D\n-----END PUBLIC KEY-----",
        "eyJ is how JSON begins in base 64. eyJhIjoxfQ== is an object, k.eyJhIjoxfQ is none",
        "models/SmolLM2-135M-Instruct@best https://host:8000/v1?model=a",
        '{"PAD_TOKEN": "<|endoftext|>", "BOS_TOKEN": 128001, "EOS_TOKEN": "end_of_text"}',
        f"dapi{HEX[:32]}0, path/to/patterns.0123456789abcdef, secret_keys: 3",
    ],
)
def test_plain_words_are_no_secrets(text):
    assert redact(text) == text


SLOW = r"""
import resource
from jaxdistill.safe import redact as redacting
from jaxdistill.safe.redact import redact
redact("a")  # reads and compiles the rules
used = resource.getrusage(resource.RUSAGE_SELF)
limit = int(used.ru_utime + used.ru_stime) + 30
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
for text in ("x" * 200_000, "secret" * 30_000, "--" * 100_000, "secret" + " " * 200_000):
    assert redact(text) == text
words = sorted({word for rule in redacting._rules() for word in rule.keywords})
for text in (" ".join(words) * 100, 'password="' + "\\" * 100_000):
    redact(text)
for piece in ("eyJ-", "sk-", "://", "https://", "curl ", "mysql -p", "token=", "A_PASS", "a_",
              "basic ", 'password=\\"', "wandb login --a ", "-----BEGIN PRIVATE KEY-----a",
              "---- BEGIN PRIVATE KEY ----", "AWS4-HMAC-SHA256 ", "Private-Lines: 1\\na\\n",
              "environ['a_key", "user: 'a', pass", "_auth=", "tfp_a", "EAAAEa", "eyJaaaaaa..aaaaa",
              "cookie': 'a", "A_KEY=a", "amzn.mws.01234567-", "key-0", "PASS=$"):
    redact(piece * (200_000 // len(piece)))
"""


def test_rules_are_written_for_python():
    """Go's classes of letters are another thing in Python, which says nothing."""
    rules = tomllib.loads(
        pathlib.Path(redacting.__file__).with_name("secret_rules.toml").read_text()
    )
    assert not [name for name, rule in rules.items() if re.search(r"\[:\w+:\]", rule["regex"])]


def test_redaction_takes_time_in_proportion_to_the_text():
    """A search that goes back over the whole text for every place in it would need minutes.

    The process that tries has 30 s of processor time, of which it takes three: it is ended then.
    """
    assert subprocess.run([sys.executable, "-c", SLOW], check=False).returncode == 0


def test_values_of_the_environment_and_keys_in_use_are_known(monkeypatch):
    text = f"the server said: {CANARY} is no key"
    assert redact(text) == text
    for name, hidden in (
        ("MY_API_KEY", True),
        ("HF_TOKEN", True),
        ("DB_PASSWORD", True),
        ("KEYBOARD", False),
        ("PATH_TO_X", False),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, CANARY)
            assert (CANARY not in redact(text)) is hidden
    monkeypatch.setenv("SOME_KEY", "quickstart-data")  # a plain word is no key
    assert redact("quickstart-data") == "quickstart-data"
    monkeypatch.setattr(redacting, "_learnt", set())
    assert learn(CANARY) == CANARY and redacted({"a": [text, 1]}) == {"a": [redact(text), 1]}
    assert CANARY not in redact(text)


def _kept(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_run_folder_never_holds_a_key(tmp_path, monkeypatch):
    from jaxdistill.run.folder import RunDir

    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    folder = tmp_path / "run"
    arguments = {"name": "x", "input_text": f"# {CANARY}\n", "overrides": [f"a.api_key={CANARY}"]}
    with pytest.raises(ConfigError, match=r"base: .*\[redacted\].*: looks like a key") as caught:
        RunDir.create(str(folder), resolved=f"base: http://{CANARY}/v1\n", **arguments)
    assert CANARY not in str(caught.value) and not folder.exists()
    monkeypatch.setattr("sys.argv", ["jaxdistill", "train", f"x={CANARY}"])
    run = RunDir.create(str(folder), resolved="base: http://localhost/v1\n", **arguments)
    with pytest.raises(RuntimeError), run.attempt(0):
        raise RuntimeError(f"401: {CANARY} is wrong")
    run.event("retried", reason=f"{CANARY} was refused")
    with MetricsWriter(folder, tensorboard=False) as writer:
        writer.event("save_failed", reason=f"https://x:{CANARY}@host")
    held = _kept(folder)
    assert CANARY.encode() not in held and held.count(b"[redacted]") >= 6
    assert "401" in json.loads((folder / "RUN.json").read_text())["exit_reason"]


def test_what_a_server_repeats_is_not_kept(monkeypatch):
    from jaxdistill.reasoning import served

    monkeypatch.setattr(redacting, "_learnt", {CANARY})
    said = served.reason_of(ValueError(f"Bearer {CANARY} is not known, {CANARY}"))
    assert CANARY not in said and said.startswith("ValueError: Bearer [redacted] is not known")


def test_the_command_line_does_not_repeat_a_key(tmp_path, monkeypatch, capsys):
    from jaxdistill import cli

    monkeypatch.setenv("HF_TOKEN", CANARY)
    (tmp_path / "x.yaml").write_text(f"run: {{dir: x}}\napi_key: {CANARY}\n")
    assert cli.main(["validate", str(tmp_path / "x.yaml")]) == 2
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err and "unknown key" in said.err
