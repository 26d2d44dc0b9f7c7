"""Models in whole numbers: int8 and int4 after training, and training that knows of it.

Qwix' own way in, `quantize_model`, replaces operations of a module while it is called, which needs
modules that keep their place between calls; our layers are made anew from arrays inside a scan. So
its numbers and its products are used (`qwix.quantize`, `qwix.QArray`, `qwix.dot_general`), and the
kernels carry them: see `models.quantized`. Embedding, head, norms and biases stay as they are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.models import Model
from jaxdistill.models.kernel import array, is_kernel
from jaxdistill.models.quantized import (
    SCHEMES,
    AwareKernel,
    QuantizedKernel,
    Scheme,
    is_projection,
    quantize,
    scale_place,
)


def scheme_of(name: str) -> Scheme:
    """The scheme of a name: int8 and int4 round weights, int8_dynamic inputs too.

    Raises:
      ConfigError: for another name.
    """
    if name not in SCHEMES:
        raise ConfigError(f"quantisation = {name!r}: must be one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def quantized(model: Model, name: str, dtype: DTypeLike | None = None) -> Model:
    """The model with its layers' kernels in whole numbers.

    Args:
      model: in floating point.
      name: a scheme: int8, int4 or int8_dynamic.
      dtype: of everything else, scales included; None keeps the model's.

    Raises:
      ConfigError: for an unknown scheme, groups that do not divide, a model that is quantised
        already, or a backend that cannot run the products.
    """
    scheme = scheme_of(name)
    if any(map(is_kernel, jax.tree.leaves(model.params, is_leaf=is_kernel))):
        raise ConfigError(
            f"quantisation: {model.source} is quantised already: use the model it was"
        )
    check_backend(name)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract(model.params, scheme, dtype))
    make = jax.jit(functools.partial(_turned, scheme=scheme, dtype=dtype), out_shardings=places)
    return dataclasses.replace(model, params=make(model.params), source=f"{name} of {model.source}")


def abstract(params: Any, scheme: Scheme, dtype: DTypeLike | None = None) -> Any:
    """The shapes and places of quantised parameters, from those of the same in floating point."""
    shape: Callable[[Any, Any], Any] = lambda one, place: jax.ShapeDtypeStruct(
        one.shape, one.dtype, sharding=place
    )

    def placed(leaf, made):
        if not is_kernel(made):
            return shape(made, leaf.sharding)
        scale = shape(made.scale, scale_place(leaf.sharding, made.scale.shape))
        return QuantizedKernel(shape(made.values, leaf.sharding), scale, made.scheme)

    made = jax.eval_shape(functools.partial(_turned, scheme=scheme, dtype=dtype), params)
    return jax.tree.map(placed, params, made)


def _turned(params: Any, scheme: Scheme, dtype: DTypeLike | None) -> Any:
    def turn(path, leaf):
        leaf = leaf if dtype is None else leaf.astype(dtype)
        return quantize(leaf, scheme) if _is_projection(path) else leaf

    return jax.tree_util.tree_map_with_path(turn, params)


def aware(params: Any, name: str) -> Any:
    """Parameters whose kernels compute as if quantised, with gradients to themselves.

    For quantisation-aware distillation: applied to the student inside the loss, it costs no memory
    beyond one layer's rounded kernels at a time.
    """
    scheme = scheme_of(name)

    def turn(path, leaf):
        return AwareKernel(leaf, scheme) if _is_projection(path) else leaf

    return jax.tree_util.tree_map_with_path(turn, params)


def dequantized(model: Model) -> Model:
    """The model in floating point again, with the rounded values; inputs are not rounded."""
    return dataclasses.replace(model, params=in_floats(model.params))


def in_floats(params: Any) -> Any:
    """Parameters with every kernel as an array."""
    return jax.tree.map(array, params, is_leaf=is_kernel)


def check_backend(name: str, *, in_step: bool = False) -> None:
    """The products of a scheme compile and run on this backend.

    Args:
      name: of the scheme.
      in_step: as arguments of a program that is compiled before it runs, as a training step is.

    Raises:
      ConfigError: naming scheme, backend and what the compiler said.
    """
    scheme = scheme_of(name)
    # It lays their arrays out otherwise than the compiled program asks for them.
    if in_step and scheme.bits == 4 and jax.__version_info__ < (0, 11):
        raise ConfigError(
            f"quantisation = {name!r}: JAX {jax.__version__} gives a compiled step no arrays of 4 "
            "bits: use int8, or JAX 0.11 or newer (Python 3.12)"
        )
    kernel = quantize(jnp.ones((scheme.group or 32, 32)), scheme)
    try:
        jax.block_until_ready(
            jax.jit(lambda x: kernel.dot(x))(jnp.ones((8, kernel.values.shape[0])))
        )
    except ConfigError:
        raise
    except Exception as error:  # compilers raise many kinds; each means that it cannot run here
        raise ConfigError(
            f"quantisation = {name!r}: {jax.default_backend()} cannot run it "
            f"({str(error).splitlines()[0][:200]}): choose another of {', '.join(SCHEMES)}"
        ) from error


def _is_projection(path: tuple) -> bool:
    """Whether a leaf is the kernel of one of the layers' projections."""
    return is_projection(".".join(part.key for part in path))
