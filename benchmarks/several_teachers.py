"""Two teachers, each of one kind of text: routed, beside each alone, and beside their average.

    python -m benchmarks.several_teachers --save several_teachers

All models are tiny, begin at random and read bytes. One teacher learned the manual of Python, the
other the docstrings of its library, by cross-entropy. Four students begin alike and see the same
text of both in the same steps, without labels: each text taught by its own teacher (routed), all of
it by one teacher, or by the mean of both teachers' log-probabilities. What is measured is the
cross-entropy of held-out text, in nats per byte, of each kind.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
from typing import Any

from benchmarks import duel

PARTS = ("manual", "library")
KINDS = ("routed", "manual alone", "library alone", "average")
TEACHER = "random: {layers: 2, embed: 96, mlp: 256, heads: 4, kv_heads: 2}"
STUDENT = (
    "{random: {layers: 1, embed: 96, mlp: 256, heads: 4, kv_heads: 2}, compute_dtype: float32}"
)
BASE = """
run: {name: run, dir: none}
student: {random: {layers: 1, embed: 8, mlp: 8, heads: 1}}
tokenizer: {from: bytes}
data: {train: [{path: "python:docs?split=train"}], eval: [{path: "python:docs?split=held_out"}]}
method: {name: sft}
optimizer: {lr: 3e-3, schedule: cosine, warmup: 0.1}
train: {steps: 1, batch_size: 16, eval_every: null, log_every: 1000}
checkpoint: {every: {steps: null, minutes: 60}, keep: {latest: 1}}
eval: {samples: 0, max_rows: 128}
logging: {progress: none, tensorboard: false}
mesh: {data: 1, fsdp: 1}
"""


def main() -> None:
    """Trains and measures seed after seed, saves after each, and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(options.seeds):
            measured = _seed(seed, pathlib.Path(name), options)
            for model, of in measured.items():
                found.setdefault(model, {})[str(seed)] = of
            print(json.dumps({"seed": seed, **measured}), flush=True)
            if options.save:
                duel.save(options.save, _result(found, options))
    print(json.dumps(_result(found, options), indent=1))


def _result(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Means over seeds, and every seed."""
    means = {
        model: {
            part: round(statistics.mean(each[part] for each in seeds.values()), 4)
            for part in (*PARTS, "both")
        }
        for model, seeds in found.items()
    }
    said = {name: getattr(options, name) for name in ("teacher_steps", "steps", "length")}
    return {**said, "batch": 16, "mean nats per byte": means, "seeds": found}


def _loaded(seed: int, folder: pathlib.Path, options: argparse.Namespace, *more: str) -> Any:
    from jaxdistill import config

    common = (f"seed={seed}", f"data.seq_len={options.length}", f"data.cache_dir={folder}/data")
    return config.loads(BASE, "base", [*common, *more])


def _seed(seed: int, folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Of each model its cross-entropy on held-out text of each part, and of both."""
    from jaxdistill import api
    from jaxdistill.evaluate.held_out import HeldOut
    from jaxdistill.run import participants, setup, start

    sources = []
    for number, part in enumerate(PARTS):
        run = folder / f"{part}-{seed}"
        split = lambda name, part=part: f'[{{path: "python:docs?split={name}&part={part}"}}]'
        loaded = _loaded(
            1000 + 10 * seed + number, folder, options, f"run={{name: {part}, dir: {run}}}",
            f"student={{{TEACHER}, compute_dtype: float32}}", f"data.train={split('train')}",
            f"data.eval={split('held_out')}", f"train.steps={options.teacher_steps}",
        )  # fmt: skip
        api.train(loaded)
        sources.append(f"{part}: {{source: {run}@latest, dtype: float32}}")
    split = lambda name: ", ".join(
        f'{{path: "python:docs?split={name}&part={part}", teacher: {part}}}' for part in PARTS
    )
    loaded = _loaded(
        seed, folder, options, f"student={STUDENT}", f"teachers={{{', '.join(sources)}}}",
        f"data.train=[{split('train')}]", f"data.eval=[{split('held_out')}]",
        "method={name: kd, alpha: 0.0}", f"train.steps={options.steps}", "train.micro_batches=4",
    )  # fmt: skip
    mesh = setup.mesh_of(loaded)
    inputs = start.read(loaded, mesh)
    models = participants.load_models(loaded, inputs.models, mesh)
    held_out = HeldOut(inputs.data["eval"], 16, loaded.eval.max_rows, mesh, "held out")
    found = {
        f"teacher of the {part}": _measured(
            models.teaching.each[part].model, held_out, models.vocab
        )
        for part in PARTS
    }
    for kind in KINDS:
        student = _taught(kind, loaded, models, inputs.data["train"], mesh)
        found[kind] = _measured(student, held_out, models.vocab)
    return found


def _measured(model: Any, held_out: Any, vocab: int) -> dict[str, float]:
    """Nats per byte of held-out text."""
    from jaxdistill.evaluate import meter

    step = meter.scoring_step(model.config, vocab, compute_dtype="float32")
    of = {name: part.measure(step, model.params) for name, part in held_out.by_teacher.items()}
    of["both"] = held_out.measure(step, model.params)
    return {name: round(metrics["eval/ce"], 4) for name, metrics in of.items()}


def _taught(kind: str, loaded: Any, models: Any, dataset: Any, mesh: Any) -> Any:
    """A student after its steps, by one program for each kind of teacher."""
    import dataclasses

    from jaxdistill import teachers
    from jaxdistill.config import routing
    from jaxdistill.data.feed import CorpusFeed
    from jaxdistill.run import participants, setup, states
    from jaxdistill.train import step as steps

    method = setup.method_of(loaded, models)
    lies, signal, params = routing.layout(loaded), method.teacher, models.teaching.params
    if kind != "routed":
        lies, names = None, PARTS if kind == "average" else (kind.split(" ")[0],)
        asked = [
            teachers.online(models.teaching.each[name].model.config, compute_dtype="float32")
            for name in names
        ]
        params = [params[name] for name in names]
        signal = lambda given, state, batch: _mean(
            [one(its, state, batch) for one, its in zip(asked, given, strict=True)]
        )
    student = participants.student_of(loaded, models.student, None, mesh)
    state = states.create(loaded, student, method.objective, method.tx, mesh)
    size = loaded.train.batch_size
    parts = loaded.train.micro_batches if lies is None else lies.parts
    feed = CorpusFeed(dataset, batch_size=size, seed=loaded.seed, left_out=lambda: [], layout=lies)
    pure = steps.make(method.loss, signal, method.tx, micro_batches=parts)
    program = steps.PerShape(lambda *given: steps.compiled(pure, *given, mesh))
    row = 0
    for _ in range(loaded.train.steps):
        span, batch = feed.next(row, state)
        state, _ = program(state, params, steps.place(batch, mesh))
        row = span.end_row
    return dataclasses.replace(models.student, params=state.params["student"])


def _mean(signals: list[Any]) -> Any:
    """Whole rows whose logits are the mean of the given ones': a product of experts."""
    import jax.numpy as jnp

    from jaxdistill.types import Outputs, TeacherSignal

    outputs = [one.outputs for one in signals]
    hidden = jnp.concatenate([one.hidden for one in outputs], axis=-1)
    head = jnp.concatenate([one.head / len(outputs) for one in outputs], axis=-1)
    return TeacherSignal(Outputs(hidden, head))


if __name__ == "__main__":
    main()
