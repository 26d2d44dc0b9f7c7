"""Where the signal comes from: a teacher inside the step, one that is stored, a server, or none."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.data.teacher_cache.formats import HIDDEN, SAMPLED, TOPK, Format
from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.sharding import RULES, MeshAxes
from jaxdistill.types import Batch, Known, Outputs, TeacherSignal

# (teacher parameters or None, state before the step, batch) -> what the teacher says about it. The
# state is there for teachers made of the student itself; it is None outside of training.
TeacherFunction = Callable[[Any, Any, Batch], TeacherSignal]


def online(
    config: DecoderConfig,
    *,
    compute_dtype: DTypeLike = jnp.bfloat16,
    attention: str | None = None,
    rules: Mapping[str, MeshAxes] = RULES,
    taps: tuple[int, ...] = (),
    relations: tuple[int, ...] = (),
    second_view: bool = False,
    aligned: bool = False,
) -> TeacherFunction:
    """A teacher that reads the batch in the step; all that it says is a constant.

    With `second_view` it reads the batch's documents in its own tokens. With `aligned` it reads
    them there too, and says of each of the student's positions [B, L] what it says where the same
    token comes next: answers behind another prompt, whose tokens are groups of their own.
    """

    def teacher(params: Any, state: Any, batch: Batch) -> TeacherSignal:
        fields = ("tokens", "positions", "segment_ids")
        read = (
            batch.second
            if second_view or aligned
            else {name: getattr(batch, name) for name in fields}
        )
        outputs = decoder.apply(
            config,
            params,
            *(read[name] for name in fields),
            compute_dtype=compute_dtype,
            attention=attention,
            rules=rules,
            taps=taps,
            relations=relations,
        )
        if aligned:
            outputs = dataclasses.replace(outputs, hidden=_at_student(outputs.hidden, batch))
        return jax.lax.stop_gradient(TeacherSignal(outputs))

    return teacher


def _at_student(hidden_BMD: Array, batch: Batch) -> Array:
    """[B, L, D]: where a token of a group comes next to the student, and to the teacher.

    Positions before tokens of no group get what nobody reads.
    """
    assert batch.groups is not None, "the run's feed aligns the two views"

    def one(hidden_MD: Array, groups_L: Array, theirs_M: Array) -> Array:
        place_M = jnp.arange(theirs_M.shape[0])
        place_G = jnp.zeros(groups_L.shape[0] + 1, jnp.int32).at[theirs_M].set(place_M)
        next_L = jnp.roll(groups_L, -1)  # the first token is in no group: nothing predicts it
        return hidden_MD[jnp.maximum(place_G[next_L] - 1, 0)]

    return jax.vmap(one)(hidden_BMD, batch.groups, batch.second["groups"])


def none(params: Any, state: Any, batch: Batch) -> TeacherSignal:
    """No teacher: the data alone."""
    return TeacherSignal()


def cached(
    form: Format,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    compute_dtype: DTypeLike = jnp.bfloat16,
) -> TeacherFunction:
    """A teacher that was asked before; its answers are the batch's `teacher`.

    Args:
      form: how they are stored.
      temperature: T of the loss, which known tokens are given at: 1, or one of `form`.
      softcap: of the teacher's logits, of `hidden`.
      compute_dtype: of hidden states that are stored as int8.

    Parameters are {"head": [V, D]} with "bias" [V] where there is one, of `hidden`; else {}.
    """
    read = _READERS[form.name]

    def teacher(params: Any, state: Any, batch: Batch) -> TeacherSignal:
        signal = read(form, params, batch.teacher, temperature, softcap, compute_dtype)
        return jax.lax.stop_gradient(dataclasses.replace(signal, form=form.name))

    return teacher


def _hidden(form, params, stored, temperature, softcap, dtype) -> TeacherSignal:
    hidden_BLD = stored["hidden"]
    if "scale" in stored:
        scale_BL = stored["scale"].astype(jnp.float32)
        hidden_BLD = (hidden_BLD.astype(jnp.float32) * scale_BL[..., None]).astype(dtype)
    outputs = Outputs(hidden_BLD, params["head"], params.get("bias"), softcap=softcap)
    return TeacherSignal(outputs)


def _topk(form, params, stored, temperature, softcap, dtype) -> TeacherSignal:
    """log p_T = log p / T - log Z(T), with the rest that was stored for this T."""
    logprobs_BLK = stored["logprobs"].astype(jnp.float32)
    place = 0
    if temperature != 1.0:
        index = form.temperatures.index(temperature)
        log_z_BL = stored["log_z"][..., index]
        logprobs_BLK, place = logprobs_BLK / temperature - log_z_BL[..., None], 1 + index
    return TeacherSignal(known=Known(_ids(stored), logprobs_BLK, stored["rest"][..., place]))


def _sampled(form, params, stored, temperature, softcap, dtype) -> TeacherSignal:
    """The share of the draws as a probability; a token that was not drawn is none."""
    counts_BLK = stored["counts"].astype(jnp.float32)
    drawn = counts_BLK > 0
    logprobs_BLK = jnp.log(jnp.where(drawn, counts_BLK, form.k) / form.k)
    ids_BLK = jnp.where(drawn, _ids(stored), -1)
    entropy_BL = stored["entropy"][..., 0].astype(jnp.float32)
    return TeacherSignal(known=Known(ids_BLK, logprobs_BLK, entropy=entropy_BL))


def _ids(stored: Mapping[str, Array]) -> Array:
    """Token ids from their bytes [..., 2 or 3], the low one first."""
    low_first = stored["ids"].astype(jnp.int32)
    parts = [low_first[..., place] << (8 * place) for place in range(low_first.shape[-1])]
    return sum(parts[1:], parts[0])


def served(params: Any, state: Any, batch: Batch) -> TeacherSignal:
    """A server that was asked about drawn tokens; the batch's `teacher` has log p of each target.

    In `teacher` they are `logprobs`, float32 [B, L, 1], at T = 1.
    """
    logprobs_BL1 = jax.lax.stop_gradient(batch.teacher["logprobs"])
    return TeacherSignal(known=Known(batch.targets[..., None], logprobs_BL1), form="served")


_READERS = {HIDDEN: _hidden, TOPK: _topk, SAMPLED: _sampled}
