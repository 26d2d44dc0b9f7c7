"""A teacher that is asked once beside the one that runs: time, memory, bytes, and what it costs.

    python -m benchmarks.cache --save cache_smollm2                # times, memory, bytes
    python -m benchmarks.cache --quality --save cache_quality      # three seeds of 100 steps
    python -m benchmarks.cache --draws --save cache_draws          # 200,000 draws against p
    python -m benchmarks.cache --plan tpu:v5e:4x4 tpu:v5p:2x2x4 --save cache_plan
    python -m benchmarks.cache --tiny                              # random models, no claim

The quickstart's models, SmolLM2-135M-Instruct and 22 of its 30 layers, learn the beginnings of
documents inside the installed Python. Each form's step runs in turn with the online one's, in one
process each; memory is the high-water mark behind compilation. `--quality` trains students by the
divergence alone and measures held-out KL to the teacher and agreement with the teacher online,
whatever trained them: 2 of the 4 layers of a teacher of 2,048 tokens that is made here, or with
`--smollm2` 8 of SmolLM2's 30 layers.
`--plan` compiles the step of an 8B teacher and a 1B student for devices that are described.
"""

import argparse
import json
import os
import pathlib
import shutil
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
KEYS = {"kl": "eval/kl_t1", "agreement": "eval/agree_top1", "ce": "eval/ce", "ece": "eval/ece"}
KEPT = 1600  # characters of a document: about three rows
# Of --quality: so small that 21 trainings take minutes.
SMALL_VOCAB, SMALL_TEXTS = 2048, {"documents": 250, "characters": 3200}
SMALL_TEACHER = """
version: 1
seed: 1
run: {{name: teacher, dir: '{folder}/teacher'}}
student:
  random: {{layers: 4, embed: 128, mlp: 384, heads: 4, initializer_range: 0.09}}
  compute_dtype: float32
tokenizer: {{from: '{folder}/tokenizer'}}
data: {{train: [{{path: '{folder}/train.jsonl'}}], eval: [{{path: '{folder}/eval.jsonl'}}],
       seq_len: 128, cache_dir: '{folder}/rows'}}
method: {{name: sft}}
optimizer: {{lr: 4e-3, schedule: cosine, warmup: 20, weight_decay: 0.01}}
train: {{steps: 500, batch_size: 16, eval_every: null, log_every: 50}}
checkpoint: {{every: {{steps: null, minutes: 1000}}, keep: {{latest: 1, best: 1}}}}
eval: {{compare: false, samples: 0}}
"""
SMALL = ("student.layers=[0, 3]", "train.batch_size=8", "method.alpha=0.0", "optimizer.lr=2e-3")
SMOLLM2 = ("student.layers=[0, 1, 2, 3, 26, 27, 28, 29]", "train.batch_size=2", "method.alpha=0.0")
TINY = (
    "teacher={random: {layers: 4, embed: 64, mlp: 128, heads: 4}, dtype: float32}",
    "student={random: {layers: 2, embed: 64, mlp: 128, heads: 4}, compute_dtype: float32}",
    "tokenizer.from=bytes",
)


def main() -> None:
    """Captures every form, then times or trains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--quality", action="store_true", help="train and measure, do not time")
    kinds.add_argument("--draws", action="store_true", help="compare draws with probabilities")
    kinds.add_argument("--plan", nargs="+", metavar="TARGET", help="compile the step, run nothing")
    parser.add_argument("--smollm2", action="store_true", help="of --quality: SmolLM2 teaches")
    parser.add_argument("--tiny", action="store_true", help="random models, to see that it runs")
    parser.add_argument("--documents", type=int, default=70, help="of the training text")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help="keep, and take, stores here")
    options = parser.parse_args()
    if options.worker:
        return _worker(options.worker, options.folder, options)
    if options.tiny:
        options.documents, options.steps, options.rounds = 4, 3, 2
        options.seeds = options.seeds[:1]
    if options.draws:
        return _keep(options, _draws())
    if options.plan:
        return _keep(options, {target: _planned(target) for target in options.plan})
    with tempfile.TemporaryDirectory() as name:
        _measure(options.folder or pathlib.Path(name), options)
    return None


def _measure(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Captures what is not there yet, then times or trains."""
    small = options.quality and not (options.smollm2 or options.tiny)
    if small:
        texts(folder, **SMALL_TEXTS)
        _make_teacher(folder)
    else:
        texts(folder, options.documents)
    result: dict[str, Any] = {"documents": options.documents, "stored": {}}
    result["load_before"] = os.getloadavg()
    for form in FORMS if options.quality else TIMED:
        result["stored"][form] = _capture(form, folder, options)
        _keep(options, result)
    if options.quality:
        return _quality(folder, options, result)
    result["times"] = {}
    for form in TIMED:
        result["times"][form] = _timed(form, folder, options)
        _keep(options, result)
    return None


