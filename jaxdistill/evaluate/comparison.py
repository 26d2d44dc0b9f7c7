"""Several models on the same text, questions and prompts, side by side: `jaxdistill compare`."""

import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.commands import Compare
from jaxdistill.errors import ConfigError, DataError, ModelError, StorageError
from jaxdistill.evaluate import choices, meter, speed
from jaxdistill.evaluate.held_out import open_rows
from jaxdistill.evaluate.perplexity import on_text
from jaxdistill.evaluate.seats import seated
from jaxdistill.models import Model
from jaxdistill.models.vocabulary import vocabulary_size
from jaxdistill.references import load_any
from jaxdistill.safe import whole_file
from jaxdistill.sharding import make_mesh

FILE = "comparison.json"
ANSWER_TOKENS = 48
# What varies with the seed of a training run; sizes and times do not.
VARYING = (
    "perplexity",
    "bits_per_byte",
    "ece",
    *(key.removeprefix("eval/") for key in meter.NAMES.values()),
    "accuracy",
    "accuracy_per_byte",
)


def compare_models(
    models: Sequence[tuple[str, str | Model]],
    options: Compare,
    *,
    teacher: str | Model | None = None,
    out: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Measures every model on the same rows; several of one name are seeds of one thing.

    Args:
      models: (name, model or what `references.load_any` understands), in the order of the table.
      options: what they are measured on.
      teacher: in place of `options.teacher`.
      out: a folder; comparison.json is written there.

    Returns:
      {held_out, rows, samples}: a row per name with means over its models, `spread`, the standard
      deviation over them where there are several, and `seeds`, how many.

    Raises:
      ModelError, MismatchError, DataError, ConfigError, StorageError: whatever cannot be used.
    """
    if not models:
        raise ConfigError("compare: name at least one model, as NAME=MODEL")
    mesh = make_mesh(fsdp=-1)
    load = lambda source: load_any(source, dtype=options.dtype, mesh=mesh)
    named = options.teacher if teacher is None else teacher
    loaded_teacher = None if named is None else load(named)
    first = loaded_teacher or load(models[0][1])
    if first.tokenizer is None:
        raise ModelError(f"{first.source}: has no tokenizer: text cannot be measured without one")
    test_set = _TestSet(options, first.tokenizer, mesh)
    measured: dict[str, list[dict[str, Any]]] = {}
    answers: dict[str, list[str]] = {}
    for name, source in models:
        model = first if source is models[0][1] and loaded_teacher is None else load(source)
        seeds = measured.setdefault(name, [])
        seeds.append(test_set.measure(model, loaded_teacher, times=options.speed and not seeds))
        seeds[-1] |= _on_disk(source)
        if name not in answers and options.prompts:
            answers[name] = list(
                map(str, model.generate(list(options.prompts), max_new_tokens=ANSWER_TOKENS))
            )
    rows = [{"name": name, **together(seeds)} for name, seeds in measured.items()]
    samples = [
        {"prompt": prompt, **{name: own[i] for name, own in answers.items()}}
        for i, prompt in enumerate(options.prompts)
    ]
    result = {"held_out": test_set.rows.name, "rows": rows, "samples": samples}
    if out is not None:
        write(result, out)
    return result


def write(result: Mapping[str, Any], out: str | os.PathLike) -> pathlib.Path:
    """Writes comparison.json into a folder.

    Raises:
      StorageError: if it cannot be written.
    """
    file = pathlib.Path(out) / FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole_file.write_text(file, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{file}: cannot be written: {error}") from error
    return file


class _TestSet:
    """The text and the questions that all models are measured on."""

    def __init__(self, options: Compare, tokenizer: Any, mesh: Any):
        self.options, self.tokenizer = options, tokenizer
        self.rows = open_rows(
            options, tokenizer, mesh, seq_len=options.seq_len, max_rows=options.max_rows
        )
        self.vocab = vocabulary_size(tokenizer)
        self.text_bytes = self.rows.text_bytes(tokenizer)
        self.questions = self._questions()

    def _questions(self) -> list[choices.ChoiceQuestion]:
        wanted, most = self.options.questions, self.options.max_questions
        if wanted is None:
            return []
        if wanted != "texts":
            return choices.read(wanted, most)
        texts = self.rows.documents(self.tokenizer)
        try:
            return choices.from_texts(texts, most)
        except DataError as error:
            raise DataError(f"{', '.join(self.options.data)}: {error}") from None

    def measure(self, model: Model, teacher: Model | None, *, times: bool) -> dict[str, Any]:
        """Everything about one model, under the names of `eval` without "eval/"."""
        s = self.options
        placed, columns = seated(model, self.tokenizer, self.rows)
        metrics = on_text(
            placed, teacher, self.rows,
            vocab=self.vocab, text_bytes=self.text_bytes, dtype=s.dtype, columns=columns,
        )  # fmt: skip
        row: dict[str, Any] = {key.removeprefix("eval/"): v for key, v in metrics.items()}
        row["peak_bytes"] = speed.peak_bytes(model, s.batch_size, s.seq_len)
        if self.questions:
            own = vocabulary_size(model.tokenizer or self.tokenizer)
            row |= choices.accuracy(model, self.questions, vocab=own, batch_size=s.batch_size)
        if times:
            row |= speed.measure(
                model,
                prompt_tokens=s.prompt_tokens,
                new_tokens=s.new_tokens,
                repeats=s.repeats,
            )
        return row


def _on_disk(source: str | Model) -> dict[str, int]:
    """Bytes of the weights in a model folder."""
    folder = pathlib.Path(source) if isinstance(source, str) else None
    if folder is None or not (folder / "config.json").is_file():
        return {}
    return {"disk_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def together(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of several seeds: means of what varies, the rest as the first has it."""
    row = dict(seeds[0]) | {"seeds": len(seeds)}
    if len(seeds) > 1:
        row["spread"] = {}
        for name in VARYING:
            if name in row:
                values = [seed[name] for seed in seeds]
                row[name] = statistics.fmean(values)
                row["spread"][name] = statistics.stdev(values)
    return row
