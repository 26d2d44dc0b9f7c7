"""Models in few bits: int8, int4 and float8 after training, and training that knows of it.

Qwix' own way in, `quantize_model`, replaces operations of a module while it is called, which needs
modules that keep their place between calls; our layers are made anew from arrays inside a scan. So
its numbers and its products are used (`qwix.quantize`, `qwix.QArray`, `qwix.dot_general`), and the
kernels carry them: see `models.quantized`. Embedding, head, norms and biases stay as they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdistill import errors, rules
from jaxdistill.errors import ConfigError
from jaxdistill.models import DecoderConfig, Model
from jaxdistill.models.kernel import array, is_kernel
from jaxdistill.models.quantized import (
    AwareKernel,
    Quantization,
    QuantizedKernel,
    Scheme,
    in_layer,
    name_of,
    named,
    projections,
    quantize,
    scale_place,
)

FLOAT8_CAPABILITY = 8.9  # of NVIDIA's GPUs, the first that multiply such numbers


def of(given: Any) -> Quantization | None:
    """The quantisation that an option means.

    Args:
      given: the name of a scheme; a section, or what was written of one, with `scheme` and
        `exceptions`, of a schedule its last scheme; or None.
    """
    if given is None or isinstance(given, Quantization):
        return given
    if isinstance(given, str):
        return named(given)
    if isinstance(given, Mapping):
        return named(given["scheme"], given["exceptions"])
    later = getattr(given, "then", ())
    return named(later[-1].scheme if later else given.scheme, given.exceptions)


def written(given: Any) -> Any:
    """An option as JSON holds it: what `of` reads."""
    if given is None or isinstance(given, str):
        return given
    return {"scheme": given.scheme, "exceptions": list(given.exceptions)}


def check(key: str, wanted: Quantization, config: DecoderConfig) -> None:
    """A quantisation fits a model, before anything of it is read.

    Args:
      key: of the option.
      wanted: what it says.
      config: of the model.

    Raises:
      ConfigError: for a pattern that names no projection, or groups that do not divide the inputs.
    """
    table = projections(config)
    patterns = [pattern for pattern, _ in wanted.exceptions]
    names = [in_layer(name) for name in table]
    errors.check(rules.exceptions_match(key, patterns, config.family, names))
    for name, row in table.items():
        scheme = wanted.of(name)
        if scheme is not None and scheme.group and row.shape[-2] % scheme.group:
            raise ConfigError(
                f"{key} = {wanted}: groups of {scheme.group} inputs do not divide the "
                f"{row.shape[-2]} inputs of {name.split('.')[-2]}: use int8, or exceptions: "
                f"[{in_layer(name)}=int8]"
            )


def quantized(model: Model, how: str | Quantization, dtype: DTypeLike | None = None) -> Model:
    """The model with its layers' kernels in numbers of few bits.

    Args:
      model: in floating point.
      how: a scheme, such as int8, int4 or float8_dynamic, or which kernels by which.
      dtype: of everything else, scales included; None keeps the model's.

    Raises:
      ConfigError: for an unknown scheme, patterns that match nothing, groups that do not divide, a
        model that is quantised already, or a backend that cannot run the products.
    """
    wanted = named(how) if isinstance(how, str) else how
    if any(map(is_kernel, jax.tree.leaves(model.params, is_leaf=is_kernel))):
        raise ConfigError(
            f"quantisation: {model.source} is quantised already: use the model it was"
        )
    check("quantisation", wanted, model.config)
    check_backend(wanted)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract(model.params, wanted, dtype))
    make = jax.jit(functools.partial(_turned, wanted=wanted, dtype=dtype), out_shardings=places)
    return dataclasses.replace(
        model, params=make(model.params), source=f"{wanted} of {model.source}"
    )


def abstract(params: Any, wanted: Quantization, dtype: DTypeLike | None = None) -> Any:
    """The shapes and places of quantised parameters, from those of the same in floating point."""
    shape: Callable[[Any, Any], Any] = lambda one, place: jax.ShapeDtypeStruct(
        one.shape, one.dtype, sharding=place
    )

    def placed(leaf, made):
        if not is_kernel(made):
            return shape(made, leaf.sharding)
        scale = shape(made.scale, scale_place(leaf.sharding, made.scale.shape))
        return QuantizedKernel(shape(made.values, leaf.sharding), scale, made.scheme)

    made = jax.eval_shape(functools.partial(_turned, wanted=wanted, dtype=dtype), params)
    return jax.tree.map(placed, params, made)


def _turned(params: Any, wanted: Quantization, dtype: DTypeLike | None) -> Any:
    def turn(path, leaf):
        leaf = leaf if dtype is None else leaf.astype(dtype)
        scheme = wanted.of(_name(path))
        return leaf if scheme is None else quantize(leaf, scheme)

    return jax.tree_util.tree_map_with_path(turn, params)


def aware(params: Any, wanted: Quantization) -> Any:
    """Parameters whose kernels compute as if quantised, with gradients to themselves.

    For quantisation-aware distillation: applied to the student inside the loss, it costs no memory
    beyond one layer's rounded kernels at a time.
    """

    def turn(path, leaf):
        scheme = wanted.of(_name(path))
        return leaf if scheme is None else AwareKernel(leaf, scheme)

    return jax.tree_util.tree_map_with_path(turn, params)


def dequantized(model: Model) -> Model:
    """The model in floating point again, with the rounded values; inputs are not rounded."""
    return dataclasses.replace(model, params=in_floats(model.params))


def in_floats(params: Any) -> Any:
    """Parameters with every kernel as an array."""
    return jax.tree.map(array, params, is_leaf=is_kernel)


def check_backend(wanted: Quantization, *, in_step: bool = False, device: Any = None) -> None:
    """The products of every scheme compile and run on this backend.

    Args:
      wanted: what kernels are rounded to.
      in_step: as arguments of a program that is compiled before it runs, as a training step is.
      device: one that is only described; None: this backend's first.

    Raises:
      ConfigError: naming scheme, backend and what the compiler said.
    """
    for scheme in wanted.schemes:
        _check_scheme(scheme, in_step, jax.devices()[0] if device is None else device)


def _check_scheme(scheme: Scheme, in_step: bool, device: Any) -> None:
    name = name_of(scheme)
    # It lays their arrays out otherwise than the compiled program asks for them.
    if in_step and scheme.bits == 4 and jax.__version_info__ < (0, 11):
        raise ConfigError(
            f"quantisation = {name!r}: JAX {jax.__version__} gives a compiled step no arrays of 4 "
            "bits: use int8, or JAX 0.11 or newer (Python 3.12)"
        )
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if scheme.kind == "float" and capability and float(capability) < FLOAT8_CAPABILITY:
        raise ConfigError(
            f"quantisation = {name!r}: {device.device_kind} has compute capability {capability}, "
            f"and float8 needs {FLOAT8_CAPABILITY}: use int8"
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
            f"({str(error).splitlines()[0][:200]}): choose another scheme"
        ) from error


def _name(path: tuple) -> str:
    """The dotted name of a leaf of the parameters."""
    return ".".join(part.key for part in path)
