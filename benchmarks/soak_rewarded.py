"""A run that earns rewards, in two processes and in one: the same answers, verdicts and updates."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks.soak_faults import Rig
from benchmarks.warm import ROOT

DEVICES, PROCESSES = 2, 2  # devices of each process
COMPARED = ("loss/total", "loss/policy", "loss/divergence", "optim/grad_norm", "policy/old_kl")


def processes(rig: Rig) -> dict[str, Any]:
    """A group of answers lies on several devices of two processes; all means are global."""
    launched = ["launch", "-n", str(PROCESSES), "--devices-per-process", str(DEVICES), "--"]
    together, alone = _run(rig, "together", launched), _run(rig, "alone", [])
    pairs = list(zip(together, alone, strict=True))
    told = [key for key in alone[0] if key.startswith(("reward/", "rollout/"))]
    return {
        "processes": PROCESSES,
        "devices": PROCESSES * DEVICES,
        "updates": len(alone),
        "equal_rewards_and_answers": all(
            abs(one[key] - other[key]) < 1e-5 for one, other in pairs for key in told
        ),
        "largest_difference": max(
            abs(one[key] - other[key]) for one, other in pairs for key in COMPARED
        ),
    }


def _run(rig: Rig, name: str, before: list[str]) -> list[dict]:
    """The records of the updates of a run."""
    run = rig.folder / f"{name}-run"
    words = [*before, "train", str(_config(rig, run))]
    environment = {**os.environ, **rig.environment}
    with rig.log.open("a") as log:
        code = subprocess.run(
            [sys.executable, "-m", "jaxdistill", *words],
            cwd=ROOT, env=environment, stdout=log, stderr=log, check=False,
        ).returncode  # fmt: skip
    assert code == 0, f"{run}: ended with {code}: {rig.log.read_text()[-2000:]}"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if "reward/mean" in one]


def _config(rig: Rig, run: pathlib.Path) -> pathlib.Path:
    path = rig.config("grpo", run)
    path.write_text(path.read_text().replace("train: {steps: 30,", "train: {steps: 6,"))
    return path
