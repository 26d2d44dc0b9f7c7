"""How fast a model's folder becomes parameters on eight devices, beside a plain read of its files.

    python -m benchmarks.loading --save loading_cpu              # makes 1.1 GB of weights
    python -m benchmarks.loading --model FOLDER                  # of a folder of one's own
    python -m benchmarks.loading --against PATH                  # of a checkout of before, in turn

Devices are the CPU's virtual ones, of one process or spread over several. Each form runs once a
round, with the files' pages dropped before ("cold") and then once more ("warm"); the plain read of
that round is its baseline. `asked` are the bytes of a process's own slices, each counted once,
`read` what the kernel fetched from the disk for it (/proc/self/io): where they exceed what was
asked, pages hold other slices too. Where each process has a folder of its own, as hosts have, no
other fills the system's cache for it.
"""

import argparse
import concurrent.futures
import functools
import json
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
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
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
        "plain": lambda: _plain(files, 1),
        f"plain, {THREADS} threads": lambda: _plain(files, THREADS),
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
            _drop([file for copy in copies for file in sorted(copy.glob("*.safetensors"))])
            for state in ("cold", "warm"):
                runs[name][state].append(run())
                print(name, state, json.dumps(runs[name][state][-1]), flush=True)
    rows = {}
    for name, states in runs.items():
        for state, found in states.items():
            plain = [one["seconds"] for one in runs["plain"][state]]
            seconds = [one["seconds"] for one in found]
            middle = statistics.median(seconds)
            rows[f"{name}, {state}"] = {
                "seconds": middle,
                "gb_per_second": size / middle / 1e9,
                "over_plain": duel.ratio(seconds, plain),
                "asked_mb": [round(count / 1e6, 1) for count in found[-1]["asked"]],
                "read_mb": [round(count / 1e6, 1) for count in found[-1]["read"]],
            }
    return {"bytes": size, "rounds": rounds, "load": os.getloadavg()[0], "forms": rows}


def _drop(files: list[pathlib.Path]) -> None:
    """Gives the pages of the files back: the next reading comes from the disk."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _plain(files: list[pathlib.Path], threads: int) -> dict[str, Any]:
    """Every byte once, in order, into buffers that are used again."""
    before, began = _read_bytes(), time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            number, size = stream.fileno(), file.stat().st_size
            buffers = [bytearray(BLOCK) for _ in range(threads)]

            def part(one: int, number: int = number, size: int = size) -> None:
                for start in range(one * BLOCK, size, threads * BLOCK):
                    os.preadv(number, [buffers[one]], start)  # noqa: B023

            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                list(pool.map(part, range(threads)))
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in files)
    return {"seconds": seconds, "asked": [size], "read": [_read_bytes() - before]}


def _loaded(
    root: pathlib.Path, folders: list[pathlib.Path], mesh: dict[str, int]
) -> dict[str, Any]:
    """One loading by a process for each folder: the slowest one's time, and the bytes of each."""
    from jaxdistill.cli import launch

    port, count = launch._free_port(), len(folders)
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", str(folder), json.dumps(mesh)],
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
        "asked": [one["asked"] for one in said],
        "read": [one["read"] for one in said],
    }


def _child(folder: str, mesh: str) -> None:
    """One process: loads once all are ready, and tells what it took."""
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
    multihost_utils.sync_global_devices("ready")
    before, began = _read_bytes(), time.perf_counter()
    params = models.load(folder, mesh=devices, tokenizer=False).params
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    read = _read_bytes() - before
    multihost_utils.sync_global_devices("done")
    print(json.dumps({"seconds": seconds, "asked": _asked(params), "read": read}), flush=True)


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
