"""Kernels in few bits, and kernels that are trained to become such: leaves of the parameters.

Either stands where a projection's kernel array stands, goes through `lax.scan` like one, and says
itself how a vector is multiplied by it; the decoder asks nothing else of it.
"""

import dataclasses
import fnmatch
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.models.architecture import DecoderConfig, Weight, flat_weights, weights
from jaxdistill.models.kernel import Kernel


class Scheme(NamedTuple):
    """Which numbers a kernel is rounded to.

    Attributes:
      bits: of a weight, 4 or 8; symmetric around 0.
      group: inputs that share a scale, per output; None: all of them.
      dynamic: inputs are rounded to 8 bits too, with a scale per token measured as they come.
      kind: "int", whole numbers, or "float", e4m3 (Micikevicius et al. 2022, arXiv 2209.05433).
    """

    bits: int
    group: int | None = None
    dynamic: bool = False
    kind: str = "int"

    @property
    def dtype(self) -> Any:
        """Of the rounded weights."""
        if self.kind == "float":
            return jnp.float8_e4m3fn
        return jnp.int4 if self.bits == 4 else jnp.int8


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(8),
    "int4": Scheme(4, group=64),
    "int8_dynamic": Scheme(8, dynamic=True),
    "float8": Scheme(8, kind="float"),
    "float8_dynamic": Scheme(8, dynamic=True, kind="float"),
}
NONE = "none"  # in place of a scheme: in floating point as it is


class Quantization(NamedTuple):
    """Which kernels are rounded, and by which scheme each.

    Attributes:
      scheme: of the projections that no pattern names; None leaves them as they are.
      exceptions: (pattern, scheme), of which the first that matches holds: as a shell matches
        files, the name of a projection in its layer, such as mlp.down or attention.*; of every
        layer alike.
    """

    scheme: Scheme | None
    exceptions: tuple[tuple[str, Scheme | None], ...] = ()

    def of(self, name: str) -> Scheme | None:
        """The scheme of a weight by its dotted name; None: it stays as it is."""
        if not is_projection(name):
            return None
        for pattern, scheme in self.exceptions:
            if fnmatch.fnmatchcase(in_layer(name), pattern):
                return scheme
        return self.scheme

    def table(self, config: DecoderConfig) -> dict[str, Scheme | None]:
        """The scheme of every projection of a model by its dotted name."""
        return {name: self.of(name) for name in projections(config)}

    @property
    def schemes(self) -> list[Scheme]:
        """All that it names, each once."""
        named = (self.scheme, *(scheme for _, scheme in self.exceptions))
        return list(dict.fromkeys(one for one in named if one is not None))

    def __str__(self) -> str:
        more = (f"{pattern}={name_of(scheme)}" for pattern, scheme in self.exceptions)
        return ", ".join((name_of(self.scheme), *more))


def named(scheme: str, exceptions: Sequence[str] = ()) -> Quantization:
    """The quantisation that a scheme's name and exceptions such as mlp.down=none mean.

    Raises:
      ConfigError: for a name that is none.
    """
    pairs = [text.rpartition("=") for text in exceptions]
    return Quantization(
        _scheme(scheme), tuple((pattern, _scheme(one)) for pattern, _, one in pairs)
    )


def _scheme(name: str) -> Scheme | None:
    if name != NONE and name not in SCHEMES:
        raise ConfigError(f"quantisation = {name!r}: must be one of {', '.join(SCHEMES)}")
    return SCHEMES.get(name)


def name_of(scheme: Scheme | None) -> str:
    """The name of a scheme; of one that has none its bits."""
    if scheme is None:
        return NONE
    names = [name for name, one in SCHEMES.items() if one == scheme]
    return names[0] if names else f"{scheme.kind}{scheme.bits} in groups of {scheme.group}"


def projections(config: DecoderConfig) -> dict[str, Weight]:
    """The kernels of a model's layers by their dotted names: what can be rounded."""
    table = flat_weights(weights(config))
    return {name: row for name, row in table.items() if is_projection(name)}


def is_projection(name: str) -> bool:
    """Whether a weight, by its dotted name, is the kernel of one of the layers' projections."""
    return name.startswith("layers.") and name.endswith(".kernel")


def in_layer(name: str) -> str:
    """What a projection is called in its layer: mlp.down of layers.mlp.down.kernel."""
    return name.removeprefix("layers.").removesuffix(".kernel")


