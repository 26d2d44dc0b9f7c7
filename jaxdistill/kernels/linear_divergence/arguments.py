"""The arguments of `linear_divergence`: the checks of what goes together, and what is static."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks, choice, rows
from jaxdistill.kernels.groups import group_size
from jaxdistill.kernels.linear_divergence.chunk import (
    Operands,
    Static,
    chunk_size,
    whole_chunk,
)
from jaxdistill.kernels.linear_divergence.mesh import Layout
from jaxdistill.kernels.operands import LossSpec


def arrays(
    hidden: ArrayLike, head: ArrayLike, bias: ArrayLike | None, *, prefix: str = ""
) -> tuple[Array, Array, Array | None]:
    """One model's hidden states, head and bias, whose shapes fit; `prefix` is of their names."""
    hidden = checks.array(f"{prefix}hidden", hidden)
    head = checks.array(f"{prefix}head", head)
    bias = None if bias is None else checks.array(f"{prefix}bias", bias)
    if hidden.ndim not in (2, 3) or head.ndim != 2 or hidden.shape[-1] != head.shape[1]:
        raise ConfigError(
            f"{prefix}hidden {list(hidden.shape)} and {prefix}head {list(head.shape)} must be "
            "[N, D] or [B, L, D], and [V, D]"
        )
    if not head.size:
        raise ConfigError(f"{prefix}head {list(head.shape)}: V and D must be at least 1")
    checks.automatic(f"{prefix}head", head)
    if bias is not None and bias.shape != (head.shape[0],):
        raise ConfigError(f"{prefix}bias {list(bias.shape)} must be [V] = [{head.shape[0]}]")
    for name, value in (("hidden", hidden), ("head", head), ("bias", bias)):
        if value is not None:
            checks.floating(f"{prefix}{name}", value)
    return hidden, head, bias


def teacher(
    hidden: ArrayLike | None,
    head: ArrayLike | None,
    bias: ArrayLike | None,
    softcap: float | None,
    taid_t: ArrayLike | None,
) -> tuple[Array | None, Array | None, Array | None]:
    """The teacher's hidden states, head and bias, or three times None."""
    if hidden is not None and head is not None:
        return arrays(hidden, head, bias, prefix="teacher_")
    if hidden is not None or head is not None:
        raise ConfigError("teacher_hidden and teacher_head go together: give both or neither")
    of_teacher = {"teacher_bias": bias, "teacher_softcap": softcap, "taid_t": taid_t}
    for name, value in of_teacher.items():
        if value is not None:
            raise ConfigError(f"{name} has no effect without teacher_hidden and teacher_head")
    return None, None, None


def vocabulary_axes(axes: str | Sequence[str], implementation: str | None) -> tuple[str, ...]:
    """`vocab_axes` as a tuple of axes that there are; the reference takes none."""
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    if axes and implementation == choice.REFERENCE:
        raise ConfigError(
            f"vocab_axes = {axes}: the reference needs a whole head; None takes an implementation "
            "that shares it"
        )
    for axis in axes:
        try:
            jax.lax.axis_size(axis)
        except NameError as error:
            raise ConfigError(
                f"vocab_axes = {axes}: no shard_map around this call has an axis {axis!r}; outside "
                "of one it is `mesh` that says where the arrays lie"
            ) from error
    return axes


def check_choices(kind, parameters, reduction, dims, vocab, teacher, softcaps) -> None:
    """Raises for what does not fit together."""
    if isinstance(kind, str):
        rows.make(kind, *parameters)  # raises for an unknown kind or a parameter out of range
    elif not callable(kind):
        raise ConfigError(f"kind = {kind!r}: must be one of {', '.join(rows.KINDS)}, or a function")
    elif parameters:
        raise ConfigError("parameters belong to named kinds; bind them to the function")
    if teacher[0] is not None and (teacher[1].shape[0] != vocab or teacher[0].shape[:-1] != dims):
        raise ConfigError(
            f"student logits would be {[*dims, vocab]}, the teacher's "
            f"{[*teacher[0].shape[:-1], teacher[1].shape[0]]}: tokens and vocabulary must agree; "
            "slice padded head rows off first"
        )
    for name, softcap in zip(("student", "teacher"), softcaps, strict=True):
        checks.softcap(f"{name}_softcap", softcap)
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction={reduction!r} must be 'mean' or 'sum'")


def check_pieces(chunk, logits_dtype, monitor) -> None:
    """Raises for a chunk of no tokens, logits that are no floats, or a `monitor` of several."""
    if chunk is not None:
        checks.whole("chunk", chunk)
    if logits_dtype is not None and not _is_float(logits_dtype):
        raise ConfigError(f"logits_dtype = {logits_dtype}: must be a float type")
    if monitor is None:
        return
    if not isinstance(monitor, bool | np.generic | np.ndarray | jax.Array):
        raise ConfigError(f"monitor = {monitor!r}: must be a bool, or None")
    if jnp.ndim(monitor):
        raise ConfigError(f"monitor {list(jnp.shape(monitor))}: must be one bool, []")


def _is_float(dtype: DTypeLike) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:  # the name of no type
        return False


def static(
    x: Operands,
    place: Layout,
    loss: LossSpec,
    softcaps: tuple[float | None, float | None],
    chunk: int | None,
    logits_dtype: DTypeLike | None,
    implementation: str | None,
) -> Static:
    """The static arguments: in which pieces, and by which implementation."""
    logits_dtype = jnp.dtype(logits_dtype or x.student_hidden.dtype)
    dims, heads = x.student_hidden.shape[:-1], (x.student_head, x.teacher_head)
    rows = tuple(heads[0].shape[0] if head is None else head.shape[0] for head in heads)
    vocab = max(rows)
    device = choice.current_device()
    shards = place.size(place.vocab)
    # The kernels' tiles are 64 columns wide; a device pads its own rows of the heads.
    tile = 64 if device.platform == "gpu" else 1
    local_vocab = -(-vocab // (shards * tile)) * tile
    tokens = math.prod(dims) // place.size(place.token_axes)
    if chunk is None:
        itemsize, beside = logits_dtype.itemsize, _gathered(x, place)
        chunk = chunk_size(tokens, local_vocab, device.platform, itemsize, beside)
    else:
        chunk = whole_chunk(chunk, tokens, device.platform)
    chosen = choice.choose(
        implementation,
        local_vocab,
        logits_dtype,
        device=device,
        scalar_temperature=x.coefficients.has_scalar_temperature,
        tokens=chunk,
    )
    group = group_size(chunk, local_vocab, device.platform)
    # Inside a shard_map of one's own each device brings its rows, all of them real.
    own = jax.lax.axis_size(place.vocab) if place.mesh is None and place.vocab else 1
    totals = (own * rows[0], own * rows[1])
    return Static(loss, chunk, group, tile, totals, softcaps, chosen, logits_dtype)


def _gathered(x: Operands, place: Layout) -> int:
    """Bytes for each token of both models' shared columns, float32, where devices add them up."""
    if x.columns is None or not place.vocab:
        return 0
    return 2 * 4 * (x.columns.student.shape[0] + 1)
