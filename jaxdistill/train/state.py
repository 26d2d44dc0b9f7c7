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

from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.sharding import RULES, MeshAxes, replicated, shardings


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One value, donated to every step and replaced by what the step returns.

    Attributes:
      step: int32, batches consumed so far.
      params: {"student": the model, "objective": what the objective trains of its own}.
      opt_state: of the whole chain, the knobs among it.
      key: uint32 key data; `jax.random.wrap_key_data` makes a key of it.
      skipped: int32 [2], steps with non-finite numbers: in a row until now, and altogether.
    """

    step: Array
    params: Any
    opt_state: Any
    key: Array
    skipped: Array


def create(
    student: Any, objective: Any, tx: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step; the student's arrays become part of it, not copies.

    Every optimizer moment lies on the mesh like the parameter it belongs to.
    """
    whole = replicated(mesh)
    objective = jax.device_put(objective, whole)
    params = {"student": student, "objective": objective}
    places = _opt_shardings(tx, params, mesh)
    rest = {
        "step": jnp.int32(0),
        "key": jax.random.key_data(jax.random.key(seed)),
        "skipped": jnp.zeros(2, jnp.int32),
    }
    with jax.set_mesh(mesh):
        opt_state = jax.jit(tx.init, out_shardings=places)(params)
    return TrainState(params=params, opt_state=opt_state, **jax.device_put(rest, whole))


def abstract(
    config: DecoderConfig,
    dtype: Any,
    objective: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Mapping[str, MeshAxes] = RULES,
) -> TrainState:
    """The state's shapes, dtypes and places, without reading or making a parameter."""
    whole = replicated(mesh)
    student = abstract_params(config, dtype, mesh, rules)
    params = {"student": student, "objective": _placed(objective, whole)}
    opt_state = _placed(jax.eval_shape(tx.init, params), _opt_shardings(tx, params, mesh))
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return TrainState(
        step=_placed(jax.ShapeDtypeStruct((), jnp.int32), whole),
        params=params,
        opt_state=opt_state,
        key=_placed(key, whole),
        skipped=_placed(jax.ShapeDtypeStruct((2,), jnp.int32), whole),
    )


def abstract_params(
    config: DecoderConfig, dtype: Any, mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES
) -> Any:
    """The shapes and places of a model's parameters."""
    shapes = decoder.shapes(config, dtype)
    return _placed(shapes, shardings(mesh, decoder.logical_axes(config), shapes, rules))


def _opt_shardings(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    whole = replicated(mesh)
    state = jax.eval_shape(tx.init, params)
    return optax.tree_utils.tree_map_params(
        tx.init,
        lambda _, param: param.sharding,
        state,
        params,
        transform_non_params=lambda _: whole,
    )


def _placed(tree: Any, places: Any) -> Any:
    """Shapes with a sharding each: from a tree of shardings, or one for all."""
    if isinstance(places, jax.sharding.Sharding):
        one = places
        places = jax.tree.map(lambda _: one, tree)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, places)
