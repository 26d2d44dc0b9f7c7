"""A teacher with another tokenizer: ALM beside SFT and sequence-level KD, at equal steps.

    python -m benchmarks.cross_tokenizer --save cross_tokenizer      # or a part of it:
    python -m benchmarks.cross_tokenizer --student bytes --steps 30 --save cross_tokenizer

SmolLM2-135M-Instruct teaches a student that is cut out of it, 6 of its 30 layers, and reads other
tokens: bytes, or 2,000 that were trained on the source code of Python's library. Rows of new tokens
are means of the old rows that spell them. All learn from the documentation inside Python, but for
sequence-level KD, which learns what the teacher writes behind the beginnings of the same documents.
Bits per byte are of held-out documents, all students by one program. What was saved of other
students and methods stays.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

from benchmarks import duel

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = [0, 1, 2, 3, 28, 29]
LENGTHS = {"bytes": (256, 96), "words": (96, 96)}  # of rows, student and teacher
METHODS = {
    "before": None,
    "sft": "{name: sft}",
    "sequence_kd": "{name: sft}",
    "alm": "{name: alm, alpha: 0.5, teacher_seq_len: %d}",
    "alm alone": "{name: alm, alpha: 0.0, teacher_seq_len: %d}",
}


def main() -> None:
    """Trains them one after the other, saves after each, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", nargs="*", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48, help="held-out rows")
    parser.add_argument("--answers", type=int, default=64, help="that the teacher writes")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json, or add to it")
    options = parser.parse_args()
    file = duel.RESULTS / f"{options.save}.json"
    students = json.loads(file.read_text())["students"] if file.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for seed in range(options.seeds):
            for student in options.student:
                for method in options.only:
                    if method == "before" and seed:
                        continue  # nothing of it is drawn
                    found = _bits(student, method, seed, folder, options)
                    rows = students.setdefault(student, {})
                    rows.setdefault(method, {})[str(seed)] = found
                    print(student, method, seed, found, flush=True)
                    if options.save:
                        duel.save(options.save, _result(students, options))
    print(json.dumps(_result(students, options), indent=1))


def _result(students: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    middle = {
        f"{student}, {method}": round(
            statistics.mean(each["bits_per_byte"] for each in seeds.values()), 4
        )
        for student, methods in students.items()
        for method, seeds in methods.items()
    }
    said = {name: getattr(options, name) for name in ("steps", "batch", "rows", "answers")}
    return {**said, "layers": LAYERS, "mean bits per byte": middle, "students": students}


def _bits(
    student: str, method: str, seed: int, folder: pathlib.Path, options: argparse.Namespace
) -> dict[str, float]:
    """Bits per byte of a student after a method, on held-out documents."""
    from jaxdistill import api, commands, config
    from jaxdistill.evaluate import perplexity

    length, theirs = LENGTHS[student]
    tokenizer = "bytes" if student == "bytes" else str(_words(folder))
    chosen = METHODS[method] or "{name: sft}"
    data = '[{path: "python:docs?split=train"}]'
    if method == "sequence_kd":
        data = f"[{{path: {_answers(folder, options)}}}]"
    run = folder / f"{student}-{method.replace(' ', '_')}-{seed}"
    steps = 1 if method == "before" else options.steps
    rate = "0.0" if method == "before" else "5e-4"
    loaded = config.load(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"seed={seed}",
            f"run={{name: {run.name}, dir: {run}}}",
            f"student={{from: teacher, layers: {LAYERS}, tokenizer: {tokenizer}, "
            "compute_dtype: float32}",
            "tokenizer.from=student",
            f"method={chosen % theirs if '%' in chosen else chosen}",
            f"data.train={data}",
            f"data.seq_len={length}",
            f"data.cache_dir={folder / 'data'}",
            f"train={{steps: {steps}, batch_size: {options.batch}}}",
            f"optimizer={{lr: {rate if float(rate) else 1e-12}, warmup: 0.1}}",
            "eval={max_rows: 4, samples: 0, compare: false}",
            "logging={progress: none, tensorboard: false}",
        ],
    )
    began = time.perf_counter()
    api.train(loaded)
    seconds = time.perf_counter() - began
    model = api.export(f"{run}@latest", folder / f"{run.name}-model")
    text = commands.Evaluate(
        data=("python:docs?split=held_out",),
        seq_len=length,
        max_rows=options.rows,
        cache_dir=str(folder / "data"),
        dtype="float32",
    )
    metrics = perplexity.evaluate(str(model or folder / f"{run.name}-model"), text)
    return {"bits_per_byte": metrics["eval/bits_per_byte"], "seconds": round(seconds, 1)}


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
