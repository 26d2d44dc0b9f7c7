"""How fast a model's folder becomes parameters on eight devices, beside a plain read of its files.

    python -m benchmarks.loading --save loading_cpu              # makes 1.1 GB of weights
    python -m benchmarks.loading --model FOLDER                  # of a folder of one's own
    python -m benchmarks.loading --against PATH                  # of a checkout of before, in turn

Devices are the CPU's virtual ones, of one process or spread over several. Each form runs once a
round, with the files' pages dropped before ("cold") and then once more ("warm"); the plain read of
that round is its baseline. A plain read uses its buffers again, or has new memory for every byte,
as parameters need it: the system clears each page before it gives it. `asked` are the bytes of a
process's own slices, each counted once, `read` what the kernel fetched from the disk for it
(/proc/self/io): where they exceed what was asked, pages hold other slices too. Where each process
has a folder of its own, as hosts have, no other fills the system's cache for it. `again` is another
loading by the same process, pages dropped likewise: its programs are compiled, and the memory that
the first one gave back is not cleared.
"""

import argparse
import concurrent.futures
import functools
import json
import mmap
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import duel

DEVICES, BLOCK, THREADS = 8, 2**23, 8
# Layers of Llama-3.1-8B's shape; 1.1 GB in bfloat16.
SHAPE = {"layers": 2, "embed": 4096, "mlp": 14336, "heads": 32, "kv_heads": 8, "vocab_size": 32768}
MESHES = {"fsdp 8": {"fsdp": 8}}
PROCESSES = (1, 4)
ROOT = pathlib.Path(__file__).parents[1]


