"""How commands end: output that nobody reads, signals before there is a run, missing platforms."""

import io
import os
import signal
import sys

import pytest

from jaxdistill import api, cli, references
from jaxdistill.cli.output import surviving
from jaxdistill.config import preflight
from jaxdistill.errors import ConfigError
from jaxdistill.report import run_files
from jaxdistill.run import terminal
from jaxdistill.train import stopping

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
        with surviving():
            for _ in range(3):
                print("x" * 100_000)
                print("y" * 100_000, file=sys.stderr, flush=True)
            sys.stdout.flush()
        monkeypatch.undo()  # closing them fails neither


def test_output_that_lasts_is_shown(capsys):
    with surviving():
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


def test_a_run_that_is_not_there_has_one_code(tmp_path, capsys):
    missing = str(tmp_path / "none")
    with pytest.raises(ConfigError):
        run_files.load(missing)
    for which in ("best", "latest", "3"):
        with pytest.raises(ConfigError, match="holds no run"):
            references.as_run(f"{missing}@{which}")
    for words in (["resume", missing], ["ckpt", "ls", missing], ["report", missing]):
        assert cli.main(words) == 2
        assert missing in capsys.readouterr().err
