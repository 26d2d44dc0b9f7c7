"""How commands end: output that nobody reads, signals before there is a run, missing platforms."""

import dataclasses
import glob
import io
import os
import signal
import subprocess
import sys

import pytest

from jaxdistill import api, cli, references
from jaxdistill.cli import options
from jaxdistill.cli.streams import surviving
from jaxdistill.config import preflight
from jaxdistill.errors import ConfigError, DamagedError
from jaxdistill.run import terminal
from jaxdistill.train import stopping
from tests.also import also

CONFIG = """
run: {{name: a, dir: {folder}/run}}
student: {{random: {{layers: 1, embed: 8, mlp: 8, heads: 1}}}}
tokenizer: {{from: bytes}}
data: {{train: [{{path: a.txt}}], eval: [{{path: b.txt}}]}}
method: {{name: sft}}
train: {{steps: 3}}
"""


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize("stream", [closed_pipe, lambda: open("/dev/full", "w")])
def test_output_that_ends_fails_nothing(stream, monkeypatch):
    with stream() as out, stream() as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with surviving("stdout", "stderr"):
            for _ in range(3):
                print("x" * 100_000)
                print("y" * 100_000, file=sys.stderr, flush=True)
            sys.stdout.flush()
        monkeypatch.undo()  # closing them fails neither


def test_output_that_lasts_is_shown(capsys):
    with surviving("stdout", "stderr"):
        print("shown")
        print("told", file=sys.stderr)
    assert capsys.readouterr() == ("shown\n", "told\n")


def test_a_run_says_what_it_can(capsys):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    terminal.say("lost", Gone())
    terminal.say("kept", sys.stdout)
    assert capsys.readouterr().out == "kept\n"


def outcome(words, monkeypatch, out, err, work=None):
    """The exit code of a command, all of which do some `work`, whose streams have ended."""
    if work:
        rows = [dataclasses.replace(one, run=work) for one in options.COMMANDS]
        monkeypatch.setattr(options, "COMMANDS", rows)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    try:
        code = cli.main(words)
    except SystemExit as end:
        code = end.code
    finally:
        monkeypatch.undo()
    for stream in (out, err):
        stream.close()  # as at the end of the process: it must not fail
    return code


ENOUGH = {  # words after which argparse takes a command
    "plan": "a.yaml --target cpu:1",
    "ckpt rollback": "run 3",
    "eval": "m --data a",
    "compare": "a=m --data a",
    "harness": "m --tasks a",
    "importance": "m -o a --data a",
    "prune": "m -o a",
    "quantize": "m -o a",
    "export": "m -o a",
    "launch": "-n 2 -- train a.yaml",
    "sweep": "a.yaml seed=1,2",
    "teacher cache": "a.yaml -o d --format topk",
    "teacher cache verify": "d --teacher m",
    "data align": "a --student s --teacher t",
    "init": "tiny -o a.yaml",
    "ls": "",
    "bench": "loss",
    "schema": "run",
    "completion": "bash",
}
IN_FILES = {
    "train", "resume", "launch", "sweep", "ckpt rollback", "clean", "importance", "prune",
    "quantize", "workflow", "teacher generate", "teacher cache", "serve", "export", "report",
    "init",
}  # fmt: skip


NAMES = [one.name for one in options.COMMANDS]


@pytest.mark.parametrize("name", [*NAMES[:6], *also(*NAMES[6:])])
def test_a_command_whose_output_nobody_takes_ends_with_its_own_code(name, monkeypatch):
    """The work of some is in files, and done; the others say 141 as `| head` has it, or 9."""
    words = [*name.split(), *ENOUGH.get(name, "x").split()]

    def work(arguments):
        for _ in range(3):
            print("x" * 100_000)
        print("y" * 100_000, file=sys.stderr, flush=True)

    def fail(arguments):
        print("waits in a buffer")
        raise DamagedError("z" * 100_000)

    full = lambda: open("/dev/full", "w")
    for stream, code in ((closed_pipe, 141), (full, 9)):
        want = 0 if name in IN_FILES else code
        assert outcome(words, monkeypatch, stream(), stream(), work) == want
        assert outcome(words, monkeypatch, stream(), stream(), fail) == 6
    assert outcome([*name.split(), "--help"], monkeypatch, closed_pipe(), closed_pipe()) == 141