def qwix() -> Any:
    """The library that quantises.

    Raises:
      ConfigError: if it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(
            "quantisation: needs qwix, which is not installed: pip install 'jaxdistill[quant]'"
        ) from error
    return qwix


# `no_type_check`: scan and nnx rebuild leaves with stacked arrays or shapes in place of arrays.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel(Kernel):
    """values * scale, with values [..., in, out] of few bits and scales [..., groups, out]."""

    values: Array
    scale: Array
    scheme: Scheme = dataclasses.field(default=Scheme(8), metadata={"static": True})

    def dot(self, x: Array) -> Array:
        """x @ (values * scale), for x [..., in]; in the dtype of x.

        The gradient of x is that of the product with the rounded kernel, as if x was not rounded;
        the kernel has none. What waits for the backward pass are the rounded numbers.
        """
        return _dot(x, self)

    def astype(self, dtype: DTypeLike) -> "QuantizedKernel":
        """The same kernel: rounded numbers have no other dtype, and scales stay as they are."""
        return self

    def dequantized(self) -> Array:
        """The kernel as an array."""
        return qwix().dequantize(self._array())

    def _array(self) -> Any:
        return qwix().QArray(qvalue=self.values, scale=self.scale)


@jax.custom_vjp
def _dot(x: Array, kernel: QuantizedKernel) -> Array:
    # Rounded numbers become floats where they are multiplied, layer by layer: without an order XLA
    # converts those of all layers first, and a step of decoding writes the model in floats.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    if len(kernel.scale) > 1:
        return jax.lax.platform_dependent(x, kernel, cpu=_by_halves, default=_by_qwix)
    scale = kernel.scale.reshape((1,) * (x.ndim - 1) + (-1,))
    if not kernel.scheme.dynamic:
        values = kernel.values.astype(x.dtype)
        return (_product(x, values, jnp.float32) * scale).astype(x.dtype)
    read = _rounded(x, kernel.scheme)
    dtype = jnp.int32 if kernel.scheme.kind == "int" else jnp.float32
    sums = _product(read.qvalue, kernel.values, dtype).astype(jnp.float32)
    return (sums * read.scale * scale).astype(x.dtype)


def _product(x: Array, values: Array, dtype: DTypeLike) -> Array:
    return jax.lax.dot_general(x, values, _last(x), preferred_element_type=dtype)


def _by_qwix(x: Array, kernel: QuantizedKernel) -> Array:
    return qwix().dot_general(x, kernel._array(), _last(x)).astype(x.dtype)


def _by_halves(x: Array, kernel: QuantizedKernel) -> Array:
    """The same product where a byte holds two numbers and none is read alone: on CPUs.

    Columns 2 j and 2 j + 1 of an int4 kernel share a byte: two kernels of half as many columns.
    """
    inputs, outputs = kernel.values.shape
    if kernel.scheme.bits != 4 or outputs % 2:
        return _by_qwix(x, kernel)
    both = jax.lax.bitcast_convert_type(kernel.values.reshape(inputs, -1, 2), jnp.int8)
    halves = (both << 4) >> 4, both >> 4
    # XLA multiplies several rows by a kernel for each group several times slower.
    product = _by_groups if math.prod(x.shape[:-1]) == 1 else _by_scaled
    parts = [
        product(x, half.astype(x.dtype), kernel.scale[:, place::2])
        for place, half in enumerate(halves)
    ]
    return jnp.stack(parts, axis=-1).reshape(*x.shape[:-1], outputs).astype(x.dtype)


def _by_groups(x: Array, values: Array, scale: Array) -> Array:
    """x @ (values * scale), where the product of each group is scaled, and not the values."""
    groups, outputs = scale.shape
    sums = jnp.einsum(
        "...gk,gkn->...gn",
        x.reshape(*x.shape[:-1], groups, -1),
        values.reshape(groups, -1, outputs),
        preferred_element_type=jnp.float32,
    )
    return (sums * scale.reshape((1,) * (sums.ndim - 2) + scale.shape)).sum(-2)


def _by_scaled(x: Array, values: Array, scale: Array) -> Array:
    groups, outputs = scale.shape
    scaled = values.reshape(groups, -1, outputs) * scale[:, None].astype(x.dtype)
    return x @ scaled.reshape(-1, outputs)


def _dot_forward(x: Array, kernel: QuantizedKernel) -> tuple[Array, QuantizedKernel]:
    return _dot(x, kernel), kernel


def _dot_backward(kernel: QuantizedKernel, slope: Array) -> tuple[Array, None]:
    # Without this rule a scan over layers keeps every layer's kernel in floating point.
    return slope @ kernel.dequantized().astype(slope.dtype).T, None


_dot.defvjp(_dot_forward, _dot_backward)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AwareKernel(Kernel):
    """A float kernel that computes as its quantised form would, and learns as if it did not.

        y = x @ (w + stop_gradient(dequantize(quantize(w)) - w))

    Reference: the straight-through estimator, Bengio, Leonard, Courville 2013, arXiv 1308.3432.
    """

    kernel: Array
    scheme: Scheme = dataclasses.field(default=Scheme(8), metadata={"static": True})

    def dot(self, x: Array) -> Array:
        """x @ kernel with rounded numbers, for x [..., in]."""
        if self.scheme.dynamic:
            x = _through(x, qwix().dequantize(_rounded(x, self.scheme)))
        return x @ self.dequantized()

    def dequantized(self) -> Array:
        """The kernel as an array of rounded numbers, whose gradient is the kernel's."""
        return _through(self.kernel, quantize(self.kernel, self.scheme).dequantized())

    def astype(self, dtype: DTypeLike) -> "AwareKernel":
        """The kernel in another dtype."""
        return dataclasses.replace(self, kernel=self.kernel.astype(dtype))


