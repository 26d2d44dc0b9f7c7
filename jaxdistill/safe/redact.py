"""Takes keys and passwords out of text before it is kept or shown.

secret_rules.toml has what the keys of many services look like; the patterns here know secrets by
the names in front of them, and common beginnings of keys whatever follows.
"""

import base64
import functools
import os
import pathlib
import re
import tomllib
from typing import Any, NamedTuple

_SHOWN = "[redacted]"
_SHORTEST = 12  # characters of a value of the environment that can be told from a plain word
# Every part is bounded: a hostile text must not be able to make the search take for ever.
_NAME = (
    r"(?:secret|passw(?:or)?d|passphrase|mysql_pwd|credentials?"
    r"|(?:api|access|account|private|encryption|signing|auth|subscription|secret)[_-]?key"
    r"|(?:api|auth|access|hf|refresh|session|bearer|bot|private|personal|oauth|security|identity)[_-]?token"
    r"|(?<![a-z])id[_-]?token)"
)
# A text within a text has its quotes escaped: such a value ends at the next backslash.
_QUOTE = r"(?:(?P<escaped>\\{1,4}[\"'])|(?P<quote>[\"']))?"
_VALUE = (
    r"(?(escaped)[^\"'\\\n]{1,1000}"
    r"|(?(quote)(?:\\.|(?!(?P=quote))[^\\\n]){1,1000}|[^\s\"',}&]+))"
)
_BEGINNINGS = (
    r"hf_|api_org_|sk-|sk_live_|rk_live_|sk_test_|gh[opsur]_|github_pat_|gl(?:pat|dt|rt|ft|soat|cbt|ptt|agent|imt|oas)-|npm_|pypi-"
    r"|xox[a-z]-|xapp-|AIza|ya29\.|SG\.|dop_v1_|doo_v1_|hv[sb]\.|dckr_pat_|whsec_"
    r"|sntry[su]_|lin_api_|shp(?:at|ss|ca|pa)_|r8_|gsk_|nvapi-|PMAK-|SK(?=[0-9a-f]{32})"
    r"|xai-|pplx-|csk-|tgp_v1_|tvly-|lsv2_|wandb_v1_|GOCSPX-|sq0(?:atp|csp)-|figd_|sbp_|nfp_"
)
_ANY_QUOTE = r"\\{0,4}[\"']"
_SECRETS = (
    # The signature of a request to Amazon, before its header loses the word that says so.
    r"(\bAWS4-HMAC-SHA256\b[^\n]{0,500}?\bSignature=)[0-9a-f]{64}",
    # By name: an option, a field, a header, a part of an address, a line of .netrc.
    rf"(?i:(--(?=\w)[\w-]{{0,40}}{_NAME}\s{{1,9}}|--(?:token|pass|pwd)(?:=|\s{{1,9}})"
    rf"|{_NAME}(?:\\{{0,4}}[\"'])?\s{{0,9}}(?:=>|:=|[:=])\s{{0,9}}"
    r"|\b(?:\w{0,40}_)?(?:db|user|admin|root|smtp|mail|ftp|redis|pg|mysql|mongo|ssh|login)_?(?:pass|pwd)"
    r"(?:\\{0,4}[\"'])?\s{0,9}[:=]\s{0,9}"
    r"|\bauthorization[\"']?\s{0,9}[:=]\s{0,9}[\"']?(?:(?:bearer|basic|digest|token|apikey)\s{1,9})?"
    r"|\bbearer\s{1,9}(?=[\w.~+/=-]{16})"
    r"|\"auth\"\s{0,9}:\s{0,9}(?=\"[a-z0-9+/]{8,500}=)"
    r"|\blogin\s{1,9}[^\s]{1,100}\s{1,9}password\s{1,9}"
    r"|\bclient-key-data:\s{0,9}|\bpwd\s{0,9}=\s{0,9}(?![/$~.\s])"
    rf"|[?&](?:token|key|sig|signature|x-(?:amz|goog)-signature)=){_QUOTE}{_VALUE})",
    # By a word that is often plain: as a variable of a shell, or where the value is a long number.
    # What names another variable, a placeholder or a pattern holds none.
    r"(\b(?:[A-Z0-9_]{0,40}_(?:PASS|PWD|TOKEN|SECRET)|PASS|TOKEN)=)"
    r"(?=[\"'\\]{0,5}[^\s\"',}&\\<({^\[][^\s\"',}&\\]{5})(?![\"'\\]{0,5}\$[({A-Z_])"
    rf"{_QUOTE}{_VALUE}",
    rf"(\b[A-Z0-9_]{{1,40}}_KEY=(?:{_ANY_QUOTE})?)(?=[A-Za-z_-]{{0,200}}[0-9])[\w-]{{20,1000}}(?![\w./])",
    rf"(?i:(\b(?:environ|env)(?:(?:\[|\.setdefault\()\s{{0,3}}{_ANY_QUOTE}|\.)\w{{0,60}}"
    r"(?:key|token|secret|passw(?:or)?d|pass|pwd)"
    rf"(?:{_ANY_QUOTE})?\s{{0,3}}(?:\]\s{{0,3}}=|,|=)\s{{0,3}}{_ANY_QUOTE})"
    r"(?![<$])[^\"'\\\n]{6,1000})",
    rf"(?i:(\buser(?:name)?(?:{_ANY_QUOTE})?\s{{0,3}}:\s{{0,3}}{_ANY_QUOTE}[^\"'\\\n]{{1,100}}{_ANY_QUOTE}"
    rf",\s{{0,20}}(?:{_ANY_QUOTE})?pass(?:{_ANY_QUOTE})?\s{{0,3}}:\s{{0,3}}{_ANY_QUOTE})[^\"'\\\n]{{1,1000}})",
    r"(\b_auth\s{0,3}=\s{0,3})[A-Za-z0-9+/]{6,1000}={0,2}",
    rf"(\b[A-Z0-9_]{{1,40}}_(?:PASS|PWD|TOKEN|SECRET){_ANY_QUOTE}\s{{0,3}}:\s{{0,3}}{_ANY_QUOTE})"
    r"(?=[^\"'\\\n]{0,200}[0-9])(?![<$\[{])[^\"'\\\n]{8,1000}",
    r"(?i:(\b(?:\w{0,40}_)?token(?:\\{0,4}[\"'])?\s{0,9}[:=]\s{0,9}(?:\\{0,4}[\"'])?)"
    r"(?=[a-z_-]{0,100}[0-9])[a-z0-9_.~+/=-]{16,1000})",
    # By the option of a command.
    r"(?i:(\bcurl\b[^\n]{0,200}?\s(?:-u|--user)\s{0,3})[^\s:]{1,100}:(?!//)[^\s]{1,200})",
    r"(\b(?:mysql(?:dump|admin)?|sshpass|docker login)\b[^\n]{0,200}?\s-p\s{0,3})[^\s]{1,200}",
    r"(?i:(\b(?:set-)?cookie\s{0,9}:\s{0,9})[^\r\n\"']{1,5000})",
    rf"(?i:(\b(?:set-)?cookie{_ANY_QUOTE}\s{{0,9}}:\s{{0,9}}{_ANY_QUOTE})(?=[\w.-]{{1,100}}=)[^\r\n\"']{{1,5000}})",
    r"(?i:(\bwandb\s{1,9}login\s{1,9}(?:--\S{1,60}\s{1,9}){0,9})[\w-]{16,200})",
    # By its looks.
    r"()\bAT[AC]TT3[\w=-]{16,}",  # Atlassian's
    rf"()\b(?:{_BEGINNINGS})[A-Za-z0-9_.-]{{16,}}",
    # A signed token has three parts, an encrypted one five, of which the second may be empty.
    r"()(?<![\w-])eyJ[\w-]{5,5000}\.(?:[\w-]{5,5000}|(?=\.[\w-]{5}))(?:\.[\w-]{1,5000}){0,3}",
    r"()-{4,5} ?BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)? ?-{4,5}(?:[^-]|-(?!---)){0,20000}"
    r"(?:-{4,5} ?END [A-Z0-9 ]{0,60}-{4,5})?",
    # PuTTY's
    r"(\bPrivate-Lines:\s{0,9}[0-9]{1,3}(?:\s|\\{1,4}[nr]){1,4})"
    r"(?:(?!Private-)[A-Za-z0-9+/=]{1,100}(?:\s|\\{1,4}[nr]){0,4}){1,300}",
    r"()(?<![0-9])[0-9]{8,10}:AA[\w-]{33}(?![\w-])",  # Telegram's
    r"()\b[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,40}(?![\w-])",  # Discord's
    r"()\bNRAK-[A-Z0-9]{27}\b|\bNRII-[\w-]{32}|\btfp_(?=[\w.=-]{0,58}[0-9])[\w.=-]{40,100}",
    r"()\bamzn\.mws\.[0-9a-f]{8}-[0-9a-f-]{20,40}",
    r"()(?<![\w+/-])EAAAE[\w-]{50,100}(?![\w+/-])",  # Square's
    r"()\b[0-9a-f]{32}-us[0-9]{1,2}\b",  # Mailchimp's
    r"()\bkey-[0-9a-f]{32}\b|\b[0-9a-f]{32}-[0-9a-f]{8}-[0-9a-f]{8}\b",  # Mailgun's
    r"()\bsecret_[A-Za-z0-9]{43}\b",  # Notion's
    r"(\bdiscord(?:app)?\.com/api/(?:v[0-9]{1,2}/)?webhooks/[0-9]{15,20}/)[\w-]{40,100}",
    r"(\bhooks\.slack\.com/(?:services|workflows|triggers)/)[\w/]{20,200}",
    r"()(?<=://)[^\s/:@]{0,100}:[^\s/]{1,200}(?=@)",
    r"()(?<=://)(?=[^\s/:@]{0,200}[0-9])[^\s/:@]{16,500}(?=@)",
)
_CODE_GOES_ON = r"""(?:[\x60'"\s;]|\\[nr]|$)"""
_BASIC = re.compile(r"(?i:(\bbasic\s{1,9}[\"']?))([\w+/-]{6,1000}={0,2})(?![\w=])")
_VARIABLE = re.compile(r"(?i)(?:^|_)(?:key|token|secret|passw(?:or)?d|credentials?)$|api_?key")
_learnt: set[str] = set()


