"""What training changes and a checkpoint keeps: parameters, optimizer state, step, random key."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from jaxdistill.compress import quantize
from jaxdistill.models import DecoderConfig, decoder, lora
from jaxdistill.models.lora import Lora
from jaxdistill.sharding import HOST, RULES, MeshAxes, replicated, shardings


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One value, donated to every step and replaced by what the step returns.

    Attributes:
      step: int32, batches consumed so far.
      params: {"student": the model, or its adapters alone, "objective": what the objective trains
        of its own}.
      opt_state: of the whole chain, the knobs among it.
      key: uint32 key data; `jax.random.wrap_key_data` makes a key of it.
      skipped: int32 [2], steps with non-finite numbers: in a row until now, and altogether.
      frozen: the model that adapters stand beside; None where all of the student is trained.
    """

    step: Array
    params: Any
    opt_state: Any
    key: Array
    skipped: Array
    frozen: Any = None


def whole(params: Any, frozen: Any, adapters: Lora | None, key: Array | None = None) -> Any:
    """The parameters as losses take them: adapters beside their kernels, where there are some.

    With a `key` their dropout is on.
    """
    if adapters is None:
        return params
    return {**params, "student": lora.attach(frozen, params["student"], adapters, key)}


def create(
    student: Any,
    objective: Any,
    tx: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    frozen: Any = None,
    *,
    offload: bool = False,
) -> TrainState:
    """The state before the first step; the student's arrays become part of it, not copies.

    Every optimizer moment lies on the mesh like the parameter it belongs to, with `offload` in the
    memory of its device's host; what is frozen has none.
    """
    everywhere = replicated(mesh)
    objective = jax.device_put(objective, everywhere)
    params = {"student": student, "objective": objective}
    places = _opt_shardings(tx, params, mesh, offload)
    rest = {
        "step": jnp.int32(0),
        "key": jax.random.key_data(jax.random.key(seed)),
        "skipped": jnp.zeros(2, jnp.int32),
    }
    with jax.set_mesh(mesh):
        opt_state = jax.jit(tx.init, out_shardings=places)(params)
    return TrainState(
        params=params, opt_state=opt_state, frozen=frozen, **jax.device_put(rest, everywhere)
    )


def abstract(
    config: DecoderConfig,
    dtype: Any,
    objective: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Mapping[str, MeshAxes] = RULES,
    adapters: Lora | None = None,
    offload: bool = False,
) -> TrainState:
    """The state's shapes, dtypes and places, without reading or making a parameter."""
    everywhere = replicated(mesh)
    student, frozen = abstract_params(config, dtype, mesh, rules), None
    if adapters is not None:
        frozen, small = student, lora.shapes(config, adapters)
        if adapters.held is not None:
            frozen = quantize.abstract(frozen, adapters.held)
        axes = lora.logical_axes(config, adapters)
        student = _placed(small, shardings(mesh, axes, small, rules))
    params = {"student": student, "objective": _placed(objective, everywhere)}
    opt_state = _placed(jax.eval_shape(tx.init, params), _opt_shardings(tx, params, mesh, offload))
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return TrainState(
        step=_placed(jax.ShapeDtypeStruct((), jnp.int32), everywhere),
        params=params,
        opt_state=opt_state,
        key=_placed(key, everywhere),
        skipped=_placed(jax.ShapeDtypeStruct((2,), jnp.int32), everywhere),
        frozen=frozen,
    )


def abstract_params(
    config: DecoderConfig, dtype: Any, mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES
) -> Any:
    """The shapes and places of a model's parameters."""
    shapes = decoder.shapes(config, dtype)
    return _placed(shapes, shardings(mesh, decoder.logical_axes(config), shapes, rules))


def _opt_shardings(tx: optax.GradientTransformation, params: Any, mesh: Mesh, offload: bool) -> Any:
    """Moments like their parameters, or on their host; counters and knobs on every device.

    What belongs to a parameter stands at the end of its path: (..., "mu", "student", "embedding").
    """
    everywhere = replicated(mesh)
    own = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        param = next((own[path[i:]] for i in range(len(path)) if path[i:] in own), None)
        # A factored moment is small, without a dim for each of its parameter's.
        if param is None or leaf.shape != param.shape:
            return everywhere
        return param.sharding.with_memory_kind(HOST) if offload else param.sharding

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def _placed(tree: Any, places: Any) -> Any:
    """Shapes with a sharding each: from a tree of shardings, or one for all."""
    if isinstance(places, jax.sharding.Sharding):
        one = places
        places = jax.tree.map(lambda _: one, tree)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, places)
