"""A pytree as a flat table of arrays by name, and how two tables differ."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxdistill.errors import ModelError

_SHOWN = 10  # differences listed in an error


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name: the path's keys joined with "/", such as "params/student/head"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves share a name"
    for name, leaf in named.items():
        array = isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
        assert array and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key), (
            f"{name}: {type(leaf).__name__}: a state holds arrays, PRNG keys as key data"
        )
    return named


def check_same(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: pathlib.Path, dtypes: bool = True
) -> None:
    """Compares names, shapes and dtypes of a checkpoint's table with those that are wanted.

    Orbax would cast a wrong dtype silently, and report a wrong name by printing two whole trees.

    Raises:
      ModelError: listing the first ten differences.
    """

    def show(leaf: Any) -> str:
        if leaf is None:
            return "nothing"
        return f"{np.dtype(leaf.dtype).name if dtypes else ''}{list(leaf.shape)}"

    differences = [
        f"  {name}: the checkpoint has {show(stored.get(name))}, this run {show(wanted.get(name))}"
        for name in sorted(stored.keys() | wanted.keys())
        if show(stored.get(name)) != show(wanted.get(name))
    ]
    if differences:
        if len(differences) > _SHOWN:
            differences[_SHOWN:] = [f"  and {len(differences) - _SHOWN} more"]
        raise ModelError(
            f"{folder}: made by another model, optimizer or method:\n"
            + "\n".join(differences)
            + "\nResume with the configuration of its run, or start a new run"
        )
