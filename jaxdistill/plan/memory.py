"""Bytes on one device by kind: of what the step is given, and of what it makes on its way."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.models.decoder import WEIGHTS
from jaxdistill.plan.hlo.live import Buffer
from jaxdistill.sharding import HOST
from jaxdistill.train.step import LOSS, OPTIMIZER, STUDENT, TEACHER

OTHER = "other"


def argument_bytes(
    state: Any, teacher_params: Any, batch: Any, compute_dtype: Any, teachers: Sequence[str] = ()
) -> dict:
    """Bytes that a device holds of the state, the teacher and the batch, from their places.

    What waits in the memory of its host is not among them: `host_bytes`.

    Args:
      state: a `TrainState` of `jax.ShapeDtypeStruct`s with shardings.
      teacher_params: likewise, or None.
      batch: likewise.
      compute_dtype: of the student: weights of another type are master weights.
      teachers: names of several teachers, whose parameters come by them.
    """
    held: dict[str, int] = defaultdict(int)
    for leaf in jax.tree.leaves(state.params):
        masters = leaf.dtype != np.dtype(compute_dtype)
        held["master weights" if masters else "parameters"] += _local_bytes(leaf)
    one = {"teacher": teacher_params}
    parts = {
        "optimizer": state.opt_state,
        **({f"teacher {name}": teacher_params[name] for name in teachers} or one),
        "batch": batch,
        "counters": (state.step, state.key, state.skipped),
    }
    if state.frozen is not None:
        parts["frozen weights"] = state.frozen
    for name, tree in parts.items():
        held[name] += sum(map(_local_bytes, _lying(tree, on_host=False)))
    return dict(held)


def host_bytes(state: Any, teacher_params: Any) -> dict[str, int]:
    """Bytes of the optimizer and the teacher that wait in the host's memory, for one device."""
    parts = {"optimizer": state.opt_state, "teacher": teacher_params}
    sizes = {
        name: sum(map(_local_bytes, _lying(tree, on_host=True))) for name, tree in parts.items()
    }
    return {name: size for name, size in sizes.items() if size}


def _lying(tree: Any, on_host: bool) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if (leaf.sharding.memory_kind == HOST) == on_host]


def local_bytes(tree: Any) -> int:
    """Bytes of one device's part of all arrays of a tree, by their places."""
    return sum(map(_local_bytes, jax.tree.leaves(tree)))


def _local_bytes(leaf: Any) -> int:
    """Bytes of one device's part; XLA lays two numbers of 4 bits into one."""
    whole = jnp.issubdtype(leaf.dtype, jnp.integer)
    bits = jnp.iinfo(leaf.dtype).bits if whole else 8 * leaf.dtype.itemsize
    return -(-math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8)


def kind_of(path: str) -> str:
    """What a temporary is for, by the path of names that it was made under.

    "weights" are copies that layers compute with, cast and brought together from all devices;
    "gradients" those of whole parameters; "activations" all else that student and teacher make.
    """
    inside = path + "/"
    if re.search(r"\bstate\.params|\bteacher_params", path):
        return "weights"
    if f"/{OPTIMIZER}/" in inside:
        return "optimizer"
    if _within(inside, LOSS):
        return "loss"
    backward = "transpose(" in path
    if _within(inside, WEIGHTS):
        return "gradients" if backward else "weights"
    if _within(inside, TEACHER):
        return "activations"
    scope = _within(inside, STUDENT)
    if scope:
        in_a_layer = "while/body" in inside[scope.end() :]
        return "gradients" if backward and not in_a_layer else "activations"
    # What a loop over micro-batches carries from part to part.
    return "gradients" if path.endswith("/while") else OTHER


def _within(path: str, scope: str) -> re.Match | None:
    return re.search(rf"[/(]{scope}[)/]", path)


def temporary_bytes(buffers: Sequence[Buffer]) -> tuple[dict[str, float], dict[str, float]]:
    """(bytes by kind at the fullest moment, the most bytes of each kind at any moment).

    Values that share a place, such as a loop's result and what it updates, count once.
    """
    shared: dict[tuple[Any, int], list[Buffer]] = defaultdict(list)
    for buffer in buffers:
        shared[buffer.place, buffer.nbytes].append(buffer)
    length = max((buffer.last for buffer in buffers), default=0) + 1
    over_time: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(length))
    for (_, size), values in shared.items():
        whose = _owners(values, length)
        for kind in set(whose) - {""}:
            over_time[kind] += size * (whose == kind)
    if not over_time:
        return {}, {}
    fullest = int(np.argmax(sum(over_time.values())))
    at_peak = {kind: float(alive[fullest]) for kind, alive in over_time.items()}
    return at_peak, {kind: float(alive.max()) for kind, alive in over_time.items()}


def _owners(values: list[Buffer], length: int) -> np.ndarray:
    """For each moment the kind of the value that a place holds, "" for none."""
    whose = np.full(length, "", object)
    kinds = [(value, kind_of(value.written_by)) for value in values]
    for value, kind in sorted(kinds, key=lambda pair: pair[0].first):
        if kind != OTHER:
            whose[value.first : value.last + 1] = kind
    # What is nameless is mostly the zeros that a loop fills: it is what comes next.
    for value, kind in sorted(kinds, key=lambda pair: -pair[0].first):
        if kind == OTHER:
            part = whose[value.first : value.last + 1]
            known = [
                name for name in whose[value.first : value.last + 2] if name not in ("", OTHER)
            ]
            part[part == ""] = known[0] if known else OTHER
    return whose
