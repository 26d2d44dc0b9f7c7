"""What crosses the mesh once a step, not once a micro-batch: weights of teacher and student.

teacher:  reads the whole batch first, so that each layer comes together once; its answers stay
student:  its layers lie whole on every device until the step ends; gradients are added up where
          the parameters lie, a part on each device
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdistill.methods.routed import OfOne, Routed
from jaxdistill.models import DecoderConfig, decoder, per_layer
from jaxdistill.models.kernel import is_kernel
from jaxdistill.sharding import RULES, MeshAxes, constrain
from jaxdistill.types import Batch, TeacherSignal


def gathered(
    config: DecoderConfig,
    params: Mapping[str, Any],
    dtype: DTypeLike,
    rules: Mapping[str, MeshAxes] = RULES,
) -> dict[str, Any]:
    """The parameters with layers that lie whole along `fsdp`, in the dtype that they compute in.

    The embedding and the head stay where they lie: tokens come to them, not they to tokens.
    """
    axes = decoder.logical_axes(config)["layers"]
    whole = {**rules, "embed": None}

    def bring(path: tuple[Any, ...], weight: Any, logical: tuple[str | None, ...]) -> Any:
        if not per_layer.keeps_dtype(path):  # cast first: half as much travels
            weight = weight.astype(dtype)
        if not is_kernel(weight):
            weight = constrain(weight, logical, rules)
        return jax.tree.map(lambda leaf: constrain(leaf, logical, whole), weight)

    with jax.named_scope(decoder.WEIGHTS):
        layers = jax.tree_util.tree_map_with_path(bring, params["layers"], axes, is_leaf=is_kernel)
    return {**params, "layers": layers}


def told_before(
    teacher: Any, params: Any, state: Any, batch: Batch, of_one: OfOne
) -> tuple[Callable, Any]:
    """(part -> `of_one` of a teacher that has read the whole batch, what parts are cut out of).

    Arguments as in `methods.routed.asked`; the teacher is one.
    """
    assert not isinstance(teacher, Routed), "the configuration says so"
    rows, of = _by_rows(teacher(params, state, batch))

    def of_part(part: Any, *more: Any) -> Any:
        own, said = part
        return of_one(lambda *_: of(said), None, own, *more)

    return of_part, (batch, rows)


def _by_rows(signal: TeacherSignal) -> tuple[Any, Callable[[Any], TeacherSignal]]:
    """(what a signal says of each row, a tree whose first dims are rows; the signal of some rows).

    Heads are of no row: every part has the same.
    """
    outputs = signal.outputs
    if outputs is None:
        return signal.known, lambda known: dataclasses.replace(signal, known=known)
    rows_first = lambda taps: None if taps is None else jnp.swapaxes(taps, 0, 1)
    rows = (outputs.hidden, rows_first(outputs.taps), outputs.relations, signal.known)

    def of(part: Any) -> TeacherSignal:
        hidden, taps, relations, known = part
        said = dataclasses.replace(
            outputs, hidden=hidden, taps=rows_first(taps), relations=relations
        )
        return dataclasses.replace(signal, outputs=said, known=known)

    return rows, of
