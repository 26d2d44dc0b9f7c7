"""A teacher with another tokenizer: ALM beside SFT and sequence-level KD, at equal steps.

    python -m benchmarks.cross_tokenizer --save cross_tokenizer      # or a part of it:
    python -m benchmarks.cross_tokenizer --student words --seeds 1

SmolLM2-135M-Instruct teaches a student that is cut out of it, 4 of its 30 layers, and reads other
tokens: bytes, or 2,000 that were trained on the source code of Python's library. Rows of new tokens
are means of the old rows that spell them. All learn from the documentation inside Python, but for
sequence-level KD, which learns what the teacher writes behind the beginnings of the same documents.
Bits per byte, and how often the likeliest token is the next one, are of held-out documents, read by
one program. A seed is another order of the rows. Methods share their starts and their programs over
seeds. What was saved of other students stays.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import duel

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = [0, 1, 28, 29]
LENGTHS = {"bytes": (256, 96), "words": (96, 96)}  # of rows, student and teacher
METHODS = {
    "sft": "{name: sft}",
    "sequence_kd": "{name: sft}",
    "alm": "{name: alm, alpha: 0.5, teacher_seq_len: %d}",
}
SAID = ("steps", "batch", "rows", "answers")


def main() -> None:
    """Trains them one after the other, saves after each, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", nargs="*", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48, help="held-out rows")
    parser.add_argument("--answers", type=int, default=64, help="that the teacher writes")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json, or add to it")
    options = parser.parse_args()
    said = {"layers": LAYERS, **{name: getattr(options, name) for name in SAID}}
    file = duel.RESULTS / f"{options.save}.json"
    saved = json.loads(file.read_text()) if file.exists() else {}
    kept = all(saved.get(name) == value for name, value in said.items())
    students = saved["students"] if kept else {}
    with tempfile.TemporaryDirectory() as name:
        for student in options.student:
            students[student] = {}
            for method in METHODS:
                for who, seed, found in _measured(student, method, pathlib.Path(name), options):
                    students[student].setdefault(who, {})[str(seed)] = found
                    print(student, who, seed, found, flush=True)
                    if options.save:
                        duel.save(options.save, _result(students, said))
    print(json.dumps(_result(students, said), indent=1))