def main() -> None:
    """Loads in every form, in turn; --child is one process of a loading."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--against", type=pathlib.Path, help="a checkout of before")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child(*options.child)
    with tempfile.TemporaryDirectory() as name:
        folder = options.model or _made(pathlib.Path(name) / "model")
        copies = [folder]
        for number in range(1, PROCESSES[-1]):
            copies.append(pathlib.Path(name) / f"copy{number}")
            shutil.copytree(folder, copies[-1])
        os.sync()
        result = _measured(copies, options.rounds, options.against)
    print(json.dumps(result, indent=1))
    if options.save:
        print(duel.save(options.save, result))
    return None


def _made(folder: pathlib.Path) -> pathlib.Path:
    """A folder with random weights, written by a process of its own."""
    text = (
        "import sys; from jaxdistill import models; "
        f"config = models.DecoderConfig('llama', tied_head=True, head_dim=128, **{SHAPE}); "
        "models.save(models.random(config, dtype='bfloat16'), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", text, str(folder)], check=True)
    (folder / "jaxdistill.json").unlink()  # as others write it: no sums to read everything for
    os.sync()
    return folder


def _measured(
    copies: list[pathlib.Path], rounds: int, against: pathlib.Path | None
) -> dict[str, Any]:
    """Every form in turn; `copies` are one folder as several hosts have it."""
    files = sorted(copies[0].glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    forms = {
        "plain": lambda cold: _plain(files, 1),
        f"plain, {THREADS} threads": lambda cold: _plain(files, THREADS),
        "plain, into new memory": lambda cold: _plain(files, 1, keep=True),
    }
    checkouts = {"": ROOT} | ({} if against is None else {"before: ": against.resolve()})
    for mesh, sizes in MESHES.items():
        for before, root in checkouts.items():
            for count in PROCESSES:
                name = f"{before}{mesh}; {count} x {DEVICES // count} devices"
                shared = [copies[0]] * count
                forms[name] = functools.partial(_loaded, root, shared, sizes)
            name += ", each with a folder of its own"
            forms[name] = functools.partial(_loaded, root, copies, sizes)
    runs: dict[str, dict[str, list]] = {name: {"cold": [], "warm": []} for name in forms}
    for _ in range(rounds):
        for name, run in forms.items():
            _drop(copies)
            for state in ("cold", "warm"):
                runs[name][state].append(run(state == "cold"))
                print(name, state, json.dumps(runs[name][state][-1]), flush=True)
    rows = {}
    for name, states in runs.items():
        for state, found in states.items():
            plain = [one["seconds"] for one in runs["plain"][state]]
            seconds = [one["seconds"] for one in found]
            middle = statistics.median(seconds)
            again = "again" in found[0]
            rows[f"{name}, {state}"] = {
                "seconds": middle,
                "gb_per_second": size / middle / 1e9,
                "over_plain": duel.ratio(seconds, plain),
                **({"again": statistics.median(one["again"] for one in found)} if again else {}),
                "asked_mb": [round(count / 1e6, 1) for count in found[-1]["asked"]],
                "read_mb": [round(count / 1e6, 1) for count in found[-1]["read"]],
            }
    return {"bytes": size, "rounds": rounds, "load": os.getloadavg()[0], "forms": rows}


def _drop(folders: list[pathlib.Path]) -> None:
    """Gives the pages of their tensors back: the next reading comes from the disk."""
    for file in (file for folder in folders for file in folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _plain(files: list[pathlib.Path], threads: int, keep: bool = False) -> dict[str, Any]:
    """Every byte once, in order, into buffers that are used again, or else into new memory."""
    before, began = _read_bytes(), time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            number, size = stream.fileno(), file.stat().st_size
            step = size if keep else BLOCK
            buffers = [mmap.mmap(-1, step) for _ in range(threads)]

            def part(one: int, number: int = number, size: int = size, step: int = step) -> None:
                for start in range(one * step, size, threads * step):
                    _whole(number, memoryview(buffers[one])[: size - start], start)  # noqa: B023

            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                list(pool.map(part, range(threads)))
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in files)
    return {"seconds": seconds, "asked": [size], "read": [_read_bytes() - before]}


def _whole(number: int, place: memoryview, start: int) -> None:
    """Reads until the place is full: one call gives two gigabytes at most."""
    while len(place):
        read = os.preadv(number, [place], start)
        place, start = place[read:], start + read


def _loaded(
    root: pathlib.Path, folders: list[pathlib.Path], mesh: dict[str, int], cold: bool
) -> dict[str, Any]:
    """Two loadings by a process for each folder: the slowest one's times, and the bytes of each."""
    from jaxdistill.cli import launch

    port, count = launch._free_port(), len(folders)
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", str(folder), json.dumps(mesh), "cold" * cold],
            env=launch._environment(rank, count, DEVICES // count, port)
            | {"PYTHONPATH": f"{root}{os.pathsep}{ROOT}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    said = [json.loads(one.communicate()[0].splitlines()[-1]) for one in started]
    return {
        "seconds": max(one["seconds"] for one in said),
        "again": max(one["again"] for one in said),
        "asked": [one["asked"] for one in said],
        "read": [one["read"] for one in said],
    }


def _child(folder: str, mesh: str, cold: str) -> None:
    """One process: loads twice, each time when all are ready, and reports what it took."""
    os.environ.pop("JAXDISTILL_LAUNCHER", None)
    if os.environ["JAX_NUM_PROCESSES"] == "1":
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            del os.environ[name]
    import jax
    from jax.experimental import multihost_utils

    from jaxdistill import models, processes
    from jaxdistill.sharding import make_mesh

    processes.start()
    devices = make_mesh(**json.loads(mesh))
    found: dict[str, float] = {}
    for name in ("seconds", "again"):
        multihost_utils.sync_global_devices(f"{name} ready")
        before, began = _read_bytes(), time.perf_counter()
        params = models.load(folder, mesh=devices, tokenizer=False).params
        jax.block_until_ready(params)
        found[name] = time.perf_counter() - began
        found.setdefault("read", _read_bytes() - before)
        found["asked"] = _asked(params)
        multihost_utils.sync_global_devices(f"{name} done")
        del params
        if cold and name == "seconds":
            _drop([pathlib.Path(folder)])
    print(json.dumps(found), flush=True)


def _asked(params: Any) -> int:
    """Bytes of this process's slices, replicas once."""
    import jax

    total = 0
    for leaf in jax.tree.leaves(params):
        slices = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        total += sum(slices.values())
    return total


def _read_bytes() -> int:
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
