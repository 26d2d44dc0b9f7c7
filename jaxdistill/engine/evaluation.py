"""Measures any model on any text: `jaxdistill eval`."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxdistill import evaluate as measure
from jaxdistill import teachers
from jaxdistill.data import pipeline
from jaxdistill.data.sources import open_source
from jaxdistill.engine.held_out import HeldOut
from jaxdistill.engine.references import load_any
from jaxdistill.errors import MismatchError, ModelError
from jaxdistill.methods import measuring
from jaxdistill.models import Model
from jaxdistill.models.vocabulary import check_rows, check_same, vocabulary_size
from jaxdistill.sharding import make_mesh
from jaxdistill.train.step import make_loss


def evaluate(
    model: str | Model,
    *,
    data: Sequence[str],
    teacher: str | Model | None = None,
    format: str = "auto",
    loss_on: str = "all",
    seq_len: int = 1024,
    batch_size: int = 8,
    max_rows: int | None = None,
    cache_dir: str = "runs/.cache",
    dtype: str = "float32",
) -> dict[str, float]:
    """Perplexity, speed and size of a model; with a teacher also KL and agreement.

    Args:
      model: a loaded model, or any name `engine.load` understands.
      data: files, or names such as python:docs?split=held_out.
      teacher: measured against; must have the same vocabulary.
      format: what a record holds, as data.format in a configuration.
      loss_on: which tokens count, all, completion or assistant.
      seq_len: tokens in a row.
      batch_size: rows at a time, a multiple of the number of devices.
      max_rows: use only so many; None: all.
      cache_dir: where tokenised rows are kept.
      dtype: held and computed in.

    Returns:
      eval/perplexity, eval/ce (nats per token), eval/tokens, parameters, parameters_non_embedding,
      bytes, tokens_per_second; with a teacher eval/kl_t1 and eval/agree_top1.

    Raises:
      ModelError, MismatchError, DataError, ConfigError: whatever cannot be used.
    """
    mesh = make_mesh(fsdp=-1)
    student = load_any(model, dtype=dtype, mesh=mesh)
    if student.tokenizer is None:
        raise ModelError(f"{student.source}: has no tokenizer: text cannot be measured without one")
    vocab = vocabulary_size(student.tokenizer)
    check_rows("model", student.config.vocab_size, vocab)
    large = None if teacher is None else load_any(teacher, dtype=dtype, mesh=mesh)
    if large is not None:
        _check_teacher(large, student, vocab)
    dataset = pipeline.build(
        [open_source(path, format=format) for path in data],
        student.tokenizer,
        seq_len=seq_len,
        loss_on=loss_on,
        cache_dir=cache_dir,
        name="eval",
    )
    held_out = HeldOut(dataset, batch_size, max_rows, mesh, ", ".join(data))
    compute = jnp.dtype(dtype)
    scoring = measure.scoring_step(student.config, vocab, compute_dtype=compute)
    if large is None:
        metrics = held_out.measure(scoring, student.params, None, {})
    else:
        loss = make_loss(
            student.config, measuring.against_teacher(vocab=vocab), compute_dtype=compute
        )
        step = measure.make_step(loss, teachers.online(large.config, compute_dtype=compute))
        params = {"student": student.params, "objective": {}}
        knobs = {"alpha": jnp.float32(0.5), "temperature": jnp.float32(1.0)}
        metrics = held_out.measure(step, params, large.params, knobs)
    # Without a training objective there is no loss of one's own to report.
    for name in ("eval/loss", "eval/divergence"):
        metrics.pop(name, None)
    metrics |= measure.size(student.config, student.params)
    metrics["tokens_per_second"] = held_out.speed(scoring, student.params)
    return metrics


def _check_teacher(teacher: Model, student: Model, vocab: int) -> None:
    """Raises where the two do not mean the same token by the same id."""
    check_rows("teacher", teacher.config.vocab_size, vocab)
    if teacher.tokenizer is None:
        raise MismatchError(f"{teacher.source}: has no tokenizer to compare vocabularies by")
    check_same(teacher.tokenizer, student.tokenizer)
