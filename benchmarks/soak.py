"""The long form of what tests/ proves in small: faults by the hundred, and what they left.

python -m benchmarks.soak                     everything; results/soak.json
python -m benchmarks.soak --only kills --scale 0.1 --seed 1     a slice, kept beside
"""

import argparse
import datetime
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import (
    duel,
    soak_cache,
    soak_faults,
    soak_input,
    soak_numbers,
    soak_rewarded,
    soak_serve,
    soak_small_files,
    soak_strangers,
    soak_trust,
)

Report = Callable[[dict[str, Any]], Any]
# (folder of its own, scale of the counts, seed, called with the counts so far)
Part = Callable[[pathlib.Path, float, int, Report], dict[str, Any]]


def _on_rig(run: Callable[..., dict[str, Any]], count: int) -> Part:
    def part(folder: pathlib.Path, scale: float, seed: int, report: Report) -> dict[str, Any]:
        with soak_faults.Rig(folder) as rig:
            return run(rig, max(1, round(scale * count)), seed, report)

    return part


PARTS: dict[str, Part] = {
    "kills": _on_rig(soak_faults.kills, 200),
    "writing_kills": _on_rig(
        lambda rig, n, seed, report: soak_faults.kills(
            rig,
            n,
            seed,
            report,
            per_run=2,
            methods=soak_faults.WRITING,
            points=soak_faults.WHILE_WRITING,
        ),
        100,
    ),
    "ema_kills": _on_rig(
        lambda rig, n, seed, report: soak_faults.kills(rig, n, seed, report, 3, methods=("ema",)),
        30,
    ),
    "rewarded_kills": _on_rig(
        lambda rig, n, seed, report: soak_faults.kills(
            rig,
            n,
            seed,
            report,
            per_run=5,
            methods=("grpo",),
            points=soak_faults.WHILE_WRITING,
        ),
        50,
    ),
    "rewarded_processes": _on_rig(lambda rig, *_: soak_rewarded.processes(rig), 1),
    "cold_kills": _on_rig(lambda rig, n, seed, _: soak_faults.cold_kills(rig, n, seed), 10),
    "stops": _on_rig(soak_faults.stops, 50),
    "doubled_stops": _on_rig(
        lambda rig, n, seed, report: soak_faults.stops(
            rig, n, seed, report, (signal.SIGTERM, signal.SIGHUP)
        ),
        20,
    ),
    "group_stops": _on_rig(lambda rig, n, seed, _: soak_trust.group_stops(rig, n, seed), 10),
    "races": lambda folder, scale, *_: soak_trust.races(folder, round(200 * scale)),
    "lost_files": _on_rig(lambda rig, *_: soak_trust.lost(rig), 1),
    "killed_builds": _on_rig(lambda rig, n, seed, _: soak_trust.killed_builds(rig, n, seed), 20),
    "small_files": lambda folder, scale, seed, _: soak_small_files.soak(
        folder, max(1, round(100 * scale)), seed
    ),
    "flips": _on_rig(lambda rig, n, seed, _: soak_faults.flips(rig, n, seed), 500),
    "cache_flips": lambda folder, scale, seed, _: soak_cache.flips(
        folder, max(1, round(scale * 500)), seed
    ),
    "fallbacks": _on_rig(lambda rig, n, seed, _: soak_faults.fallbacks(rig, n, seed), 10),
    "full_disks": _on_rig(lambda rig, *_: soak_faults.full_disks(rig), 1),
    "numbers": lambda folder, scale, *_: soak_numbers.soak_numbers(folder, round(1000 * scale)),
    "input": lambda _, scale, seed, __: soak_input.run(
        *(round(scale * count) for count in (5000, 10_000, 3000)), seed=seed
    ),
    "strangers": lambda folder, *_: soak_strangers.run(folder),
    "serve": lambda _, scale, seed, __: soak_serve.run(
        max(10, round(soak_serve.SECONDS * scale)), seed=seed
    ),
    # The larger one is SmolLM2-135M in float32 with AdamW's two moments.
    "digests": lambda folder, scale, *_: {
        f"{size} MB": soak_faults.digest_cost(folder / str(size), round(size * scale))
        for size in (256, 1616)
    },
}