def learn(value: str) -> str:
    """Remembers a key that this process uses, whatever its variable is called; returns it."""
    if len(value) >= _SHORTEST:
        _learnt.add(value)
    return value


def redact(text: str) -> str:
    """The text with what looks like a key or a password, or is one here, as [redacted].

    Known are the keys that were learnt, and what the environment's variables with such names hold.

    >>> redact("curl https://me:hunter2@host/x?token=abc -H 'Authorization: Bearer xyz'")
    "curl https://[redacted]@host/x?token=[redacted] -H 'Authorization: Bearer [redacted]'"
    """
    for value in sorted(_known(), key=len, reverse=True):
        text = text.replace(value, _SHOWN)
    lowered = text.lower()
    for rule in _rules():
        if any(word in lowered for word in rule.keywords):
            text = rule.pattern.sub(rule.hide, text)
    for pattern in _patterns():
        text = pattern.sub(_hide, text)
    return _BASIC.sub(_hide_basic, text)


def _hide(match: re.Match[str]) -> str:
    """What stands for a secret: what names it, and a quote that opens it, stay."""
    groups = match.groupdict()
    quote = groups.get("quote") or groups.get("escaped") or ""
    return f"{match[1] or ''}{quote}{_SHOWN}"


def _hide_basic(match: re.Match[str]) -> str:
    """A word after "basic" is a name and a password where it says so in base 64."""
    letters = match[2].rstrip("=")
    try:
        told = base64.b64decode(letters + "=" * (-len(letters) % 4), altchars=None).decode()
    except ValueError:
        return match[0]
    return f"{match[1]}{_SHOWN}" if ":" in told and told.isprintable() else match[0]