def _result(students: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds, and every seed."""
    mean = lambda seeds, name: round(statistics.mean(one[name] for one in seeds.values()), 4)
    middle = {
        f"{student}, {method}": {name: mean(seeds, name) for name in ("bits_per_byte", "accuracy")}
        for student, methods in students.items()
        for method, seeds in methods.items()
    }
    return {**said, "means": middle, "students": students}


def _measured(
    student: str, method: str, folder: pathlib.Path, options: argparse.Namespace
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(method, seed, what is measured after it) of a student; before the first method of it too."""
    from jaxdistill.data.feed import CorpusFeed
    from jaxdistill.evaluate.held_out import HeldOut
    from jaxdistill.run import participants, setup, start, states
    from jaxdistill.train import step as steps

    loaded = _loaded(student, method, folder, options)
    mesh = setup.mesh_of(loaded)
    inputs = start.read(loaded, mesh)
    models = participants.load_models(loaded, inputs.models, mesh)
    built = setup.method_of(loaded, models)
    held_out = HeldOut(inputs.data["eval"], options.batch, options.rows, mesh, "held out")
    score = _scorer(models, held_out)
    if method == next(iter(METHODS)):
        yield "before", 0, score(models.student.params)
    given, program = built.asked.params, None
    for seed in range(options.seeds):
        fresh = dataclasses.replace(models.student, params=_copied(models.student.params))
        state = states.create(loaded, fresh, built.objective, built.tx, mesh)
        if program is None:
            program = setup.compile_step(loaded, built, state, given, mesh, check_kernels=False)
        feed = CorpusFeed(inputs.taught["train"], batch_size=options.batch, seed=seed,
                          left_out=list)  # fmt: skip
        row, began = 0, time.perf_counter()
        for _ in range(options.steps):
            span, batch = feed.next(row, state)
            state, _ = program(state, given, steps.place(batch, mesh))
            row = span.end_row
        found = score(state.params["student"])
        yield method, seed, found | {"seconds": round(time.perf_counter() - began, 1)}


def _copied(params: Any) -> Any:
    """The same weights once more, as a step takes its own over."""
    import jax
    import jax.numpy as jnp

    return jax.tree.map(jnp.copy, params)


def _scorer(models: Any, held_out: Any) -> Callable[[Any], dict[str, float]]:
    """parameters -> bits per byte and the share of next tokens that are the likeliest."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.models import decoder

    size, shape = held_out.text_bytes(models.tokenizer), models.student.config

    @jax.jit
    def read(params, batch):
        outputs = decoder.apply(
            shape, params, batch.tokens, batch.positions, batch.segment_ids, compute_dtype="float32"
        )
        scores = decoder.logits(outputs)[..., : models.vocab]
        picked = jnp.take_along_axis(jax.nn.log_softmax(scores), batch.targets[..., None], -1)
        right = scores.argmax(-1) == batch.targets
        under = lambda values: jnp.where(batch.mask, values, 0.0).sum()
        return under(-picked[..., 0]), under(right), batch.mask.sum()

    def score(params):
        parts = [read(params, batch) for batch in held_out.batches()]
        nats, right, count = (
            sum(float(one) for one in column) for column in zip(*parts, strict=True)
        )
        return {"bits_per_byte": nats / math.log(2) / size, "accuracy": right / count}

    return score


def _loaded(student: str, method: str, folder: pathlib.Path, options: argparse.Namespace) -> Any:
    """The configuration of a run by a method, which is taken apart here."""
    from jaxdistill import config

    length, theirs = LENGTHS[student]
    tokenizer = "bytes" if student == "bytes" else str(_words(folder))
    chosen = METHODS[method]
    data = '[{path: "python:docs?split=train"}]'
    if method == "sequence_kd":
        data = f"[{{path: {_answers(folder, options)}}}]"
    return config.load(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"run.dir={folder / 'run'}",
            f"student={{from: teacher, layers: {LAYERS}, tokenizer: {tokenizer}, "
            "compute_dtype: float32}",
            "tokenizer.from=student",
            f"method={chosen % theirs if '%' in chosen else chosen}",
            f"data.train={data}",
            f"data.seq_len={length}",
            f"data.cache_dir={folder / 'data'}",
            f"train={{steps: {options.steps}, batch_size: {options.batch}, eval_every: null}}",
            "optimizer={lr: 5e-4, warmup: 0.1}",
            "eval={samples: 0, compare: false}",
            "mesh={data: 1, fsdp: 1}",
        ],
    )


def _words(folder: pathlib.Path) -> pathlib.Path:
    """A tokenizer of 2,000 tokens, trained on source code."""
    import pathlib as library

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    place = folder / "words"
    if not place.exists():
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=2000, special_tokens=["<end>"], initial_alphabet=alphabet
        )
        sources = sorted(library.Path(json.__file__).parents[1].glob("[a-h]*.py"))
        core.train_from_iterator((file.read_text("utf-8", "replace") for file in sources), trainer)
        made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
        made.save_pretrained(place)
    return place


def _answers(folder: pathlib.Path, options: argparse.Namespace) -> pathlib.Path:
    """What the teacher writes behind the beginnings of documents, as texts."""
    from jaxdistill import config
    from jaxdistill.data import python_docs
    from jaxdistill.references import load_any

    place = folder / "answers.jsonl"
    if not place.exists():
        quickstart = config.load(ROOT / "configs" / "quickstart.yaml")
        assert quickstart.teacher is not None and quickstart.teacher.source is not None
        teacher = load_any(quickstart.teacher.source, dtype="float32")
        documents = list(python_docs.documents("train"))[: options.answers]
        starts = [" ".join(text.split()[:12]) for text in documents]
        written = teacher.generate(starts, max_new_tokens=48, temperature=1.0)
        rows = ({"text": f"{a}{b}"} for a, b in zip(starts, written, strict=True))
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


if __name__ == "__main__":
    main()
