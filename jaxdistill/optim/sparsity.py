"""Weights that become zero while a model trains: masks as the last transform of an optimizer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxdistill.errors import ConfigError
from jaxdistill.optim.lowest import MOST, lowest, order
from jaxdistill.optim.schedules import KnobState, NamedKnobState

PATTERNS = ("2:4", "unstructured")
SCOPES: Mapping[str, tuple[int, ...] | None] = {"output": (-2,), "layer": (-2, -1), "global": None}
BY = ("weight", "wanda", "movement")
NAME = "sparsity"  # of the knob: the share of the masked weights that are zero
_NEVER = frozenset({"objective", "embedding", "positions", "head", "lm_head", "router"})
_LAST = np.uint32(2**32 - 1)
_CHANGES = 10_000


class SparsityState(NamedTuple):
    """What stays zero, and what decides what will.

    Attributes:
      share: the knob "sparsity": updates made, and the share of weights that are zero after them.
      masks: bool like the kernels, True where a weight lives.
      movement: float32 like the kernels, S, or None where weights decide.
    """

    share: NamedKnobState
    masks: Any
    movement: Any


def sparsity(
    *,
    pattern: str = "2:4",
    share: float = 0.5,
    begin: int = 0,
    end: int = 0,
    every: int = 1,
    scope: str = "layer",
    by: str = "weight",
    norms: Mapping[str, Any] | None = None,
    where: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes the weights of kernels [..., in, out] zero by a schedule, and keeps them zero.

    It is the last of a chain. With u what the transforms before it made, and t the updates made,

        update = u where the mask is True, else -w:  w + update is 0 to the bit
        share_t = share (1 - (1 - (t - begin) / (end - begin))^3)       begin <= t <= end

    At t = begin, begin + every, ... and end the lowest round(share_t * weights) are masked, and
    stay so. Scores are of w + u, the weights as they would be:

        weight      |w|
        wanda       |w| * |x|_2, x the input that a weight is multiplied by, over all tokens
        movement    S = -sum over the updates so far of w * dL/dw: what moves away from zero stays

    "2:4" masks two of every four weights along the input dimension; below its share of 1/2 those
    that score lowest among them. "unstructured" masks any.

    Args:
      pattern: "2:4" or "unstructured".
      share: of the weights that are zero in the end, in (0, 1); 1/2 for "2:4".
      begin: the first update, from 0, at which weights may be masked.
      end: the last; there the share is reached.
      every: updates between two changes of the masks.
      scope: what is compared with each other: the weights of an "output", of a "layer" (one
        matrix), or of all kernels ("global").
      by: the score.
      norms: of "wanda": path of a kernel, such as "layers/mlp/up/kernel" -> |x|_2 [..., in].
      where: parameters -> the same tree of bools, True for the kernels that are made sparse; None:
        every "kernel" that is no embedding, head or router.

    Returns:
      A transformation; "movement" takes dL/dw as the extra argument `gradients` of its update.

    Raises:
      ConfigError: for an option that does not fit; and when it is initialised, for inputs that 4
        does not divide, for no kernel at all, or for one without norms.

    >>> import jax.numpy as jnp, optax
    >>> from jaxdistill import optim
    >>> tx = optax.chain(optax.sgd(0.0), optim.sparsity(pattern="2:4"))
    >>> params = {"kernel": jnp.array([[4.0], [-1.0], [2.0], [3.0]])}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["kernel"][:, 0])
    [4. 0. 0. 3.]

    Reference: Zhu, Gupta 2017, arXiv 1710.01878 (the ramp); Mishra et al. 2021, arXiv 2104.08378
    (2:4); Sun et al. 2023, arXiv 2306.11695 (Wanda); Sanh et al. 2020, arXiv 2005.07683 (movement).
    """
    _check(pattern, share, begin, end, every, scope, by, norms)
    shares = [ramp(t, share=share, begin=begin, end=end) for t in due_at(begin, end, every)]

    def init(params: Any) -> SparsityState:
        if jax.tree.leaves(params):  # Optax also asks with none
            _check_kernels(params, pattern, scope, norms)
        masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
        movement = None
        if by == "movement":
            movement = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return SparsityState(_share(jnp.int32(0), jnp.float32(0)), masks, movement)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, SparsityState]:
        if params is None:
            raise ConfigError("sparsity reads weights: call update(updates, state, params)")
        _check_kernels(params, pattern, scope, norms)
        movement = _moved(state.movement, params, extra) if by == "movement" else None
        old, step = state.share.knobs[NAME], state.share.knobs[NAME].step

        def changed() -> tuple[Any, Array]:
            after = jax.tree.map(jnp.add, params, updates)
            scores = movement if by == "movement" else _magnitudes(after, norms)
            point = jnp.where(step >= end, len(shares) - 1, (step - begin) // every)
            masks = _masks(scores, state.masks, pattern, scope, shares, point)
            return masks, zeros(masks)

        due = (step >= begin) & (step < end) & ((step - begin) % every == 0) | (step == end)
        masks, value = jax.lax.cond(due, changed, lambda: (state.masks, old.value))
        updates = jax.tree.map(lambda mask, u, w: jnp.where(mask, u, -w), masks, updates, params)
        after = _share(jnp.asarray(optax.safe_increment(step)), value)
        return updates, SparsityState(after, masks, movement)

    inner = optax.GradientTransformationExtraArgs(init, update)
    return optax.masked(inner, where or prunable, mask_compatible_extra_args=True)


def one_shot(
    params: Any,
    *,
    pattern: str = "2:4",
    share: float = 0.5,
    scope: str = "layer",
    norms: Mapping[str, Any] | None = None,
    where: Callable[[Any], Any] | None = None,
) -> Any:
    """The parameters with the lowest weights zero, by |w|, or with `norms` by |w| * |x|_2.

    Raises:
      ConfigError: as `sparsity`.
    """
    by = "weight" if norms is None else "wanda"
    tx = sparsity(pattern=pattern, share=share, scope=scope, by=by, norms=norms, where=where)
    none = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(none, tx.init(params), params)
    return optax.apply_updates(params, updates)


def ramp(t: int, *, share: float, begin: int, end: int) -> float:
    """The share of weights that are zero after update t, begin <= t <= end; `share` at the end."""
    left = 0.0 if t >= end else 1.0 - (t - begin) / (end - begin)
    return share * (1.0 - left**3)


def due_at(begin: int, end: int, every: int) -> list[int]:
    """The updates at which masks change: every so many from the first on, and the last."""
    return sorted({*range(begin, end, every), end})


def prunable(params: Any) -> Any:
    """Which leaves are kernels that may be sparse: none of embeddings, heads, routers and norms."""

    def one(path: tuple[Any, ...], leaf: Any) -> bool:
        names = {getattr(key, "key", None) for key in path}
        last = getattr(path[-1], "key", None) if path else None
        return last == "kernel" and leaf.ndim >= 2 and not names & _NEVER

    return jax.tree_util.tree_map_with_path(one, params)


def zeros(masks: Any) -> Array:
    """The share of weights that a tree of masks makes zero, float32."""
    leaves = jax.tree.leaves(masks)
    gone = sum(jnp.sum(~leaf, dtype=jnp.float32) for leaf in leaves)
    return jnp.asarray(gone / sum(leaf.size for leaf in leaves), jnp.float32)


def _share(step: Array, value: Array) -> NamedKnobState:
    return NamedKnobState({NAME: KnobState(step, value)})


def _moved(movement: Any, params: Any, extra: Mapping[str, Any]) -> Any:
    """S after the gradients of this update."""
    if "gradients" not in extra:
        raise ConfigError(
            "sparsity by movement reads gradients: call update(..., gradients=dL/dw), a tree like "
            "the parameters"
        )
    return jax.tree.map(
        lambda s, w, g: s - w.astype(jnp.float32) * g.astype(jnp.float32),
        movement,
        params,
        extra["gradients"],
    )


def _magnitudes(params: Any, norms: Mapping[str, Any] | None) -> Any:
    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        size = jnp.abs(leaf.astype(jnp.float32))
        return size if norms is None else size * jnp.asarray(norms[_name(path)])[..., None]

    return jax.tree_util.tree_map_with_path(one, params)


def _masks(
    scores: Any, masks: Any, pattern: str, scope: str, shares: list[float], point: Array
) -> Any:
    """The masks with the lowest weights gone, at one of the points of the ramp."""
    leaves, structure = jax.tree.flatten(scores)
    before = structure.flatten_up_to(masks)
    # What is gone is lower than all else: it stays gone.
    keys = [jnp.where(m, order(s), jnp.uint32(0)) for s, m in zip(leaves, before, strict=True)]
    if pattern == "2:4":
        keys = [jnp.where(_two_of_four(key), key, _LAST) for key in keys]
        if len(shares) == 1:
            return structure.unflatten([key == _LAST for key in keys])
    axes = SCOPES[scope]

    def among(size: int) -> Array:
        return jnp.asarray(np.array([round(s * size) for s in shares], np.uint32))[point]

    if axes is None:
        gone = lowest(keys, among(sum(key.size for key in keys)), None)
    else:
        sizes = [int(np.prod([key.shape[axis] for axis in axes])) for key in keys]
        gone = [lowest([key], among(n), axes)[0] for key, n in zip(keys, sizes, strict=True)]
    return structure.unflatten([m & ~g for m, g in zip(before, gone, strict=True)])


def _two_of_four(keys: Array) -> Array:
    """Which keys [..., in, out] are among the two lowest of their group of four inputs."""
    *outer, inside, outside = keys.shape
    groups = keys.reshape(*outer, inside // 4, 4, outside)
    four = [groups[..., i, :] for i in range(4)]
    ranks = [
        sum(
            (other <= one if j < i else other < one).astype(jnp.uint8)
            for j, other in enumerate(four)
            if j != i
        )
        for i, one in enumerate(four)
    ]
    return (jnp.stack(ranks, -2) < 2).reshape(keys.shape)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _check_kernels(params: Any, pattern: str, scope: str, norms: Mapping[str, Any] | None) -> None:
    """Kernels are there, and have what their pattern and their scores need.

    Raises:
      ConfigError: if not.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    if not named:
        raise ConfigError("sparsity: there is no kernel to make sparse: say which with `where`")
    for path, leaf in named:
        inputs = leaf.shape[-2]
        if pattern == "2:4" and inputs % 4:
            raise ConfigError(
                f"sparsity.pattern = '2:4': {_name(path)} has {inputs} inputs, which 4 does not "
                "divide: use unstructured, or leave it out"
            )
        if norms is not None and _name(path) not in norms:
            raise ConfigError(f"sparsity by wanda: there are no norms of {_name(path)}")
    if scope == "global" and sum(leaf.size for _, leaf in named) >= MOST:
        raise ConfigError(
            f"sparsity.scope = 'global': takes fewer than {MOST:,} weights: use layer"
        )


def _check(pattern, share, begin, end, every, scope, by, norms) -> None:
    for name, value, allowed in (
        ("pattern", pattern, PATTERNS), ("scope", scope, tuple(SCOPES)), ("by", by, BY),
    ):  # fmt: skip
        if value not in allowed:
            raise ConfigError(f"sparsity.{name} = {value!r}: must be one of {', '.join(allowed)}")
    if not 0 < share < 1 or (pattern == "2:4" and share != 0.5):
        rule = "must be 0.5 for 2:4" if pattern == "2:4" else "must be in (0, 1)"
        raise ConfigError(f"sparsity.share = {share}: {rule}")
    if not 0 <= begin <= end:
        raise ConfigError(f"sparsity.begin = {begin}, end = {end}: must be 0 <= begin <= end")
    if every < 1 or (end - begin) // every >= _CHANGES:
        least = max(1, (end - begin) // _CHANGES + 1)
        rule = f"must be at least {least}: masks change {_CHANGES:,} times at most"
        raise ConfigError(f"sparsity.every = {every}: {rule}")
    if (norms is not None) != (by == "wanda"):
        raise ConfigError(f"sparsity.by = {by!r}: norms of inputs belong to wanda, and only there")
