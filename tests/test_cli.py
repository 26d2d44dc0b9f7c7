import argparse
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import types
import typing

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jaxdistill
from jaxdistill import cli, commands, errors
from jaxdistill.cli import options
from jaxdistill.config import workflow
from jaxdistill.train.hooks import NO_HOOKS

pytestmark = pytest.mark.floor
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
HEAVY = ("jax", "flax", "transformers", "numpy", "optax", "orbax", "matplotlib")

RUN = """\
teacher: {random: {layers: 2, embed: 8, mlp: 8, heads: 2}}
student: {random: {like: teacher, layers: 1}}
tokenizer: {from: bytes}
data:
  train: [{path: "python:docs?split=train"}]
  eval: [{path: "python:docs?split=held_out"}]
method: {name: kd}
train: {steps: 10}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


@pytest.fixture
def engine(monkeypatch):
    """Doors that note how they were called; tests give it what to answer or raise."""

    class Model:
        source = "fake"
        tokenizer = None

        def consume_per_layer(self):
            return self

        def generate(self, prompts, **settings):
            calls.append(("generate", list(prompts), settings))
            return [f"{prompt}!\x1b[31m" for prompt in prompts]

    calls = []
    result = types.SimpleNamespace(
        run_dir=pathlib.Path("runs/run"),
        metrics={"eval/loss": 1.5, "eval/perplexity": math.inf},
        rows=[{"name": "teacher", "kl_t1": None}],
    )

    def answer(name, value):
        def call(*arguments, **options):
            calls.append((name, arguments, options))
            print("progress")
            if isinstance(fake.raises, BaseException):
                raise fake.raises
            return value

        return call

    fake = types.ModuleType("jaxdistill.api")
    fake.raises, fake.calls = None, calls
    fake.train = answer("train", result)
    fake.resume = answer("resume", result)
    fake.evaluate = lambda *words: answer(
        "evaluate",
        {"eval/ce": 2.25, "parameters": 100, "eval/x": math.nan, "eval/reliability": []},
    )(*words)
    fake.export = answer("export", pathlib.Path("out"))
    fake.trained_for = lambda source: None
    fake.load = answer("load", Model())
    fake.plan = answer("plan", {"fits": False, "target": "cpu:8"})
    monkeypatch.setitem(sys.modules, "jaxdistill.api", fake)
    monkeypatch.setattr(jaxdistill, "api", fake, raising=False)
    return fake


def run(capsys, *arguments):
    """(exit code, standard output, standard error below the first line) of a command.

    That line, which says what begins, is test_first_line.py's.
    """
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    line = f"jaxdistill {' '.join(arguments[:1])}: loading JAX\n"
    return code, out, err.removeprefix(line)


def python(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        **options,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["ls"],
        ["ls", "models", "--json"],
        ["init", "tiny", "-o", "tiny.yaml"],
        ["validate", "run.yaml", "train.steps=5"],
        ["schema", "workflow"],
        ["completion", "bash"],
        ["validate", "--explain", "method"],
        ["validate", "run.yaml", "--resolved"],
        ["validate", "absent.yaml"],
        ["ckpt", "ls", "absent"],
        ["ckpt", "verify", "absent"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(folder, arguments):
    code = (
        "import sys\n"
        "from jaxdistill.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = python(code, *arguments, cwd=folder)
    assert done.stdout.splitlines()[-1] == "heavy: []", done


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["ls", "rus"], 2, "there is no 'rus': did you mean runs?"),
        (["teacher", "caceh"], 2, "there is no 'caceh': did you mean cache?"),
        (["export", "a", "--format", "foldr"], 2, "--format: there is no 'foldr': did you mean"),
        (["xyzzy"], 2, "there is no 'xyzzy': choose from plan, train"),
        (["help"], 0, "exit codes:"),
        (["help", "sweep"], 0, "usage: jaxdistill sweep"),
        (["help", "teacher", "cache", "ls"], 0, "usage: jaxdistill teacher cache ls"),
    ],
)
def test_wrong_words_and_help(capsys, words, code, says):
    found, out, err = run(capsys, *words)
    assert found == code and says in (err if code else out)


def test_importing_the_package_imports_nothing_heavy():
    done = python("import sys, jaxdistill; print(*sys.modules)")
    assert not set(done.stdout.split()) & {*HEAVY, "pydantic", "yaml"}


def test_python_dash_m_and_a_wrong_command(folder):
    done = subprocess.run(
        [sys.executable, "-m", "jaxdistill", "trian"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 2
    assert "there is no 'trian': did you mean train?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_traceback(folder):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "jaxdistill", "ls", "models"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        # Buffered as on a user's machine: what is printed last is written when the command ends.
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"jaxdistill {jaxdistill.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["train", "run.yaml", "--fast"],
        ["resume"],
        ["resume", "a", "b"],
        ["validate"],
        ["eval", "model"],
        ["eval", "model", "--data", "x", "--seq-len", "0"],
        ["generate", "model", "--temperature", "-1"],
        ["generate", "model", "--top-p", "nan"],
        ["generate", "model", "--seed", "x"],
        ["generate", "model", "-p", ""],
        ["export", "run"],
        ["ls", "kernels"],
        ["init", "tny"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(capsys, folder, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert "error" in err
    assert "Traceback" not in err


def test_train(capsys, folder, engine):
    code, out, _ = run(capsys, "train", "run.yaml", "train.steps=20", "seed=3")
    assert code == 0
    assert "runs/run" in out
    [(name, (config,), used)] = engine.calls
    assert name == "train"
    assert (config.train.steps, config.seed) == (20, 3)
    overrides = ["train.steps=20", "seed=3"]
    assert used == {"input_text": RUN, "overrides": overrides, "hooks": NO_HOOKS}


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "run.yaml", "--json", "train.steps=20"],
        ["train", "--json", "run.yaml", "train.steps=20"],
        ["train", "run.yaml", "train.steps=20", "--json"],
    ],
    ids=" ".join,
)
def test_overrides_stand_on_either_side_of_options(capsys, folder, engine, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert engine.calls[0][1][0].train.steps == 20
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["run_dir"] == "runs/run"
    assert result["metrics"] == {"eval/loss": 1.5, "eval/perplexity": None}
    assert result["table"] == [{"name": "teacher", "kl_t1": None}]
    assert err.endswith("progress\n")


def test_a_plan_that_does_not_fit_ends_with_5(capsys, folder, engine):
    arguments = ("plan", "run.yaml", "--target", "cpu:8", "--tries", "3", "--json", "mesh.fsdp=4")
    code, out, err = run(capsys, *arguments)
    assert code == 5
    assert json.loads(out) == {"fits": False, "target": "cpu:8"}
    ((name, (loaded, target), options),) = engine.calls
    assert (name, target, options["tries"], loaded.mesh.fsdp) == ("plan", "cpu:8", 3, 4)


def test_nothing_is_trained_when_the_check_finds_something(capsys, folder, engine):
    code, out, err = run(capsys, "train", "run.yaml", "data.train.0.path=gone.jsonl")
    assert (code, out, engine.calls) == (3, "", [])
    where = 'override "data.train.0.path=gone.jsonl"'
    assert f'error: {where}: data.train.0.path = "gone.jsonl": no such file' in err


def test_several_errors_are_counted_and_each_has_its_line(capsys, folder, engine):
    (folder / "run.yaml").write_text(RUN.replace("steps: 10", "stesp: 10").replace("kd", "kdd"))
    code, _, err = run(capsys, "train", "run.yaml")
    assert code == 2
    lines = err.splitlines()
    assert lines[0] == "error: 3 problems"
    assert all(line.startswith("run.yaml:") for line in lines[1:])
    assert 'did you mean "steps"?' in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.DataError("x"), 3),
        (errors.ModelError("x"), 4),
        (errors.MismatchError("x"), 4),
        (errors.FitError("x"), 5),
        (errors.DamagedError("x"), 6),
        (errors.DivergedError("x"), 7),
        (errors.StorageError("x"), 9),
        (KeyboardInterrupt(), 130),
        (SystemExit(75), 75),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "run.yaml"],
        ["resume", "runs/run"],
        ["eval", "model", "--data", "x.jsonl"],
        ["export", "runs/run@best", "-o", "out"],
        ["generate", "model", "-p", "hello"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_exit_codes(capsys, folder, engine, arguments, error, code):
    engine.raises = error
    got, _, err = run(capsys, *arguments)
    assert got == code
    assert "Traceback" not in err
    if isinstance(error, errors.UserError):
        assert err.endswith("error: x\n")


def test_errors_of_our_own_are_not_hidden(folder, engine):
    engine.raises = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", "run.yaml"])


def test_messages_cannot_drive_the_terminal(capsys, folder, engine):
    engine.raises = errors.DataError("bad \x1b]0;title\x07 name")
    assert run(capsys, "train", "run.yaml")[2].endswith("error: bad ]0;title name\n")


def test_resume(capsys, folder, engine):
    code, out, _ = run(capsys, "resume", "runs/run", "--json")
    assert code == 0
    assert json.loads(out)["run_dir"] == "runs/run"
    options = {"from_start": False, "hooks": NO_HOOKS}
    assert engine.calls == [("resume", ("runs/run", []), options)]


def test_eval(capsys, folder, engine):
    arguments = ["eval", "run@best", "--data", "a", "--data", "b", "--teacher", "big"]
    code, out, _ = run(capsys, *arguments, "--max-rows", "7", "--loss-on", "assistant")
    assert code == 0
    data = ("a", "b")
    used = commands.Evaluate(data=data, teacher="big", loss_on="assistant", max_rows=7)
    assert engine.calls == [("evaluate", ("run@best", used), {})]
    assert "eval/ce     2.25" in out
    code, out, _ = run(capsys, *arguments, "--json")
    numbers = {"eval/ce": 2.25, "parameters": 100, "eval/x": None, "eval/reliability": []}
    assert json.loads(out) == numbers


def every_option():
    """(command, argparse action) of every argument of the command line."""
    pending = [((), options.parser())]
    while pending:
        name, parser = pending.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                pending += [((*name, word), below) for word, below in action.choices.items()]
            else:
                yield " ".join(name), action


def test_every_option_has_a_help_text_and_names_its_default():
    arguments = list(every_option())
    assert len(arguments) > 120
    for command, action in arguments:
        assert action.help and action.help != "%s", (command, action.dest)
        if isinstance(action.default, int | float | str) and not isinstance(action.default, bool):
            words = f"default: {action.default}".replace("%", "%%")
            assert words in action.help or action.default == argparse.SUPPRESS, (command, action)


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        ("importance", commands.Importance),
        ("prune", commands.Prune),
        ("quantize", commands.Quantize),
        ("export", commands.Export),
        ("compare", commands.Compare),
    ],
)
def test_a_step_of_a_workflow_takes_what_its_command_takes(kind, section):
    (step,) = [one for one in typing.get_args(typing.get_args(workflow.AnyStep)[0])
               if typing.get_args(one.model_fields["kind"].annotation) == (kind,)]  # fmt: skip
    (command,) = [one for one in options.COMMANDS if one.name == kind]
    assert section in command.takes
    assert issubclass(step, section)


def test_a_step_takes_a_budget_of_time():
    options = {"name": "s", "kind": "prune", "model": "m", "importance": "i", "latency": "12ms"}
    assert workflow.PruneStep(**options).budgets() == {"latency": "12ms"}
    with pytest.raises(ValueError, match="latency: '12mm': write 60%, 12ms or 800us"):
        workflow.PruneStep(**options | {"latency": "12mm"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mlp", "64", "--memory", "50%"], "prune: give sizes (layers, embed, mlp, heads, "),
        (["--mlp", "64", "--axes", "mlp"], "prune: --axes: has no effect without a budget"),
        (["--parameters", "most"], "prune: --parameters: 'most': write 60%, 80M or 1.5B"),
    ],
)
def test_rules_between_options_are_told_as_they_are_typed(capsys, words, message):
    code, out, err = run(capsys, "prune", "model", "-o", "out", *words)
    assert (code, out) == (2, "")
    assert f"error: {message}" in err


def test_generate(capsys, folder, engine):
    code, out, err = run(
        capsys, "generate", "model", "-p", "one", "-p", "two", "--top-k", "3", "--temperature", "1"
    )
    assert code == 0
    assert out == "one![31m\n\ntwo![31m\n"
    assert err.endswith("progress\n")
    assert engine.calls[1] == (
        "generate",
        ["one", "two"],
        {
            "max_new_tokens": 128,
            "temperature": 1.0,
            "top_k": 3,
            "top_p": None,
            "min_p": None,
            "seed": 0,
            "stop": (),
        },
    )


def test_generate_reads_standard_input(capsys, folder, engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    code, out, _ = run(capsys, "generate", "model", "--json")
    assert code == 0
    assert json.loads(out) == [{"prompt": "from a pipe", "text": "from a pipe!\x1b[31m"}]


def test_generate_as_a_chat(capsys, folder, engine, monkeypatch):
    from jaxdistill.models.byte_tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    code, _, err = run(capsys, "generate", "model", "-p", "hello", "--chat")
    assert code == 4
    assert "has no chat template" in err
    engine.load().__class__.tokenizer = tokenizer
    monkeypatch.setattr(tokenizer, "batch_decode", lambda rows, **_: [str(len(rows))])
    capsys.readouterr()
    code, out, _ = run(capsys, "generate", "model", "-p", "he<end>", "--chat")
    assert (code, out) == (0, "1\n")
    (ids,) = engine.calls[-1][1]
    assert ids[-1] == tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.decode(ids) == "he<end><end>"


def test_export(capsys, folder, engine):
    code, out, _ = run(capsys, "export", "runs/run@20", "-o", "out", "--dtype", "bfloat16")
    assert (code, out) == (0, "wrote out\n")
    written = commands.Export(dtype="bfloat16")
    assert engine.calls == [("export", ("runs/run@20", "out", written), {})]


def test_report(capsys, folder, monkeypatch):
    called = []
    build = lambda run_dirs, out: called.append((run_dirs, out)) or pathlib.Path("page.html")
    monkeypatch.setattr("jaxdistill.report.html.build", build)
    assert run(capsys, "report", "a", "b")[:2] == (0, "wrote page.html\n")
    assert run(capsys, "report", "a", "-o", "x.html")[0] == 0
    assert called == [(["a", "b"], None), (["a"], "x.html")]


def test_ls(capsys):
    code, out, _ = run(capsys, "ls", "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found) == {"recipes", "methods", "models"}
    assert {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")} == set(found["recipes"])
    assert set(found["methods"]) >= {"kd", "sft", "taid", "ctkd"}
    assert all(len(line) > 20 for line in found["recipes"].values())
    code, out, _ = run(capsys, "ls", "methods")
    assert out.startswith("methods:\n  kd   ")


def test_the_listed_models_are_those_that_can_be_read():
    from jaxdistill.cli import files
    from jaxdistill.formats import families

    assert set(files.MODELS) == set(families.FAMILIES)


def test_init_copies_and_refuses_to_overwrite(capsys, folder):
    line, source = (REPOSITORY / "configs" / "tiny.yaml").read_text().split("\n", 1)
    schema = f"file://{REPOSITORY}/configs/workflow.schema.json"
    source = line.replace("workflow.schema.json", schema) + "\n" + source
    assert run(capsys, "init", "tiny")[0] == 0
    assert (folder / "tiny.yaml").read_text() == source
    (folder / "tiny.yaml").write_text("mine")
    code, _, err = run(capsys, "init", "tiny")
    assert code == 2
    assert "--force" in err
    assert (folder / "tiny.yaml").read_text() == "mine"
    assert run(capsys, "init", "tiny", "--force")[0] == 0
    assert (folder / "tiny.yaml").read_text() == source
    assert run(capsys, "init", "tiny", "-o", "-")[1] == source
    assert run(capsys, "init", "tiny", "-o", "no/such/folder/x.yaml")[0] == 9
    assert 'did you mean "tiny"?' in run(capsys, "init", "tinny")[2]


@pytest.mark.parametrize("name", ["../configs/tiny", "/etc/passwd", "tiny.yaml"])
def test_init_takes_names_and_no_paths(capsys, folder, name):
    code, out, _ = run(capsys, "init", name)
    assert (code, out) == (2, "")


def test_validate(capsys, folder):
    assert run(capsys, "validate", "run.yaml") == (0, "run.yaml: ok\n", "")
    sized = ("validate", "run.yaml", "mesh={data: 2, fsdp: 2}", "train.batch_size=8")
    expected = "run.yaml: ok (for exactly 4 devices, which are counted at the start)\n"
    assert run(capsys, *sized) == (0, expected, "")
    own = run(capsys, *sized, "teacher.mesh={fsdp: 4}")  # beside those of mesh
    assert own == (0, expected.replace("4", "8"), "")
    code, out, _ = run(capsys, "validate", "run.yaml", "--resolved", "train.steps=7")
    assert code == 0
    (folder / "resolved.yaml").write_text(out)
    assert run(capsys, "validate", "resolved.yaml", "--resolved")[1] == out
    assert "steps: 7\n" in out


def test_data_align_shows_which_tokens_spell_the_same(capsys, tmp_path):
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ċ": 4}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.save(str(tmp_path / "tokenizer.json"))
    command = ("data", "align", "ab ba\n", "--student", "bytes", "--teacher", str(tmp_path))
    code, out, _ = run(capsys, *command)
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("vocabularies, the student's beside the teacher's: di")
    assert lines[1].endswith(
        "6 tokens of the student, 5 of the teacher; 5 groups, 4 of one token each"
    )
    assert lines[2:] == ["a|b    ab", "_    _", "b    b", "a    a", r"\n    \n"]
    found = json.loads(run(capsys, *command, "--json")[1])
    assert found["groups"][0] == [0, 1, 0, 0] and found["tokens"] == {"student": 6, "teacher": 5}


def test_data_align_reads_special_tokens_as_the_text_that_they_are_in_data(capsys, tmp_path):
    """`bab` is written as a control token of the teacher, and is three letters of the text."""
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["bab"])
    core.save(str(tmp_path / "tokenizer.json"))
    command = ("data", "align", "bab", "--student", "bytes", "--teacher", str(tmp_path))
    code, out, _ = run(capsys, *command)
    assert code == 0 and out.splitlines()[2:] == ["b    b", "a|b    ab"]


def test_validate_as_json(capsys, folder):
    code, out, _ = run(capsys, "validate", "run.yaml", "--json")
    assert (code, json.loads(out)) == (0, {"ok": True, "errors": [], "notes": []})
    code, out, err = run(capsys, "validate", "run.yaml", "train.steps=x", "--json")
    assert (code, err) == (2, "")
    found = json.loads(out)
    assert found["ok"] is False
    assert found["errors"] == [
        'override "train.steps=x": train.steps = "x": must be a whole number'
    ]


def test_validate_explains(capsys):
    code, out, _ = run(capsys, "validate", "--explain", "method.alpha")
    assert code == 0
    assert "alpha * CE + (1 - alpha) * divergence" in out
    assert run(capsys, "validate", "--explain", "method.alhpa")[0] == 2


def test_validate_refuses_a_folder_that_holds_a_run(capsys, folder):
    (folder / "runs" / "run").mkdir(parents=True)
    (folder / "runs" / "run" / "RUN.json").write_text("{}")
    code, _, err = run(capsys, "validate", "run.yaml")
    assert code == 2
    assert "jaxdistill resume runs/run" in err


def test_the_public_names_exist():
    for name in jaxdistill.__all__:
        assert getattr(jaxdistill, name) is not None
        assert name in dir(jaxdistill)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxdistill.nothing


def test_the_api_says_nothing_of_pytorch():
    """transformers says at its import that PyTorch is missing; it serves tokenizers here."""
    done = python(
        "import jaxdistill.api, os; print(os.environ.get('TRANSFORMERS_NO_ADVISORY_WARNINGS'))"
    )
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_the_version_is_that_of_the_package():
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert f'version = "{jaxdistill.__version__}"' in text


def test_validate_reads_workflows_too(capsys, folder):
    recipe = str(REPOSITORY / "configs" / "compress_smollm2.yaml")
    code, out, _ = run(capsys, "validate", recipe)
    assert code == 0 and out.endswith(": ok\n")
    bad = folder / "flow.yaml"
    bad.write_text("steps:\n  - {name: a, kind: export, model: '${b}'}\n")
    code, _, err = run(capsys, "validate", str(bad))
    assert code == 2 and "flow.yaml:2:5" in err and "no earlier step" in err


def test_a_file_out_of_reach_is_named_without_a_traceback(capsys, monkeypatch):
    def missing():
        raise PermissionError(13, "Permission denied", "/secret/file")

    monkeypatch.setattr("jaxdistill.cli.files.LISTS", {"recipes": missing})
    code, _, err = run(capsys, "ls", "recipes")
    assert (code, err) == (9, "error: /secret/file: Permission denied\n")
    monkeypatch.setattr("jaxdistill.cli.files.LISTS", {"recipes": lambda: 1 / 0})
    with pytest.raises(ZeroDivisionError):  # mistakes of ours stay loud
        run(capsys, "ls", "recipes")
