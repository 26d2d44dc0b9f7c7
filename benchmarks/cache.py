"""A teacher that is asked once beside the one that runs: time, memory, bytes, and what it costs.

    python -m benchmarks.cache --save cache_times                  # on a machine that does no more
    python -m benchmarks.cache --quality --save cache_quality      # three seeds of 100 steps
    python -m benchmarks.cache --tiny                              # random models, no claim

The quickstart's models: SmolLM2-135M-Instruct and 22 of its 30 layers, on the documentation inside
the installed Python, as many documents of it as the steps read. Each form's step runs in turn with
the online one's, in one process each; memory is the high-water mark behind compilation. `--quality`
measures held-out KL to the teacher and agreement with the teacher online, whatever trained it.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

from benchmarks import duel

ROOT = pathlib.Path(__file__).resolve().parents[1]
FORMS: dict[str, dict[str, Any]] = {
    "hidden": {"format": "hidden"},
    "topk 8": {"format": "topk", "k": 8},
    "topk 64": {"format": "topk", "k": 64},
    "topk 256": {"format": "topk", "k": 256},
    "sampled 50": {"format": "sampled", "k": 50},
}
TIMED = ("hidden", "topk 64", "sampled 50")
TINY = (
    "teacher={random: {layers: 4, embed: 64, mlp: 128, heads: 4}, dtype: float32}",
    "student={random: {layers: 2, embed: 64, mlp: 128, heads: 4}, compute_dtype: float32}",
    "tokenizer.from=bytes",
)


def main() -> None:
    """Captures every form, then times or trains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quality", action="store_true", help="train and measure, do not time")
    parser.add_argument("--tiny", action="store_true", help="random models, to see that it runs")
    parser.add_argument("--documents", type=int, default=400, help="of the training text")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _worker(options.worker, options.folder, options)
    if options.tiny:
        options.documents, options.steps, options.rounds = 12, 3, 2
        options.seeds = options.seeds[:1]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _texts(folder, options.documents)
        stored = {form: _capture(form, folder, options) for form in FORMS}
        result: dict[str, Any] = {"documents": options.documents, "stored": stored}
        if options.quality:
            result["quality"] = _quality(folder, options)
        else:
            result["times"] = {form: _timed(form, folder, options) for form in TIMED}
    print(json.dumps(result, indent=1))
    if options.save:
        print(duel.save(options.save, result))
    return None


def _texts(folder: pathlib.Path, documents: int) -> None:
    """So many documents of each part of the documentation, as JSON Lines."""
    from jaxdistill.data.records import Rejected
    from jaxdistill.data.sources import open_source

    for name, split, count in (("train", "train", documents), ("eval", "held_out", 24)):
        records = []
        for record in open_source(f"python:docs?split={split}"):
            if isinstance(record, Rejected):
                continue
            records.append(json.dumps({"text": record.texts[0]}))
            if len(records) == count:
                break
        (folder / f"{name}.jsonl").write_text("\n".join(records) + "\n")


def _config(folder: pathlib.Path, options: argparse.Namespace, form: str, *more: str) -> Any:
    from jaxdistill import config

    data = [f"data.{n}=[{{path: {folder}/{n}.jsonl}}]" for n in ("train", "eval")]
    models = TINY if options.tiny else ()
    teacher = [] if form == "online" else [f"teacher.cache={folder / form.replace(' ', '')}"]
    run = ["eval.compare=false", "eval.samples=0", f"data.cache_dir={folder}/rows"]
    steps = f"train.steps={options.steps}"
    return config.load(
        ROOT / "configs" / "quickstart.yaml", [*data, *models, *run, steps, *teacher, *more]
    )


