"""The checks of what a caller says of a teacher of whom only some tokens are known."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.kernels.sparse.definition import KINDS, SparseTeacher

# What a stored number may be off by: float16 keeps a log-probability above -16 to 0.4 %.
_ROUNDING = 0.005


def known_teacher(
    kind: Any,
    dims: tuple[int, ...],
    vocab: int,
    given: dict[str, ArrayLike | None],
    some: np.ndarray | None,
) -> SparseTeacher:
    """The caller's arrays as a `SparseTeacher`; numbers are looked at where they are no tracers.

    Args:
      kind: a key of `KINDS`.
      dims: of the tokens.
      vocab: V, of all devices together.
      given: by name: teacher_ids, teacher_logprobs, teacher_rest, sampled_ids, sampled_logprobs.
      some: which tokens have a weight, of `checks.counted`; the others may hold anything.

    Raises:
      ConfigError: naming the array, its value and the rule.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(
            f"kind = {kind!r}: with teacher_ids it must be one of {', '.join(KINDS)}; others need "
            "the teacher's whole rows"
        )
    if given["teacher_ids"] is None or given["teacher_logprobs"] is None:
        raise ConfigError("teacher_ids and teacher_logprobs go together: give both")
    if (given["sampled_ids"] is None) != (given["sampled_logprobs"] is None):
        raise ConfigError("sampled_ids and sampled_logprobs go together: give both or neither")
    if given["sampled_ids"] is not None and kind != "generalized_reverse_kl":
        raise ConfigError(
            f"sampled_ids with kind = {kind!r}: only generalized_reverse_kl has a sampled tail"
        )
    arrays = {name: None if x is None else _array(name, x) for name, x in given.items()}
    _check_shapes(arrays, dims, vocab)
    _check_numbers(arrays, vocab, some)
    wide = lambda x: None if x is None else x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # What rounding or a tracer brings above 0 counts as certain, in each place where it is read.
    log = lambda x: None if x is None else jnp.minimum(x, 0.0)
    ids, logprobs = arrays["teacher_ids"], log(wide(arrays["teacher_logprobs"]))
    assert ids is not None and logprobs is not None, "given"
    rest, sampled = wide(arrays["teacher_rest"]), arrays["sampled_ids"]
    sampled_logprobs = log(wide(arrays["sampled_logprobs"]))
    return jax.lax.stop_gradient(SparseTeacher(ids, logprobs, rest, sampled, sampled_logprobs))


def _array(name: str, value: ArrayLike) -> Array:
    return checks.indices(name, value) if name.endswith("ids") else checks.array(name, value)


def _check_shapes(arrays: dict[str, Array | None], dims: tuple[int, ...], vocab: int) -> None:
    for name, array in arrays.items():
        if array is None:
            continue
        of_set = name in ("teacher_ids", "teacher_logprobs")
        shape = array.shape[:-1] if of_set and array.ndim else array.shape
        if shape != dims or array.ndim != len(dims) + of_set:
            raise ConfigError(
                f"{name} {list(array.shape)}: must be {[*dims, 'K'] if of_set else list(dims)}, "
                "as the student has it"
            )
        whole = jnp.issubdtype(array.dtype, jnp.integer)
        if name.endswith("ids") != whole:
            needed = "integers, the index of a token" if name.endswith("ids") else "floats"
            raise ConfigError(f"{name} are {array.dtype}: they must be {needed}")
    ids, logprobs = arrays["teacher_ids"], arrays["teacher_logprobs"]
    assert ids is not None and logprobs is not None, "given"
    if ids.shape != logprobs.shape or not 1 <= ids.shape[-1] <= vocab:
        raise ConfigError(
            f"teacher_ids {list(ids.shape)} and teacher_logprobs {list(logprobs.shape)} must have "
            f"one shape [..., K] with K from 1 to V = {vocab}"
        )


def _check_numbers(arrays: dict[str, Array | None], vocab: int, some: np.ndarray | None) -> None:
    """Raises for numbers that break a rule, in tokens that count; tracers are not looked at."""
    known = {
        name: np.asarray(array)
        for name, array in arrays.items()
        if array is not None and not isinstance(array, jax.core.Tracer)
    }
    if some is None or "teacher_ids" not in known:
        return
    known = {name: array[some] for name, array in known.items()}
    check_ids("teacher_ids", known["teacher_ids"], vocab)
    if "sampled_ids" in known:
        check_ids("sampled_ids", known["sampled_ids"][:, None], vocab)
    sums = np.zeros(0)
    if "teacher_logprobs" in known:
        given = known["teacher_ids"] >= 0
        log_p = np.where(given, known["teacher_logprobs"].astype(np.float64), -math.inf)
        _check_logprobs("teacher_logprobs", log_p)
        sums = np.exp(log_p).sum(1)
        if sums.size and sums.max() > 1 + _ROUNDING:
            raise ConfigError(
                f"teacher_logprobs: the probabilities of a row sum to {sums.max():.4g}, above 1; "
                "normalise them over the teacher's vocabulary, at the temperature of the call"
            )
    if "sampled_logprobs" in known and "sampled_ids" in known:
        log_p = known["sampled_logprobs"].astype(np.float64)
        _check_logprobs("sampled_logprobs", log_p[known["sampled_ids"] >= 0])
    if "teacher_rest" in known:
        rest = known["teacher_rest"]
        if rest.size and not (rest.min() >= 0 and rest.max() <= 1 + _ROUNDING):
            raise ConfigError(
                f"teacher_rest from {rest.min()} to {rest.max()}: must lie in [0, 1]; it is the "
                "mass of all tokens that teacher_ids leaves out, not its log"
            )
        if sums.size and (sums + rest).max() > 1 + _ROUNDING:
            raise ConfigError(
                f"teacher_rest: with the known tokens' probabilities it makes "
                f"{(sums + rest).max():.4g} of a row, above 1; it is the mass of the others alone"
            )


def _check_logprobs(name: str, log_p: np.ndarray) -> None:
    if np.isnan(log_p).any() or (log_p.size and log_p.max() > _ROUNDING):
        raise ConfigError(
            f"{name}: the largest is {log_p.max()}, and must be at most 0: give log-probabilities, "
            "not logits or probabilities"
        )


def check_ids(name: str, ids: np.ndarray, vocab: int, *, different: bool = True) -> None:
    """Raises for ids [n, K] that are no tokens of the vocabulary, or stand twice in a row.

    Raises:
      ConfigError: naming the id and the rule.
    """
    if ids.size and ids.max() >= vocab:
        raise ConfigError(
            f"{name}: {ids.max()} is no token of a vocabulary of {vocab}; ids run from 0 to V - 1, "
            "and a negative one is none"
        )
    in_order = np.sort(ids, axis=-1)
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    if different and twice.any():
        raise ConfigError(
            f"{name}: {in_order[:, 1:][twice][0]} stands twice in a row; the tokens of a row must "
            "be different"
        )
