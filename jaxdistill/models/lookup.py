"""Rows of an embedding table that stays where it lies, and the table's gradient."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.sharding import MeshAxes, constrain, mesh_axes


def lookup(
    table_VD: Array, tokens_BL: Array, dtype: DTypeLike, rules: Mapping[str, MeshAxes]
) -> Array:
    """table[tokens], [B, L, D], of a table that stays where it lies.

    Devices that hold different columns of the table read theirs for the tokens of all of them, and
    then exchange: an all-to-all of what is looked up, and back of its gradient, in place of the
    whole table and a whole gradient. The columns add their gradients up in the table's own dtype.
    """
    columns = mesh_axes(rules["embed"])
    rows = tuple(axis for axis in mesh_axes(rules["batch"]) if axis not in columns)
    apart = {**rules, "batch": rows, "act_embed": rules["embed"]}
    table_VD = constrain(table_VD, ("vocab", "embed"), rules)
    tokens_BL = constrain(tokens_BL, ("batch", "length"), apart)
    x_BLD = take(table_VD, tokens_BL).astype(dtype)
    x_BLD = constrain(x_BLD, ("batch", "length", "act_embed"), apart)
    return constrain(x_BLD, ("batch", "length", "act_embed"), rules)


@jax.custom_vjp
def take(table_VD: Array, ids: Array) -> Array:
    """`jnp.take(table, ids, axis=0)`, [..., D], whose gradient begins when it is needed.

    JAX's own adds to zeros that depend on nothing: XLA makes them first of all, and holds an array
    of the table's size through the whole step.
    """
    return jnp.take(table_VD, ids, axis=0)


def _take_fwd(table_VD: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    # An array of no bytes says how many rows there are.
    return take(table_VD, ids), (ids, jnp.zeros((table_VD.shape[0], 0), table_VD.dtype))


def _take_bwd(kept: tuple[Array, Array], by_rows: Array) -> tuple[Array, None]:
    ids, rows = kept
    zero = jnp.zeros((), rows.dtype)
    zero, by_rows = jax.lax.optimization_barrier((zero, by_rows))
    by_table = jnp.full((rows.shape[0], by_rows.shape[-1]), zero)
    return by_table.at[ids].add(by_rows, mode="drop"), None


take.defvjp(_take_fwd, _take_bwd)
