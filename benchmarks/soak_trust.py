"""Faults between processes and in small files: stops to whole groups, races, lost files, builds."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import soak_faults
from benchmarks.soak_faults import Rig
from benchmarks.warm import LIFE, Command
from jaxdistill.safe import json_file, manifest

SENTENCES = 60_000  # some seconds of tokenising
LOST = {
    "checkpoints": 6,
    "fingerprints.json": 6,
    "student": 0,  # written again from what the facts vouch for
    "student_without_weights/config.json": 0,
    "student_without_weights/tokenizer.json": 0,
    "metrics.jsonl": 0,
    "events.jsonl": 0,
    "table.json": 0,  # measured again
    "config.resolved.yaml": 2,
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
        code = launcher.wait(timeout=LIFE)
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


RACER = """
import json, sys, time
from jaxdistill.errors import ConfigError
from jaxdistill.run.folder import RunDir
name = sys.argv[1]
print("ready", flush=True)
for line in sys.stdin:
    place, at = json.loads(line)
    while time.monotonic() < at:
        pass
    try:
        RunDir.create(place, name=name, input_text=name, resolved=f"a: {name}\\n", overrides=[])
        print(json.dumps(""), flush=True)
    except ConfigError as error:
        print(json.dumps(str(error)), flush=True)
"""


def races(folder: pathlib.Path, count: int) -> dict[str, int]:
    """Three processes make one run folder at one moment: one does, and it is wholly its own."""
    whole = refused = 0
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = {
        name: subprocess.Popen([sys.executable, "-c", RACER, name], **pipes) for name in "abc"
    }
    try:
        for racer in racers.values():
            assert racer.stdout.readline() == "ready\n", "it did not start"
        for number in range(count):
            place = folder / str(number)
            for racer in racers.values():
                print(
                    json.dumps([str(place), time.monotonic() + 0.02]), file=racer.stdin, flush=True
                )
            told = {name: json.loads(racer.stdout.readline()) for name, racer in racers.items()}
            made = [name for name, error in told.items() if not error]
            text = (place / "config.resolved.yaml").read_text()
            whole += len(made) == 1 and text == f"a: {made[0]}\n"
            refused += sum(
                "is being written by" in one or "holds a run" in one for one in told.values()
            )
    finally:
        for racer in racers.values():
            racer.kill()
            racer.communicate()
    return {
        "rounds": count,
        "processes": len(racers),
        "whole": whole,
        "refused_with_reason": refused,
    }


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


def killed_builds(rig: Rig, count: int, seed: int = 0, per_build: int = 5) -> dict[str, Any]:
    """Kills and stops in the middle of tokenising: what is resumed ends with the same bytes."""
    draw = random.Random(seed)
    (rig.folder / "train.txt").write_text(soak_faults._sentences(0, SENTENCES))
    whole, seconds = _built(rig, rig.folder / f"built-{seed}")
    cache, kills, grown, equal, left, builds = rig.folder / "cache", 0, 0, 0, 0, 0
    while kills < count:
        shutil.rmtree(cache)
        run = rig.folder / f"build-{seed}-{builds}"
        for _ in range(min(per_build, count - kills)):
            command = rig.nursery.start(rig.command("kd", run), rig.log)
            _until(command, lambda at=command: _building(cache, at.pid))
            before = _done(cache)
            until = time.monotonic() + draw.uniform(0, 1.5 * seconds / per_build)
            while command.running() and time.monotonic() < until:
                time.sleep(0.001)
            command.kill(draw.choice((signal.SIGKILL, signal.SIGTERM)))
            kills += command.wait() != 0
            grown += _done(cache) > before
        equal += _built(rig, run)[0] == whole
        left += len(list(cache.glob(".*")))
        builds += 1
    return {
        "kills": kills,
        "builds": builds,
        "kills_that_left_progress": grown,
        "equal_builds": equal,
        "left_behind": left,
        "undisturbed_seconds": round(seconds, 1),
    }


def _until(command: Command, seen: Callable[[], Any]) -> None:
    """Waits until something is seen, or the command has ended."""
    while command.running() and not seen():
        time.sleep(0.001)


def _building(cache: pathlib.Path, pid: int) -> bool:
    """Whether a process tokenises the training data, or they are finished."""
    with contextlib.suppress(OSError):  # it is finished at this moment
        held = [path.read_text() for path in cache.glob(".tokens-*/LOCK")]
        return any(f'"pid": {pid},' in text for text in held) or any(cache.glob("train-*"))
    return True


def _done(cache: pathlib.Path) -> int:
    """The records that a killed build has noted as done."""
    notes = cache.glob(".tokens-*/content/progress.json")
    return max(
        (json.loads(path.read_text())["content"]["progress"]["records"] for path in notes),
        default=0,
    )


def _built(rig: Rig, run: pathlib.Path) -> tuple[dict[str, bytes], float]:
    """The bytes of the training data that a run builds, by file, and how long that took."""
    command = rig.nursery.start(rig.command("kd", run), rig.log)
    cache = rig.folder / "cache"
    _until(command, lambda: _building(cache, command.pid))
    began = time.monotonic()
    _until(command, lambda: list(cache.glob("train-*")))
    seconds = time.monotonic() - began
    _until(command, (run / "RUN.json").exists)
    command.kill(signal.SIGKILL)  # what comes behind the data is no part of this
    command.wait()
    (folder,) = cache.glob("train-*")
    shards = [cache / name for name in manifest.read(folder)["shards"]]
    files = (path for one in (folder, *shards) for path in one.iterdir())
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}, seconds