def quantize(kernel: Array, scheme: Scheme) -> QuantizedKernel:
    """A kernel [..., in, out] in numbers of few bits; the scales have its dtype.

    Raises:
      ConfigError: if groups do not divide the inputs.
    """
    inputs = kernel.shape[-2]
    if scheme.group and inputs % scheme.group:
        raise ConfigError(
            f"quantisation: groups of {scheme.group} do not divide a projection of {inputs} "
            "inputs: use int8, or prune to multiples of the group"
        )
    others = tuple(dim for dim in range(kernel.ndim) if dim != kernel.ndim - 2)
    quantized = qwix().quantize(
        kernel,
        scheme.dtype,
        channelwise_axes=others,
        tiled_axes={kernel.ndim - 2: scheme.group} if scheme.group else {},
    )
    return QuantizedKernel(quantized.qvalue, quantized.scale, scheme)


def quantize_in_place(kernel: Array, scheme: Scheme) -> QuantizedKernel:
    """As `quantize`: every number lies where it lay."""

    def parts(kernel: Array) -> tuple[Array, Array]:
        made = quantize(kernel, scheme)
        return made.values, made.scale

    _, scale = jax.eval_shape(parts, kernel)
    places = kernel.sharding, scale_place(kernel.sharding, scale.shape)
    values, scale = jax.block_until_ready(jax.jit(parts, out_shardings=places)(kernel))
    return QuantizedKernel(values, scale, scheme)


def scale_place(place: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Where the scales [..., groups, out] of a kernel lie: beside its numbers.

    Groups are spread as the kernel's inputs are, where they divide; else every device has all.

    Args:
      place: of the kernel [..., in, out].
      shape: of the scales.
    """
    if place.is_fully_replicated:
        return place
    assert isinstance(place, NamedSharding), place
    axes = [*place.spec, *(None,) * (len(shape) - len(place.spec))]
    names = () if axes[-2] is None else (axes[-2],) if isinstance(axes[-2], str) else axes[-2]
    if shape[-2] % math.prod(place.mesh.shape[name] for name in names):
        axes[-2] = None
    return NamedSharding(place.mesh, PartitionSpec(*axes))


def _rounded(x: Array, scheme: Scheme) -> Any:
    """Inputs as 8-bit numbers with a scale per token."""
    dtype = jnp.int8 if scheme.kind == "int" else scheme.dtype
    return qwix().quantize(x, dtype, channelwise_axes=tuple(range(x.ndim - 1)))


def _last(x: Array) -> Any:
    """Dimension numbers of x [..., in] times a kernel [in, out]."""
    return (((x.ndim - 1,), (0,)), ((), ()))


def _through(value: Array, rounded: Array) -> Array:
    """`rounded`, whose gradient is that of `value`."""
    return value + jax.lax.stop_gradient(rounded.astype(value.dtype) - value)