def _keep(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Prints what was found so far, and saves it: what is cut short has left that much."""
    print(json.dumps(result, indent=1), flush=True)
    if options.save:
        print(duel.save(options.save, result), flush=True)


def _make_teacher(folder: pathlib.Path) -> None:
    """A tokenizer of the texts, and a teacher that read them."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from jaxdistill import api, config

    if (folder / "teacher").exists():
        return
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").open()]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SMALL_VOCAB,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.save_pretrained(folder / "tokenizer")
    api.train(config.loads(SMALL_TEACHER.format(folder=folder)))


def texts(folder: pathlib.Path, documents: int, characters: int = KEPT) -> None:
    """The beginnings of so many documents of each part of the documentation, as JSON Lines."""
    from jaxdistill.data.records import Rejected
    from jaxdistill.data.sources import open_source

    for name, split, count in (("train", "train", documents), ("eval", "held_out", 8)):
        records = []
        for record in open_source(f"python:docs?split={split}"):
            if isinstance(record, Rejected):
                continue
            records.append(json.dumps({"text": record.texts[0][:characters]}))
            if len(records) == count:
                break
        (folder / f"{name}.jsonl").write_text("\n".join(records) + "\n")


def _config(folder: pathlib.Path, options: argparse.Namespace, form: str, *more: str) -> Any:
    from jaxdistill import config

    data = [f"data.{n}=[{{path: {folder}/{n}.jsonl}}]" for n in ("train", "eval")]
    models: tuple[str, ...] = TINY if options.tiny else ()
    if options.quality and not options.tiny:
        source = (f"teacher.source={folder}/teacher@latest", *SMALL)
        models = SMOLLM2 if options.smollm2 else source
    teacher = [] if form == "online" else [f"teacher.cache={folder / form.replace(' ', '')}"]
    run = ["eval.compare=false", "eval.samples=0", f"data.cache_dir={folder}/rows"]
    steps = f"train.steps={options.steps}"
    return config.load(
        ROOT / "configs" / "quickstart.yaml", [*data, *models, *run, steps, *teacher, *more]
    )


def _capture(form: str, folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Asks the teacher, loading and compiling it too; and what lies on the disk."""
    from jaxdistill import api, commands
    from jaxdistill.data.teacher_cache import catalog
    from jaxdistill.data.teacher_cache.store import Store

    place = folder / form.replace(" ", "")
    note = place.with_suffix(".seconds")
    if not note.exists():
        began = time.perf_counter()
        section = commands.TeacherCache(output=str(place), **FORMS[form])
        api.capture(_config(folder, options, "online"), section)
        note.write_text(f"{time.perf_counter() - began}")
    store = Store(str(place))
    began = time.perf_counter()
    for entry in range(len(store)):
        store.reading(entry)()
    read = time.perf_counter() - began
    sizes = {name: size for name, (size, _) in store.content["objects"].items()}
    arrays = sum(size for name, size in sizes.items() if not name.startswith(catalog.TEACHER))
    positions = store.content["rows"]
    return {
        "positions": positions,
        "bytes_per_token_raw": store.format.bytes_per_token(),
        "bytes_per_token_on_disk": arrays / positions,
        "teacher_bytes": sum(sizes.values()) - arrays,
        "captured_per_second": positions / float(note.read_text()),
        "read_per_second": positions / read,
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
    data = models.teaching.beside(data, models.tokenizer)
    models = participants.load_models(config, models, mesh)
    method = setup.method_of(config, models)
    state = states.create(config, models.student, method.objective, method.tx, mesh)
    params = method.asked.params
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


def _quality(folder: pathlib.Path, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Held-out KL and agreement by what trained the student: mean and deviation over seeds."""
    from jaxdistill import api, commands

    measured: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for kind in ("online", "sft", *FORMS):
            run = folder / f"run-{kind.replace(' ', '')}-{seed}"
            more = [f"run.dir={run}", f"seed={seed}", "train.eval_every=null"]
            if kind == "sft":
                more += ["method={name: sft}"]
            config = _config(folder, options, "online" if kind == "sft" else kind, *more)
            api.train(config)
            if options.tiny:
                continue  # a random teacher is no model that `eval` could name
            section = commands.Evaluate(
                data=(str(folder / "eval.jsonl"),), teacher=config.teacher.source, seq_len=128
            )
            found = api.evaluate(f"{run}@latest", section)
            measured.setdefault(kind, []).append({name: found[key] for name, key in KEYS.items()})
            shutil.rmtree(run)
            result["seeds"], result["quality"] = options.seeds, _spread(measured)
            result["each"] = measured
            _keep(options, result)


def _spread(measured: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds that are there."""
    deviation = lambda values: statistics.stdev(values) if len(values) > 1 else None
    return {
        kind: {
            name: {
                "mean": statistics.mean(one[name] for one in found),
                "deviation": deviation([one[name] for one in found]),
                "seeds": len(found),
            }
            for name in KEYS
        }
        for kind, found in measured.items()
    }


def _draws(count: int = 200_000) -> dict[str, Any]:
    """How far draws as they are stored are from the distribution, in standard deviations.

    A share c/N of N draws has the standard deviation sqrt(p (1 - p) / N). The loss is the mean of
    -log q over the draws, and its gradient by the logits is q - c/N: both are compared with their
    values of p itself, in float64.
    """
    import jax.numpy as jnp
    import numpy as np

    from jaxdistill.data.teacher_cache import formats
    from jaxdistill.evaluate import answers_to_store
    from jaxdistill.types import Outputs

    random = np.random.default_rng(0)
    four = np.log([0.187969, 0.510952, 0.093342, 0.207737])
    result: dict[str, Any] = {"draws": count}
    for name, logits in {
        "4 tokens": four,
        "49,152 tokens": 2.5 * random.normal(size=49_152),
    }.items():
        vocab = len(logits)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        q = np.exp(0.7 * logits - (0.7 * logits).max())
        q /= q.sum()
        # N of a position is bounded: as many positions of one distribution as it takes.
        rows, each = (count // 50_000, 50_000)
        form = formats.choose("sampled", vocab=vocab, embed=1, k=each, seed=1)
        outputs = Outputs(
            jnp.ones((1, rows, 1), jnp.float32), jnp.asarray(logits[:, None], jnp.float32)
        )
        found = answers_to_store.of_outputs(
            form,
            outputs,
            jnp.arange(rows, dtype=jnp.int32)[None],
            jnp.full((1, rows), 7, jnp.uint32),
        )
        flat = {key: np.asarray(a).reshape(rows, *a.shape[2:]) for key, a in found.items()}
        stored = answers_to_store.finish(form, flat)
        drawn = np.zeros(vocab, np.int64)
        np.add.at(drawn, formats.unpack_ids(stored["ids"]).ravel(), stored["counts"].ravel())
        share, sigma = drawn / count, np.sqrt(p * (1 - p) / count)
        usual = count * p >= 10
        rare = {"share": share[~usual].sum(), "mass": p[~usual].sum()}
        loss, exact = -(share * np.log(q)).sum(), -(p * np.log(q)).sum()
        spread = np.sqrt(((p * np.log(q) ** 2).sum() - exact**2) / count)
        off = np.abs(share - p) / sigma
        result[name] = {
            "all_counted": bool(drawn.sum() == count),
            "compared_alone": int(usual.sum()),
            "beyond_3_sigma": float((off[usual] > 3).mean()),
            "most_sigma": float(off[usual].max()),
            "chi_square_per_token": float((off[usual] ** 2).mean()),
            "rare_sigma": float(abs(rare["share"] - rare["mass"]) / np.sqrt(rare["mass"] / count))
            if rare["mass"]
            else 0.0,
            "loss": float(loss),
            "loss_of_p": float(exact),
            "loss_sigma": float(abs(loss - exact) / spread),
            "shares": [float(x) for x in share] if vocab == 4 else None,
        }
    return result


def _planned(target: str) -> dict[str, Any]:
    """The step of Llama-3.1-8B to 1B with its teacher in it, and with what each format stores."""
    from jaxdistill import config
    from jaxdistill.plan import search

    file, plain = ROOT / "configs" / "plan_llama3_8b_to_1b.yaml", "method.temperature=1.0"
    online = config.load(file, [plain])
    plans = {"online": search.plan(online, target)}
    with tempfile.TemporaryDirectory() as folder:
        for form in TIMED:
            place = f"{folder}/{form.replace(' ', '')}"
            _empty(place, online, FORMS[form])
            plans[form] = search.plan(config.load(file, [plain, f"teacher.cache={place}"]), target)
    result = {}
    for name, plan in plans.items():
        told = {
            "floor_ms": 1e3 * plan["floor_seconds"],
            "flops": plan["flops"],
            "teacher_mib": plan["memory"]["arguments"]["teacher"] / 2**20,
            "total_gib": plan["memory"]["total"] / 2**30,
        }
        for key in ("floor_seconds", "flops"):
            told[f"{key}_ratio"] = plan[key] / plans["online"][key]
        result[name] = told
        print(target, name, told, flush=True)
    return result


def _empty(place: str, online: Any, asked: dict[str, Any]) -> None:
    """A stored teacher that nobody asked anything yet, so that a step can be compiled for it."""
    from jaxdistill.data.teacher_cache import catalog, formats
    from jaxdistill.data.teacher_cache.objects import Objects
    from jaxdistill.run import participants, shapes, stored

    given = participants.given_of(online)
    teacher, student = shapes.of(given)
    tokenizer = shapes.named_tokenizer(given, {"teacher": teacher, "student": student})
    vocab, teacher = (
        shapes.vocabulary(online.tokenizer, tokenizer),
        shapes.ended(teacher, tokenizer),
    )
    chosen = {("name" if key == "format" else key): value for key, value in asked.items()}
    form = formats.choose(**chosen, vocab=vocab, embed=teacher.config.embed)
    identity = {
        **stored.words(tokenizer, vocab),
        **stored.whose(online.teacher, teacher.config),
        "format": form.facts(),
    }
    objects = Objects(place)
    catalog.begin(objects, identity, {})
    catalog.seal(objects)


if __name__ == "__main__":
    main()
