"""Measures any model on any text: `jaxdistill eval`."""

import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxdistill.commands import Evaluate
from jaxdistill.errors import MismatchError, ModelError
from jaxdistill.evaluate import distributions, meter, speed
from jaxdistill.evaluate.held_out import HeldOut, open_rows
from jaxdistill.evaluate.seats import seated
from jaxdistill.models import Model
from jaxdistill.models.vocabulary import check_rows, vocabulary_size
from jaxdistill.references import load_any
from jaxdistill.sharding import make_mesh

SEQ_LEN = 1024  # tokens in a row where nobody says how many
NO_SETTINGS: Mapping[str, Any] = types.MappingProxyType({})


def on_text(
    model: Model,
    teacher: Model | None,
    rows: HeldOut,
    *,
    vocab: int,
    text_bytes: int,
    dtype: str,
    columns: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """All that the meter measures of a model on text, and its size.

    Args:
      model: on the mesh of the rows.
      teacher: to compare with.
      rows: the text.
      vocab: tokens that both models have.
      text_bytes: of the rows, see `HeldOut.text_bytes`.
      dtype: of activations.
      columns: the tokens that both models have; None: all.

    Returns:
      eval/perplexity, eval/ce (nats per token), eval/bits_per_byte, eval/ece, eval/reliability,
      eval/student_entropy, eval/tokens, parameters, parameters_non_embedding, bytes; with a teacher
      eval/kl_t1 = KL(teacher || student), eval/reverse_kl, eval/agree_top1, eval/agree_top5,
      eval/acceptance = E[sum_v min(p_v, q_v)], eval/teacher_entropy.

    Raises:
      DataError: if no token of the rows counts.
    """
    config, params = (None, None) if teacher is None else (teacher.config, teacher.params)
    step = distributions.step(
        model.config, config, vocab=vocab, compute_dtype=dtype, columns=columns
    )
    metrics = rows.measure(step, model.params, params, text_bytes=text_bytes)
    return metrics | speed.size(model.config, model.params)


def evaluate(
    model: str | Model,
    options: Evaluate,
    *,
    teacher: str | Model | None = None,
    reading: Mapping[str, Any] = NO_SETTINGS,
) -> dict[str, Any]:
    """Perplexity, calibration, speed and size of a model; with a teacher also KL and agreement.

    Args:
      model: a loaded model, or any name `references.load_any` understands.
      options: the text, and how it is read.
      teacher: in place of `options.teacher`; its vocabulary must cover the text.
      reading: how the text is read where `options` does not say it: options of `pipeline.build`.

    Returns:
      What `on_text` measures, and scored_tokens_per_second.

    Raises:
      ModelError, MismatchError, DataError, ConfigError: whatever cannot be used.
    """
    mesh, dtype = make_mesh(fsdp=-1), options.dtype
    student = load_any(model, dtype=dtype, mesh=mesh)
    if student.tokenizer is None:
        raise ModelError(f"{student.source}: has no tokenizer: text cannot be measured without one")
    vocab = vocabulary_size(student.tokenizer)
    check_rows("model", student.config.vocab_size, vocab)
    named = options.teacher if teacher is None else teacher
    loaded_teacher = None if named is None else load_any(named, dtype=dtype, mesh=mesh)
    said = {name: getattr(options, name) for name in ("seq_len", "loss_on")}
    said = {name: value for name, value in said.items() if value is not None}
    how: dict[str, Any] = {"seq_len": SEQ_LEN, **reading, **said}
    rows = open_rows(options, student.tokenizer, mesh, max_rows=options.max_rows, **how)
    columns = None
    if loaded_teacher is not None:
        if loaded_teacher.tokenizer is None:
            raise MismatchError(
                f"{loaded_teacher.source}: has no tokenizer to compare vocabularies by"
            )
        loaded_teacher, columns = seated(loaded_teacher, student.tokenizer, rows)
    metrics = on_text(
        student,
        loaded_teacher,
        rows,
        vocab=vocab,
        text_bytes=rows.text_bytes(student.tokenizer),
        dtype=dtype,
        columns=columns,
    )
    scoring = meter.scoring_step(student.config, vocab, compute_dtype=jnp.dtype(dtype))
    return metrics | {"scored_tokens_per_second": rows.speed(scoring, student.params)}
