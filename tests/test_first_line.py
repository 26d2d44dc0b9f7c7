"""Every command says what it does before it imports anything that takes seconds."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.also import also

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODE = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("jax", "flax", "transformers", "numpy"):
            print("HEAVY", file=sys.stderr)
            raise SystemExit(77)

sys.meta_path.insert(0, Watch())
from jaxdistill.cli import main
sys.exit(main(sys.argv[1:]))
"""
RUN = """\
teacher: {random: {layers: 2, embed: 8, mlp: 8, heads: 2}}
student: {random: {like: teacher, layers: 1}}
tokenizer: {from: bytes}
data: {train: [{path: "python:docs?split=train"}], eval: [{path: "python:docs?split=held_out"}]}
method: {name: kd}
train: {steps: 10}
"""
COMMANDS = (
    "train run.yaml",
    "train run.yaml --json",
    "resume runs/x",
    "eval model --data x.txt",
    "eval model --tasks arithmetic",
    "generate model -p x",
    "export model -o out",
    "importance model --data x.txt -o scores",
    "prune model --layers 1 -o out",
    "quantize model -o out",
    "compare a=model --data x.txt",
    "plan run.yaml --target cpu:8",
    "workflow flow.yaml",
    "serve model",
    "harness model --tasks x",
    "teacher generate ask.yaml",
    "bench kernels",
)


@pytest.mark.parametrize("command", [*COMMANDS[:4], *also(*COMMANDS[4:])])
def test_the_first_line_comes_before_the_wait(tmp_path, command):
    (tmp_path / "run.yaml").write_text(RUN)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    name = command.split()[0]
    assert done.stderr.splitlines()[:1] == [f"jaxdistill {name}: loading JAX"], done.stderr
    assert done.stdout == ""
    if "generate ask" not in command:
        assert (done.returncode, done.stderr.splitlines()[1:]) == (77, ["HEAVY"])


def test_of_several_processes_the_first_speaks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, "generate", "model", "-p", "x"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PROCESS_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "HEAVY\n"
