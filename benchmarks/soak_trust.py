"""Faults between processes and in small files: stops to whole groups, races, lost files, builds."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks import soak_faults
from benchmarks.soak_faults import Rig
from jaxdistill.errors import ConfigError
from jaxdistill.run.folder import RunDir
from jaxdistill.safe import json_file

LOST = {
    "checkpoints": 6,
    "fingerprints.json": 6,
    "student/config.json": 0,  # written again from what the facts vouch for
    "metrics.jsonl": 0,
    "RUN.json": 2,
}


def group_stops(rig: Rig, count: int, seed: int = 0) -> dict[str, Any]:
    """SIGTERM to a launcher and its process at the same moment, as a service manager sends it."""
    draw = random.Random(seed)
    clean = equal = 0
    for number in range(count):
        run = rig.folder / f"group-{seed}-{number}"
        words = ["launch", "-n", "1", "--", *rig.command("kd", run)]
        command = [sys.executable, "-m", "jaxdistill", *words]
        with open(rig.log, "ab") as log:
            launcher = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **rig.environment}
            )
        while not soak_faults._held(run) and launcher.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2))
        for pid in _family(launcher.pid):
            os.kill(pid, signal.SIGTERM)
        code = launcher.wait()
        clean += code in (0, 75) and json_file.read(run / "RUN.json")["status"] in (
            "done",
            "stopped",
        )
        resumed = rig.nursery.run(["resume", str(run)], rig.log) == 0
        equal += resumed and soak_faults.same(soak_faults.result(run), rig.whole("kd"))
    return {"stops": count, "saved": clean, "bitwise_equal_runs": equal}


def _family(pid: int) -> list[int]:
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def races(folder: pathlib.Path, count: int) -> dict[str, int]:
    """Three that make one run folder at the same moment: one does, and it is wholly its own."""
    whole = refused = 0
    for number in range(count):
        place, made, barrier = folder / str(number), [], threading.Barrier(3)
        told: list[str] = []

        def attempt(name: str, place=place, made=made, barrier=barrier, told=told) -> None:
            barrier.wait()
            try:
                RunDir.create(
                    str(place), name=name, input_text=name, resolved=f"a: {name}\n", overrides=[]
                )
                made.append(name)
            except ConfigError as error:
                told.append(str(error))

        threads = [threading.Thread(target=attempt, args=(name,)) for name in ("a", "b", "c")]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        text = (place / "config.resolved.yaml").read_text()
        whole += len(made) == 1 and text == f"a: {made[0]}\n"
        refused += sum("is being written by" in one or "holds a run" in one for one in told)
    return {"rounds": count, "whole": whole, "refused_with_reason": refused}


def lost(rig: Rig) -> dict[str, Any]:
    """A finished run without one of its files: refused, or written again, its records as before."""
    rig.whole("kd")
    original, found = rig.folder / "whole-kd", {}
    for name, code in LOST.items():
        run = rig.folder / f"lost-{name.replace('/', '-')}"
        shutil.copytree(original, run)
        records = (run / "metrics.jsonl").read_bytes()
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        ended = rig.nursery.run(["resume", str(run)], rig.log)
        kept = name == "metrics.jsonl" or (run / "metrics.jsonl").read_bytes() == records
        found[name] = {"exit_code": ended, "as_promised": ended == code and kept}
    return found


def killed_builds(rig: Rig, count: int, seed: int = 0) -> dict[str, Any]:
    """Kills in the middle of tokenising: the next build leaves nothing of them."""
    draw = random.Random(seed)
    cache, left = rig.folder / "cache", 0
    for number in range(count):
        shutil.rmtree(cache, ignore_errors=True)
        run = rig.folder / f"build-{seed}-{number}"
        command = rig.nursery.start(rig.command("kd", run), rig.log)
        while command.running() and not list(cache.glob(".*")):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.01))
        command.kill(signal.SIGKILL)
        command.wait()
        rig.nursery.run(rig.command("kd", run), rig.log)
        left += len(list(cache.glob(".*")))
    return {"kills": count, "left_behind": left}