def test_streams_that_were_never_there_are_as_dev_null(tmp_path):
    """What is printed must not land in the next file that is opened."""
    code = (
        "import os, sys\n"
        "for number in map(int, sys.argv[1]): os.close(number)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'jaxdistill', *sys.argv[2:]])"
    )
    for closed in ("0", "1", "2", "12", "012"):
        out = tmp_path / f"{closed}.yaml"
        words = [sys.executable, "-c", code, closed, "init", "tiny", "-o", str(out)]
        done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stderr) == (0, b"")
        assert out.read_text().startswith("#") and "wrote" not in out.read_text()


@pytest.mark.parametrize("begun", [False, True])
def test_a_stop_before_there_is_a_run_promises_no_resume(tmp_path, monkeypatch, capsys, begun):
    (tmp_path / "a.yaml").write_text(CONFIG.format(folder=tmp_path))

    def train(config, **_):
        if begun:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "RUN.json").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(preflight, "check", lambda config: [])
    monkeypatch.setattr(api, "train", train)
    before = {each: signal.getsignal(each) for each in stopping.SIGNALS}
    try:
        code = cli.main(["train", str(tmp_path / "a.yaml")])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    said = capsys.readouterr().err
    if begun:
        assert code == 75 and "stopped: SIGTERM: no step was in flight" in said
    else:
        assert code == 128 + signal.SIGTERM and "before the run began: start it again" in said


@pytest.mark.parametrize(
    "words",
    [
        "Unable to initialize backend 'cuda': no plugin (you may need to uninstall it)",
        "Unknown backend: 'cuda' requested, but no platforms that are instances of cuda there",
    ],
)
def test_a_platform_that_is_not_there_is_two_lines(monkeypatch, capsys, words):
    def fail(*_, **__):
        raise RuntimeError(words)

    monkeypatch.setattr(api, "resume", fail)
    assert cli.main(["resume", "runs/a"]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "jaxdistill resume: loading JAX" and len(lines) == 2
    assert "no platform 'cuda'" in lines[0] and "pip install" in lines[1]


@pytest.mark.skipif(glob.glob("/dev/nvidia*") != [], reason="there is such a platform")
def test_jax_itself_without_a_gpu_is_two_lines():
    """What JAX raises differs from version to version, so that it is asked itself."""
    code = "import sys, jax; from jaxdistill import api, cli; api.resume = lambda *_, **__: "
    code += "jax.devices(); sys.exit(cli.main(['resume', 'runs/a']))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 2, told.stderr
    _, *lines = told.stderr.splitlines()
    assert "no platform 'cuda'" in lines[0] and len(lines) == 2


OF_A_RUN = [
    "resume {}",
    "resume {} --from-start",
    "report {}",
    "ckpt ls {}",
    "ckpt verify {}",
    "ckpt rollback {} 3",
    "clean {}",
    "export {} -o out",
    "export {} --adapters -o out",
    "eval {} --data a.txt",
    "generate {} -p a",
    "prune {} --layers 1 -o out",
    "quantize {} -o out",
    "compare a={} --data a.txt",
    "serve {}",
    "train a.yaml teacher.source={} method.name=kd",
]


@pytest.mark.parametrize("words", [*OF_A_RUN[:4], *also(*OF_A_RUN[4:])])
def test_a_run_that_is_not_there_has_one_code(words, tmp_path, monkeypatch, capsys):
    """A folder that is missing, or empty; by its name, or as one of its checkpoints."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"some words of {name}\n" * 50)
    (tmp_path / "a.yaml").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    for name in ("runs/none", "runs/empty", "runs/none@best", str(tmp_path / "runs" / "none")):
        if "@" in name and words.split()[0] in ("resume", "report", "ckpt", "clean"):
            continue
        assert cli.main(words.format(name).split()) == 2, name
        said = capsys.readouterr().err
        assert name.partition("@")[0] in said and "Traceback" not in said
    if words.split()[0] != "train":  # whose teacher is a model
        gone = str(tmp_path / "nowhere" / "none")
        assert cli.main(words.format(gone).split()) == 2
        assert gone in capsys.readouterr().err


def test_a_name_on_the_hub_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "hf:runs/name", "package:x/runs/none"):
        assert references.as_run(name) is None
    (tmp_path / "out" / "one").mkdir(parents=True)
    (tmp_path / "out" / "one" / "RUN.json").touch()
    for name in ("out/one", "out/one@latest", str(tmp_path / "out" / "one@3")):
        assert references.as_run(name).folder.resolve() == tmp_path / "out" / "one"
    with pytest.raises(ConfigError, match="neither a run nor a model"):
        references.as_run("out/two")
    (tmp_path / "runs" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "model" / "config.json").touch()
    assert references.as_run("runs/model") is None