class _SecretPattern(NamedTuple):
    """One of the list: a pattern that is looked for where one of the words is."""

    keywords: tuple[str, ...]
    regex: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """Compiled when it is first needed."""
        return _compiled(self.regex)

    @staticmethod
    def hide(match: re.Match[str]) -> str:
        """The match without its secret, which is the last group or all of it."""
        start, end = match.span(match.lastindex or 0)
        return match[0][: start - match.start()] + _SHOWN + match[0][end - match.start() :]


@functools.cache
def _compiled(regex: str) -> re.Pattern[str]:
    return re.compile(regex)


@functools.cache
def _rules() -> tuple[_SecretPattern, ...]:
    text = pathlib.Path(__file__).with_name("secret_rules.toml").read_text(encoding="utf-8")
    rules = tomllib.loads(text).values()
    # A key in a sentence has a comma or a bracket behind it, for which gitleaks does not look.
    return tuple(
        _SecretPattern(
            tuple(rule["keywords"]), rule["regex"].replace(_CODE_GOES_ON, r"(?![\w/+=-])")
        )
        for rule in rules
    )


@functools.cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    return tuple(map(re.compile, _SECRETS))


def redacted(value: Any) -> Any:
    """A value of JSON with all its texts redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(str(name)): redacted(item) for name, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def _known() -> set[str]:
    """Values that are secrets in this process; plain words are none."""
    ours = {value for name, value in os.environ.items() if _VARIABLE.search(name)}
    return _learnt | {
        value for value in ours if len(value) >= _SHORTEST and re.search("[0-9]", value)
    }
