"""The long form of what tests/ proves in small: faults by the hundred, and what they left.

python -m benchmarks.soak                     everything; results/soak.json
python -m benchmarks.soak --only kills --scale 0.1 --seed 1     a slice, kept beside
"""

import argparse
import json
import pathlib
import shutil
import signal
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
    soak_serve,
    soak_small_files,
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
    "serve": lambda _, scale, seed, __: soak_serve.run(
        max(10, round(soak_serve.SECONDS * scale)), seed=seed
    ),
    # The larger one is SmolLM2-135M in float32 with AdamW's two moments.
    "digests": lambda folder, scale, *_: {
        f"{size} MB": soak_faults.digest_cost(folder / str(size), round(size * scale))
        for size in (256, 1616)
    },
}


def main() -> None:
    """Runs the parts and adds what they show to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts; default 1")
    parser.add_argument("--seed", type=int, default=0, help="another one is a slice of its own")
    parser.add_argument("--folder", help="for the runs, such as /dev/shm; default: the system's")
    parser.add_argument("--no-save", action="store_true", help="only print")
    arguments = parser.parse_args()
    path = duel.RESULTS / "soak.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    for name in arguments.only:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f"soak-{name}-", dir=arguments.folder))
        began = time.perf_counter()

        key = name if not arguments.seed else f"{name}, seed {arguments.seed}"

        def report(counts: dict[str, Any], key: str = key, began: float = began) -> None:
            seconds = round(time.perf_counter() - began, 1)
            parts[key] = {**counts, "total_seconds": seconds, "versions": _versions()}
            print(f"{key}: {json.dumps(parts[key])}", file=sys.stderr, flush=True)
            if not arguments.no_save:  # as it comes: what is cut short has left its counts
                duel.save("soak", {"parts": parts})

        report(PARTS[name](folder, arguments.scale, arguments.seed, report))
        shutil.rmtree(folder)


def _versions() -> dict[str, str]:
    from importlib import metadata

    packages = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}


if __name__ == "__main__":
    main()
