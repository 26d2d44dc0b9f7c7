"""Where the signal comes from: the teacher that runs inside the step, or none."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.sharding import RULES, MeshAxes
from jaxdistill.types import Batch, TeacherSignal

# (teacher parameters or None, state before the step, batch) -> what the teacher says about it. The
# state is there for teachers made of the student itself; it is None outside of training.
Teacher = Callable[[Any, Any, Batch], TeacherSignal]


def online(
    config: DecoderConfig,
    *,
    compute_dtype: DTypeLike = jnp.bfloat16,
    attention: str | None = None,
    rules: Mapping[str, MeshAxes] = RULES,
    taps: tuple[int, ...] = (),
    relations: tuple[int, ...] = (),
) -> Teacher:
    """A teacher that reads the batch in the step; all that it says is a constant."""

    def teacher(params: Any, state: Any, batch: Batch) -> TeacherSignal:
        outputs = decoder.apply(
            config,
            params,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            compute_dtype=compute_dtype,
            attention=attention,
            rules=rules,
            taps=taps,
            relations=relations,
        )
        return jax.lax.stop_gradient(TeacherSignal(outputs))

    return teacher


def none(params: Any, state: Any, batch: Batch) -> TeacherSignal:
    """No teacher: the data alone."""
    return TeacherSignal()
