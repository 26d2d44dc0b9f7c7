"""The long form of what tests/ proves in small: faults by the hundred, and what they left.

python -m benchmarks.soak                     everything; about half an hour on two quiet cores
python -m benchmarks.soak --only kills stops --scale 0.1
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import duel, soak_faults, soak_input
from benchmarks.soak_numbers import soak_numbers

Part = Callable[[pathlib.Path, float], dict[str, Any]]


def _on_rig(run: Callable[[soak_faults.Rig, int], dict], count: int) -> Part:
    def part(folder: pathlib.Path, scale: float) -> dict[str, Any]:
        with soak_faults.Rig(folder) as rig:
            return run(rig, max(1, round(scale * count)))

    return part


# Name -> what it does in a folder of its own, and how often at scale 1.
PARTS: dict[str, Part] = {
    "kills": _on_rig(soak_faults.kills, 200),
    "cold_kills": _on_rig(soak_faults.cold_kills, 10),
    "stops": _on_rig(soak_faults.stops, 50),
    "flips": _on_rig(soak_faults.flips, 500),
    "fallbacks": _on_rig(soak_faults.fallbacks, 10),
    "full_disks": _on_rig(lambda rig, _: soak_faults.full_disks(rig), 1),
    "input": lambda _, scale: soak_input.run(*(round(n * scale) for n in (5000, 10_000, 3000))),
    "numbers": lambda folder, scale: soak_numbers(folder, round(1000 * scale)),
    "digests": lambda folder, scale: soak_faults.digest_cost(folder, round(256 * scale)),
}


def main() -> None:
    """Runs the parts and adds what they show to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts; default 1")
    parser.add_argument("--no-save", action="store_true", help="only print")
    arguments = parser.parse_args()
    path = duel.RESULTS / "soak.json"
    found = json.loads(path.read_text())["parts"] if path.exists() else {}
    for name in arguments.only:
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f"soak-{name}-"))
        began = time.perf_counter()
        told = PARTS[name](folder, arguments.scale)
        told["total_seconds"] = round(time.perf_counter() - began, 1)
        shutil.rmtree(folder)
        print(f"{name}: {json.dumps(told)}", file=sys.stderr, flush=True)
        if not arguments.no_save:  # after each: what takes long is not lost with what comes next
            found[name] = {**told, "scale": arguments.scale, "versions": _versions()}
            duel.save("soak", {"parts": found})


def _versions() -> dict[str, str]:
    from importlib import metadata

    packages = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}


if __name__ == "__main__":
    main()