def _capture(form: str, folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Asks the teacher; seconds with compilation, and what lies on the disk."""
    from jaxdistill import api, commands
    from jaxdistill.data.teacher_cache.store import Store

    place = folder / form.replace(" ", "")
    began = time.perf_counter()
    section = commands.TeacherCache(output=str(place), **FORMS[form])
    found = api.capture(_config(folder, options, "online"), section)
    seconds = time.perf_counter() - began
    store = Store(str(place))
    began = time.perf_counter()
    for entry in range(len(store)):
        store.reading(entry)()
    read = time.perf_counter() - began
    arrays = sum(size for name, (size, _) in store.content["objects"].items() if "/c/" in name)
    return {
        "positions": found["positions"],
        "bytes_per_token_raw": found["bytes_per_token"],
        "bytes_per_token_on_disk": arrays / found["positions"],
        "captured_per_second": found["positions"] / seconds,
        "read_per_second": found["positions"] / read,
    }


def _timed(form: str, folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """The step with a stored teacher against the one with the teacher in it, in turn."""
    common = ["-m", "benchmarks.cache", "--folder", str(folder), "--steps", str(options.steps)]
    common += ["--tiny"] if options.tiny else []
    ours = duel.Worker([sys.executable, *common, "--worker", form])
    facts = {"stored": ours.read()}
    theirs = duel.Worker([sys.executable, *common, "--worker", "online"])
    facts["online"] = theirs.read()
    found = duel.duel(ours, theirs, options.rounds)
    ours.close()
    theirs.close()
    return facts | found


def _worker(form: str, folder: pathlib.Path, options: argparse.Namespace) -> None:
    """One kind of step, its batches read from the store as a run reads them."""
    import jax

    from jaxdistill.data.feed import CorpusFeed
    from jaxdistill.run import participants, setup, states, texts
    from jaxdistill.train.step import place

    config = _config(folder, options, form)
    mesh = setup.mesh_of(config)
    models = participants.shapes_of(config, mesh)
    data = texts.data_of(config.data, models.tokenizer)
    if models.stored is not None:
        data = models.stored.beside(data, models.tokenizer)
    models = participants.load_models(config, models, mesh)
    method = setup.method_of(config, models)
    state = states.create(config, models.student, method.objective, method.tx, mesh)
    params = setup.teacher_params_of(models, method)
    program = setup.compile_step(config, method, state, params, mesh)
    feed = CorpusFeed(
        data["train"], batch_size=config.train.batch_size, seed=config.seed, left_out=list
    )
    held: dict[str, Any] = {"state": state, "row": 0}
    del state, models

    def step() -> float:
        span, batch = feed.next(held["row"], None)
        held["row"] = span.end_row
        held["state"], means = program(held["state"], params, place(batch, mesh))
        jax.block_until_ready(held["state"])
        return float(means["loss/total"].value)

    losses = [step(), step()]
    memory = program.memory_analysis()
    facts = {"first_losses": losses, "temporary_mib": round(memory.temp_size_in_bytes / 2**20)}
    facts["arguments_mib"] = round(memory.argument_size_in_bytes / 2**20)
    duel.serve(step, facts)


def _quality(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out KL and agreement by what trained the student: mean and deviation over seeds."""
    from jaxdistill import api, commands

    kinds = {"online": (), "sft": ("method={name: sft}",)} | {form: () for form in FORMS}
    rows: dict[str, Any] = {}
    for kind, more in kinds.items():
        found = []
        for seed in options.seeds:
            run = folder / f"run-{kind.replace(' ', '')}-{seed}"
            form = "online" if kind in ("online", "sft") else kind
            own = (f"run.dir={run}", f"seed={seed}", "train.eval_every=null")
            api.train(_config(folder, options, form, *own, *more))
            if options.tiny:
                continue  # a random teacher is no model that `eval` could name
            section = commands.Evaluate(
                data=(str(folder / "eval.jsonl"),),
                teacher=_config(folder, options, "online").teacher.source,
                seq_len=128,
            )
            found.append(api.evaluate(f"{run}@latest", section))
        keys = {"kl": "eval/kl_t1", "agreement": "eval/agree_top1", "ece": "eval/ece"}
        rows[kind] = {
            name: {
                "mean": statistics.mean(one[key] for one in found),
                "deviation": statistics.stdev(one[key] for one in found) if found[1:] else 0.0,
            }
            for name, key in keys.items()
            if found
        }
        print(kind, rows[kind], flush=True)
    return rows


if __name__ == "__main__":
    main()
