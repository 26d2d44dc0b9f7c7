"""Several models on the same text, questions and prompts, side by side: `jaxdistill compare`."""

import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdistill import whole_file
from jaxdistill.data import pipeline
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.sources import open_source
from jaxdistill.engine.held_out import HeldOut
from jaxdistill.engine.references import load_any
from jaxdistill.errors import ConfigError, DataError, ModelError, StorageError
from jaxdistill.measure import agreement, choices, speed
from jaxdistill.models import Model
from jaxdistill.models.vocabulary import check_rows, check_same, vocabulary_size
from jaxdistill.sharding import make_mesh, on_mesh

FILE = "comparison.json"
ANSWER_TOKENS = 48
# What varies with the seed of a training run; sizes and times do not.
VARYING = (
    "perplexity",
    "bits_per_byte",
    "kl_t1",
    "reverse_kl",
    "agree_top1",
    "agree_top5",
    "acceptance",
    "ece",
    "accuracy",
    "accuracy_per_byte",
)


@dataclass(frozen=True)
class Settings:
    """What models are measured on.

    Attributes:
      data: held-out files, or names such as python:docs?split=held_out.
      format: what a record holds, as data.format in a configuration.
      seq_len: tokens in a row.
      batch_size: rows at a time, a multiple of the number of devices.
      max_rows: use only so many; None: all.
      questions: a JSONL file of multiple choice (see `choices.read`), or "texts": which of four
        continuations is the held-out text's own; None: none.
      max_questions: at most so many.
      prompts: texts that every model continues.
      speed: measure latencies.
      prompt_tokens: of a timed row.
      new_tokens: of a timed row.
      repeats: timings of each kind.
      dtype: held and computed in, where a model is not quantised.
      cache_dir: where tokenised rows are kept.
    """

    data: Sequence[str]
    format: str = "auto"
    seq_len: int = 1024
    batch_size: int = 8
    max_rows: int | None = None
    questions: str | None = None
    max_questions: int = 200
    prompts: Sequence[str] = ()
    speed: bool = True
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 10
    dtype: str = "float32"
    cache_dir: str = "runs/.cache"


def compare_models(
    models: Sequence[tuple[str, str | Model]],
    settings: Settings,
    *,
    teacher: str | Model | None = None,
    out: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Measures every model on the same rows; several of one name are seeds of one thing.

    Args:
      models: (name, model or any name `engine.load` understands), in the order of the table.
      settings: what they are measured on.
      teacher: KL, agreement and acceptance are measured against it.
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
    load = lambda source: load_any(source, dtype=settings.dtype, mesh=mesh)
    large = None if teacher is None else load(teacher)
    first = large or load(models[0][1])
    if first.tokenizer is None:
        raise ModelError(f"{first.source}: has no tokenizer: text cannot be measured without one")
    place = _Place(settings, first.tokenizer, mesh)
    measured: dict[str, list[dict[str, Any]]] = {}
    answers: dict[str, list[str]] = {}
    for name, source in models:
        model = first if source is models[0][1] and large is None else load(source)
        seeds = measured.setdefault(name, [])
        seeds.append(place.measure(model, large, times=settings.speed and not seeds))
        seeds[-1] |= _on_disk(source)
        if name not in answers and settings.prompts:
            answers[name] = list(
                map(str, model.generate(list(settings.prompts), max_new_tokens=ANSWER_TOKENS))
            )
    rows = [{"name": name, **_together(seeds)} for name, seeds in measured.items()]
    samples = [
        {"prompt": prompt, **{name: own[i] for name, own in answers.items()}}
        for i, prompt in enumerate(settings.prompts)
    ]
    result = {"held_out": place.rows.name, "rows": rows, "samples": samples}
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


class _Place:
    """The text and the questions that all models are measured on."""

    def __init__(self, settings: Settings, tokenizer: Any, mesh: Any):
        if not settings.data:
            raise ConfigError("compare: give held-out text (--data)")
        self.settings, self.tokenizer = settings, tokenizer
        dataset = pipeline.build(
            [open_source(path, format=settings.format) for path in settings.data],
            tokenizer,
            seq_len=settings.seq_len,
            cache_dir=settings.cache_dir,
            name="eval",
        )
        name = ", ".join(settings.data)
        self.rows = HeldOut(dataset, settings.batch_size, settings.max_rows, mesh, name)
        self.vocab = vocabulary_size(tokenizer)
        self.bytes = self.rows.text_bytes(tokenizer)
        self.questions = self._questions(dataset)

    def _questions(self, dataset: Dataset) -> list[choices.Question]:
        wanted, most = self.settings.questions, self.settings.max_questions
        if wanted is None:
            return []
        if wanted != "texts":
            return choices.read(wanted, most)
        texts = self.rows.documents(self.tokenizer)
        try:
            return choices.from_texts(texts, most)
        except DataError as error:
            raise DataError(f"{', '.join(self.settings.data)}: {error}") from None

    def measure(self, model: Model, teacher: Model | None, *, times: bool) -> dict[str, Any]:
        """Everything about one model."""
        check_rows(model.source, model.config.vocab_size, self.vocab)
        if model.tokenizer is not None and model.tokenizer is not self.tokenizer:
            check_same(self.tokenizer, model.tokenizer)
        s = self.settings
        with on_mesh(model.params):
            row = agreement.measure(
                model.config,
                model.params,
                self.rows.batches(),
                vocab=self.vocab,
                teacher=None if teacher is None else teacher.config,
                teacher_params=None if teacher is None else teacher.params,
                text_bytes=self.bytes,
                compute_dtype=s.dtype,
            )
        row |= speed.size(model)
        row["peak_bytes"] = speed.peak_bytes(model, s.batch_size, s.seq_len)
        if self.questions:
            row |= choices.accuracy(
                model, self.questions, vocab=self.vocab, batch_size=s.batch_size
            )
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


def _together(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
