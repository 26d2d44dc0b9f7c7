"""Projectors between widths, and TED's task-aware filters with the losses of its two stages."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels.checks import IGNORED
from jaxdistill.kernels.linear_divergence import linear_divergence
from jaxdistill.losses.features import hidden_mse
from jaxdistill.losses.likelihood import masked_mean
from jaxdistill.types import Mean


def init_projectors(
    key: Array, student_width: int, teacher_width: int, *, pairs: int | None = None
) -> dict[str, Array]:
    """Matrices from the student's width to the teacher's, entries of variance 1 / student_width.

    Args:
      key: of `jax.random`.
      student_width: D_S.
      teacher_width: D_T.
      pairs: K, one for each pair of layers; None for one that all share, as TinyBERT has it.

    Returns:
      {"kernel": [K, D_S, D_T]}, or [D_S, D_T] without `pairs`; trained with the student and dropped
      with the teacher.

    Reference: Romero et al. 2014 (FitNets), arXiv 1412.6550; Jiao et al. 2020, arXiv 1909.10351.
    """
    shape = (
        (student_width, teacher_width) if pairs is None else (pairs, student_width, teacher_width)
    )
    return {"kernel": jax.random.normal(key, shape) * student_width**-0.5}


def init_filters(
    key: Array, count: int, width: int, out_width: int | None = None
) -> dict[str, Array]:
    """TED's filters, one affine map per chosen layer; the identity where the width stays.

    So that the first stage starts from what each layer already says through the model's own head.

    Args:
      key: of `jax.random`, for another width.
      count: K, the chosen layers.
      width: D of the model.
      out_width: D' of the filtered states, default D; student and teacher need the same.

    Returns:
      {"kernel": [K, D, D'], "bias": [K, D']}.

    Reference: Liang et al. 2023 (TED), arXiv 2210.01351; the identity is ours.
    """
    out_width = width if out_width is None else out_width
    if out_width == width:
        kernel = jnp.tile(jnp.eye(width)[None], (count, 1, 1))
    else:
        kernel = jax.random.normal(key, (count, width, out_width)) * width**-0.5
    return {"kernel": kernel, "bias": jnp.zeros((count, out_width))}


def project(params: Any, states: ArrayLike) -> Array:
    """states . kernel (+ bias): projectors or filters on the states of their layers.

    Args:
      params: of `init_projectors` or `init_filters`; None or {} changes nothing.
      states: [K, ..., D], the k-th through the k-th kernel; [..., D] where one kernel is shared.

    Returns:
      [K, ..., D'], at least float32.

    Raises:
      ConfigError: if the number of layers or the width is not that of the kernels.

    >>> import jax, jax.numpy as jnp
    >>> projectors = init_projectors(jax.random.key(0), 4, 6, pairs=2)
    >>> print(project(projectors, jnp.ones((2, 1, 3, 4))).shape)
    (2, 1, 3, 6)
    """
    states = jnp.asarray(states)
    states = states.astype(jnp.promote_types(states.dtype, jnp.float32))
    if not params:
        return states
    kernel = params["kernel"]
    stacked = kernel.ndim == 3
    if states.shape[-1:] != kernel.shape[-2:-1] or (stacked and states.shape[0] != len(kernel)):
        wanted = f"[{len(kernel)}, ..., {kernel.shape[1]}]" if stacked else f"[..., {len(kernel)}]"
        raise ConfigError(
            f"project: states {list(states.shape)} must be {wanted} for a kernel "
            f"{list(kernel.shape)}: one layer of states for each kernel, in the model's width"
        )
    projected = jnp.einsum("k...d,kde->k...e" if stacked else "...d,de->...e", states, kernel)
    if "bias" not in params:
        return projected
    bias = params["bias"]
    layers = bias.shape[:-1]
    ones = (1,) * (projected.ndim - bias.ndim)
    return projected + bias.reshape(*layers, *ones, bias.shape[-1])


def ted_stage1(
    filters: Any,
    taps: ArrayLike,
    head: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    *,
    norm: Callable[[Array], Array] | None = None,
    head_bias: ArrayLike | None = None,
    **fused: Any,
) -> Mean:
    """TED, stage 1: the filters learn to solve the task from each layer, mean_k CE(head(filter_k)).

    Only the filters learn: states and head are constants. Run it once for the teacher and once for
    the student. The published filters have a task head each; a decoder's own head, shared and
    frozen, takes their place here.

    Args:
      filters: of `init_filters`, with out_width the head's.
      taps: [K, B, L, D], outputs of the chosen layers.
      head: [V, D'], the rows that turn states into logits.
      labels: int [B, L], the token that each position predicts.
      mask: bool or float [B, L]; what masked states hold counts nothing, whatever it is.
      norm: of filtered states before the head, such as the model's final norm; None for none.
      head_bias: [V] or None.
      fused: more options of `kernels.linear_divergence`: chunk, mesh, label_smoothing, ...

    Returns:
      Mean over the tokens.

    Raises:
      ConfigError: if shapes do not fit.

    Reference: Liang et al. 2023 (TED), arXiv 2210.01351.
    """
    mask = jnp.asarray(mask).astype(jnp.float32)
    mask = jnp.where(jnp.asarray(labels) == IGNORED, 0.0, mask)
    taps = jax.lax.stop_gradient(_unmasked(taps, mask))
    filtered = project(filters, taps)
    filtered = filtered if norm is None else norm(filtered)
    count = len(filtered)
    total, _ = linear_divergence(
        filtered.reshape(-1, *filtered.shape[2:]),
        jax.lax.stop_gradient(jnp.asarray(head)),
        student_bias=None if head_bias is None else jax.lax.stop_gradient(jnp.asarray(head_bias)),
        labels=jnp.tile(jnp.asarray(labels), (count, 1)),
        mask=jnp.tile(mask, (count, 1)),
        alpha=1.0,
        reduction="sum",
        monitor=False,  # its metrics are nobody's
        **fused,
    )
    return Mean(total / count, mask.sum())


def ted_stage2(
    student_filters: Any,
    teacher_filters: Any,
    student_taps: ArrayLike,
    teacher_taps: ArrayLike,
    mask: ArrayLike,
    *,
    normalise: bool = False,
) -> Mean:
    """TED, stage 2: mean_k MSE(filter_k(student), sg(filter_k(teacher))), beside loss and KL.

    Student and student's filters learn, the teacher's side is a constant. The published mean runs
    over padding too, this one does not. Its weight ran from 10 to 7,500 by task: `normalise` makes
    it independent of the models' scales.

    Args:
      student_filters: from stage 1.
      teacher_filters: from stage 1, as many and of the same out_width.
      student_taps: [K, ..., D_S].
      teacher_taps: [K, ..., D_T].
      mask: bool or float [...]; what masked states hold counts nothing, whatever it is.
      normalise: divide filtered states by their root mean square.

    Returns:
      Mean over the tokens.

    Raises:
      ConfigError: if shapes do not fit.

    Reference: Liang et al. 2023 (TED), arXiv 2210.01351.
    """
    student = project(student_filters, _unmasked(student_taps, mask))
    teacher = project(teacher_filters, _unmasked(teacher_taps, mask))
    distances = hidden_mse(student, teacher, normalise=normalise)
    return masked_mean(distances.mean(0), mask)


def _unmasked(taps: ArrayLike, mask: ArrayLike) -> Array:
    """Taps with 0 where the mask is: a NaN there must not reach a kernel's gradient."""
    taps, mask = jnp.asarray(taps), jnp.asarray(mask)
    if taps.shape[1:-1] != mask.shape:
        raise ConfigError(
            f"taps {list(taps.shape)} and mask {list(mask.shape)}: must be [K, ..., D] and [...]"
        )
    return jnp.where((mask != 0)[None, ..., None], taps, 0)