_EVERY = lambda found, field, value: all(one[field] == value for one in _rows(found))
# part -> whether its counts are what is promised
SOUND: dict[str, Callable[[dict[str, Any]], bool]] = {
    "kills": lambda f: f["bitwise_equal_runs"] == f["runs"] and not f["unreadable_run_folders"],
    "writing_kills": lambda f: SOUND["kills"](f),
    "ema_kills": lambda f: SOUND["kills"](f),
    "rewarded_kills": lambda f: SOUND["kills"](f),
    "rewarded_processes": lambda f: (
        f["equal_rewards_and_answers"] and f["largest_difference"] < 1e-5
    ),
    "cold_kills": lambda f: f["bitwise_equal"],
    **dict.fromkeys(
        ("stops", "doubled_stops"),
        lambda f: (
            f["exits_75"] == f["signals"]
            and f["bitwise_equal_runs"] == f["runs"]
            and not f["unreadable_run_folders"]
        ),
    ),
    "group_stops": lambda f: f["saved"] == f["bitwise_equal_runs"] == f["stops"],
    "races": lambda f: f["whole"] == f["rounds"] == f["refused_with_reason"] / 2,
    "lost_files": lambda f: _EVERY(f, "as_promised", True),
    "killed_builds": lambda f: f["equal_builds"] == f["builds"] and not f["left_behind"],
    "small_files": lambda f: _EVERY(f, "tracebacks", 0),
    "flips": lambda f: all(one["detected"] == one["flips"] for one in _rows(f)),
    "cache_flips": lambda f: f["found"] == f["flips"],
    "fallbacks": lambda f: f["bitwise_equal_runs"] == f["put_aside_and_told"] == f["damaged"],
    "full_disks": lambda f: all(
        one["exit_code"] == 9
        and one["sound"]
        and one["resumed_exit_code"] == 0
        and one["arrays_equal"]
        for one in _rows(f)
    ),
    "numbers": lambda f: f["values_checked"] and not f["nonfinite_values_in_any_checkpoint"],
    "input": lambda f: (
        not (
            f["tracebacks"]
            or f["records/lost"]
            or f["configs/without a place"]
            or f["files/message without a name"]
        )
    ),
    "strangers": lambda f: _EVERY(f, "exit_code", 0) and _EVERY(f, "bounded", True),
    "serve": lambda f: not f["bad"] and not f["left"] and f["slowest_health"] < 1,
    "digests": lambda f: all(one["digest_share_of_time"] < 0.05 for one in _rows(f)),
}


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The counts of a part that has several of a kind."""
    names = [name for name in found if name != "versions"]
    return [found[name] for name in names if isinstance(found[name], dict)]


def main() -> int:
    """Runs the parts and adds what they show to the results; 1 where one is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts; default 1")
    parser.add_argument("--seed", type=int, default=0, help="another one is a slice of its own")
    parser.add_argument("--folder", help="for the runs, such as /dev/shm; default: the system's")
    parser.add_argument("--no-save", action="store_true", help="only print")
    arguments = parser.parse_args()
    path = duel.RESULTS / "soak.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    wrong = []
    for name in arguments.only:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f"soak-{name}-", dir=arguments.folder))
        began = time.perf_counter()

        key = name if not arguments.seed else f"{name}, seed {arguments.seed}"

        def report(counts: dict[str, Any], key: str = key, began: float = began) -> None:
            seconds = round(time.perf_counter() - began, 1)
            stamp = {"date": datetime.date.today().isoformat(), "scale": arguments.scale}
            stamp["commit"] = _commit()
            parts[key] = {**counts, "total_seconds": seconds, **stamp, "versions": _versions()}
            print(f"{key}: {json.dumps(parts[key])}", file=sys.stderr, flush=True)
            if not arguments.no_save:  # as it comes: what is cut short has left its counts
                duel.save("soak", {"parts": parts})

        report(PARTS[name](folder, arguments.scale, arguments.seed, report))
        if not SOUND[name](parts[key]):
            wrong.append(key)
        shutil.rmtree(folder)
    for key in wrong:
        print(f"{key}: is not as promised", file=sys.stderr)
    return 1 if wrong else 0


def _commit() -> str:
    """The commit that is checked out; "" where there is none."""
    asked = ["git", "-C", str(duel.RESULTS.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def _versions() -> dict[str, str]:
    from importlib import metadata

    packages = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}


if __name__ == "__main__":
    sys.exit(main())
