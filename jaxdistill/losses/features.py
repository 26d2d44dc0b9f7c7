"""Losses between hidden states: layer maps, mean squared and cosine distance, relations of tokens.

Distances take [..., D] and return [...] in float32, unreduced: average them with `masked_mean`, so
that padding never counts.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.losses import given

_LOWEST = -1e30


def layer_map(
    student_layers: int, teacher_layers: int, kind: str | int | Sequence[Sequence[int]] = "even"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which layers are compared: (student's, teacher's), from 0, in pairs.

    "even": student layer i with teacher layer round((i + 1) teacher_layers / student_layers) - 1,
    the ends of equal blocks. "last": the last of both. A number k: the ends of k equal blocks of
    both. Or the pairs themselves.

    Args:
      student_layers: depth of the student.
      teacher_layers: depth of the teacher.
      kind: "even", "last", a number of pairs, or pairs (student layer, teacher layer).

    Raises:
      ConfigError: for another kind, a layer that does not exist, or one named twice.

    Reference: Jiao et al. 2020 (TinyBERT), arXiv 1909.10351 (equal blocks).
    """
    if kind == "last":
        pairs = [(student_layers - 1, teacher_layers - 1)]
    elif kind == "even":
        if student_layers > teacher_layers:
            raise ConfigError(
                f"layers = even: the student has {student_layers} layers, more than the teacher's "
                f"{teacher_layers}; name the pairs"
            )
        ends = [round((i + 1) * teacher_layers / student_layers) - 1 for i in range(student_layers)]
        pairs = list(enumerate(ends))
    elif isinstance(kind, str):
        raise ConfigError(f"layers = {kind!r}: must be even, last, or pairs [student, teacher]")
    elif isinstance(kind, int):
        if not 1 <= kind <= min(student_layers, teacher_layers):
            raise ConfigError(
                f"layers = {kind}: must be from 1 to the smaller depth, "
                f"{min(student_layers, teacher_layers)}"
            )
        end = lambda i, depth: (i + 1) * depth // kind - 1
        pairs = [(end(i, student_layers), end(i, teacher_layers)) for i in range(kind)]
    else:
        pairs = [(int(s), int(t)) for s, t in kind]
    for who, index, depth in (("student", 0, student_layers), ("teacher", 1, teacher_layers)):
        named = [pair[index] for pair in pairs]
        for layer in named:
            if not 0 <= layer < depth:
                raise ConfigError(f"layers: {who} has no layer {layer}: it has 0 to {depth - 1}")
        if len(set(named)) != len(named):
            raise ConfigError(f"layers: a layer of the {who} is named twice in {named}")
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def hidden_mse(student: ArrayLike, teacher: ArrayLike, *, normalise: bool = True) -> Array:
    """mean_d (s_d - t_d)^2, of states divided by their root mean square where `normalise`.

    Layers and models differ in scale by orders of magnitude; normalised, the loss lies in [0, 4]
    and one weight serves any pair.

    Args:
      student: [..., D], projected to the teacher's width.
      teacher: [..., D], a constant.
      normalise: compare directions and not sizes.

    Raises:
      ConfigError: if shapes differ.
    """
    came, spoiled, student, teacher = _states(student, teacher)
    if normalise:
        student, teacher = _unit(student), _unit(teacher)
    return given.marked(jnp.mean(jnp.square(student - teacher), axis=-1), spoiled, came)


def hidden_cosine(student: ArrayLike, teacher: ArrayLike) -> Array:
    """1 - cos(student, teacher), in [0, 2].

    Args and Raises as `hidden_mse`.

    Reference: Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, section 2.
    """
    came, spoiled, student, teacher = _states(student, teacher)
    value = 1 - jnp.mean(_unit(student) * _unit(teacher), axis=-1)
    return given.marked(value, spoiled, came)


def relation_kl(
    student: ArrayLike, teacher: ArrayLike, segment_ids: ArrayLike, *, heads: int
) -> Array:
    """KL between the models' relations of tokens, softmax(x_h x_h^T / sqrt(D / heads)), [B, L].

    The states (queries, keys, values or hidden states of one layer) are split into `heads` relation
    heads, which may be other than the attention's and make any two widths comparable. A token's
    relations run over the tokens of its own segment that are not after it, as a decoder sees them;
    the mean over heads is returned, and 0 for padding (segment 0).

    Args:
      student: [B, L, D_S], D_S a multiple of heads.
      teacher: [B, L, D_T], D_T a multiple of heads; a constant.
      segment_ids: int [B, L], 0 is padding.
      heads: number of relation heads.

    Raises:
      ConfigError: if a width is no multiple of heads, or shapes do not fit.

    Reference: Wang et al. 2021 (MiniLMv2), arXiv 2012.15828, section 3.
    """
    segment_ids = jnp.asarray(segment_ids)
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher))
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = same & (jnp.arange(length)[:, None] >= jnp.arange(length)[None, :])[None]

    def relations(x: Array, who: str) -> Array:
        if x.shape[:2] != segment_ids.shape or x.shape[2] % heads:
            raise ConfigError(
                f"{who} {list(x.shape)}: must be [B, L, D] with D a multiple of heads = {heads}, "
                f"and [B, L] = {list(segment_ids.shape)}"
            )
        # Padding may hold anything: 0 * NaN would reach the slopes of the tokens beside it.
        sound = jnp.where((segment_ids == 0)[..., None], 0.0, _wide(x))
        split = sound.reshape(*x.shape[:2], heads, -1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", split, split) / jnp.sqrt(float(split.shape[-1]))
        return jax.nn.log_softmax(jnp.where(seen[:, None], scores, _LOWEST))

    log_q, log_p = relations(jnp.asarray(student), "student"), relations(teacher, "teacher")
    gap = jnp.where(seen[:, None], log_p - log_q, 0.0)
    values = jnp.mean(jnp.sum(jnp.exp(log_p) * gap, axis=-1), axis=1)
    return jnp.where(segment_ids == 0, 0.0, values)


def _states(student: ArrayLike, teacher: ArrayLike) -> tuple[Array, Array, Array, Array]:
    """The student's states as they came, which rows are not finite, and both, 0 in these rows."""
    student, teacher = _wide(student), jax.lax.stop_gradient(_wide(teacher))
    if student.shape != teacher.shape or student.ndim == 0:
        raise ConfigError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} must have one shape "
            "[..., D]; project the student to the teacher's width first"
        )
    spoiled = ~jnp.all(jnp.isfinite(student) & jnp.isfinite(teacher), axis=-1)
    sound = lambda x: jnp.where(spoiled[..., None], 0.0, x)
    return student, spoiled, sound(student), sound(teacher)


def _wide(x: ArrayLike) -> Array:
    return given.wide(jnp.asarray(x))


def _unit(x: Array) -> Array:
    """x over its root mean square; a zero vector stays zero, with a finite slope."""
    square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
