"""The launch files of configs/launch: parsed by bash, and run with stand-ins for the clusters."""

import os
import pathlib
import shlex
import subprocess

import pytest

from jaxdistill.cli import parse

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs" / "launch"
SRUN = '#!/bin/bash\necho "srun $*" >> calls\nshift\nexec "$@"\n'
GCLOUD = """#!/bin/bash
for word in "$@"; do case $word in --command=*) said=${word#--command=} ;; esac; done
echo "gcloud ${*: -2:1} $said" >> calls
bash -c "$said"
"""
# Makes its folder as a run does, and ends with the next of the codes it is given.
TOOL = """#!/bin/bash
printf '%q ' "$@" >> commands; echo >> commands
for word in "$@"; do
  case $word in run.dir=*) mkdir -p "${word#run.dir=}"; touch "${word#run.dir=}/RUN.json" ;; esac
done
code=$(head -1 codes); sed -i 1d codes; exit "$code"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder to work in, with stand-ins first on the PATH; (name, codes, words) -> exit code."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": '#!/bin/bash\necho "scontrol $*" >> calls\n',
        "gcloud": GCLOUD,
        "jaxdistill": TOOL,
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(name, codes, *words, **variables):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        path = f"{tools}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", FOLDER / name, *words],
            cwd=tmp_path,
            env={"PATH": path, "RUN": "runs/a b", **variables},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    run.commands = lambda: [
        shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()
    ]
    run.calls = lambda: (tmp_path / "calls").read_text()
    return run


def test_slurm_trains_then_resumes_and_asks_to_be_queued_again(cluster):
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "16"}
    assert cluster("slurm.sh", [75], "a.yaml", "seed=3", **slurm) == (75, "")
    assert cluster("slurm.sh", [0], "a.yaml", "seed=3", **slurm) == (0, "")
    first, second = cluster.commands()
    assert first == ["train", "a.yaml", "run.dir=runs/a b", "mesh.processes=16", "seed=3"]
    assert second == ["resume", "runs/a b"]
    assert cluster.calls().count("scontrol requeue 17") == 1
    assert cluster("slurm.sh", [2], "a.yaml", **slurm)[0] == 2  # a mistake is not tried again
    assert cluster.calls().count("scontrol") == 1
    code, told = cluster("slurm.sh", [], **slurm)
    assert code != 0 and "usage" in told


def test_a_pod_is_asked_again_until_the_run_is_done(cluster):
    pod = {"TPU": "slice", "ZONE": "z"}
    assert cluster("tpu_pod.sh", [75, 8, 0], "a.yaml", "train.steps=5", **pod)[0] == 0
    assert cluster.commands() == [
        ["train", "a.yaml", "run.dir=runs/a b", "train.steps=5"],
        ["resume", "runs/a b"],
        ["resume", "runs/a b"],
    ]
    calls = cluster.calls().splitlines()
    assert [call.split()[1] for call in calls] == ["--worker=0", "--worker=all"] * 3
    assert cluster("tpu_pod.sh", [3], "a.yaml", **pod)[0] == 3
    assert cluster("tpu_pod.sh", [75] * 9, "a.yaml", ATTEMPTS="2", **pod)[0] == 75
    assert cluster("tpu_pod.sh", [], "a.yaml", TPU="slice")[0] != 0


def test_what_they_type_is_what_the_tool_takes(cluster):
    cluster("slurm.sh", [75], "a.yaml", "seed=3", SLURM_JOB_ID="1", SLURM_NTASKS="2")
    cluster("slurm.sh", [0], "a.yaml", SLURM_JOB_ID="1", SLURM_NTASKS="2")
    train, resume = map(parse, cluster.commands())
    assert train.overrides == ["run.dir=runs/a b", "mesh.processes=2", "seed=3"]
    assert resume.run_dir == "runs/a b"
    heads = (FOLDER / "slurm.sh").read_text().splitlines()
    options = [line.split(None, 1)[1] for line in heads if line.startswith("#SBATCH")]
    assert all(
        option.startswith("--") and "=" in option or option == "--requeue" for option in options
    )
    # Slurm reads its lines above the first command only.
    first = next(i for i, line in enumerate(heads) if line and not line.startswith("#"))
    assert not [line for line in heads[first:] if line.startswith("#SBATCH")]
