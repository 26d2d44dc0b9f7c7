"""Low-rank adapters: small matrices beside frozen kernels, trained alone, merged at the end.

    y = x @ (kernel + alpha / rank * down @ up)

In a training step the adapter, and it alone, may read dropout(x) in place of x.

Reference: Hu et al. 2021, arXiv 2106.09685.
"""

import dataclasses
import itertools
import math
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.model_folder import read_json
from jaxdistill.models.architecture import DecoderConfig, Weight, flat_weights, nest, weights
from jaxdistill.models.kernel import Kernel, array, times
from jaxdistill.models.quantized import Quantization, named

FILE = "lora.json"  # in a run's folder of its student
TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which projections have adapters, and of which size.

    Attributes:
      rank: inner width of an adapter.
      alpha: its product is multiplied by alpha / rank.
      targets: of `TARGETS`, in every layer.
      dropout: share of an adapter's inputs that a training step leaves out.
      scheme: of `quantized.SCHEMES`, that the frozen kernels of all layers are held in; None: they
        are in floating point.
      exceptions: to it, such as mlp.down=none.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    scheme: str | None = None
    exceptions: tuple[str, ...] = ()

    @property
    def held(self) -> Quantization | None:
        """What the frozen kernels are rounded to; None: nothing."""
        return None if self.scheme is None else named(self.scheme, self.exceptions)

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank


def read(path: pathlib.Path, config: DecoderConfig) -> tuple[Lora, str]:
    """The adapters that a run's file tells of, and where the model beside them is from.

    Raises:
      ModelError: where the file is damaged.
      ConfigError: where it belongs to another model.
    """
    raw = read_json(path)
    try:
        lora = Lora(
            int(raw["rank"]),
            float(raw["alpha"]),
            tuple(raw["targets"]),
            float(raw.get("dropout", 0)),
            raw.get("scheme"),
            tuple(raw.get("exceptions", ())),
        )
        _ = lora.held  # it raises where there is no such scheme
    except (KeyError, TypeError, ValueError, AttributeError):
        lora = Lora(0, 0.0, ())
    if lora.rank < 1 or not lora.targets or set(lora.targets) - set(TARGETS):
        raise ModelError(f"{path}: is damaged: needs rank, alpha and targets")
    rows(config, lora)
    return lora, str(raw.get("base", ""))


def described(lora: Lora, base: str) -> dict[str, Any]:
    """What `read` reads."""
    return {**dataclasses.asdict(lora), "base": base}


# `no_type_check`: scan and nnx rebuild leaves with stacked arrays or shapes in place of arrays.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraKernel(Kernel):
    """A kernel [..., in, out] with its adapter [..., in, rank] and [..., rank, out].

    The kernel may itself be in whole numbers: only the adapter is trained (Dettmers et al. 2023,
    arXiv 2305.14314).

    With key data [..., 2], one key per kernel, a share `dropout` of the adapter's inputs is 0 and
    the others are divided by 1 - dropout.
    """

    kernel: Any
    down: Array
    up: Array
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    key: Array | None = None

    def dot(self, x: Array) -> Array:
        """x @ kernel + scale * (dropout(x) @ down) @ up, for x [..., in]: never made whole."""
        read = x
        if self.key is not None:
            share = 1 - self.dropout
            keep = jax.random.bernoulli(jax.random.wrap_key_data(self.key), share, x.shape)
            read = jnp.where(keep, x / share, 0)
        return times(x, self.kernel) + self.scale * ((read @ self.down) @ self.up)

    def astype(self, dtype: DTypeLike) -> "LoraKernel":
        """The three in another dtype."""
        names = ("kernel", "down", "up")
        cast = {name: getattr(self, name).astype(dtype) for name in names}
        return dataclasses.replace(self, **cast)

    def dequantized(self) -> Array:
        """The merged kernel, in the kernel's dtype; the product is made in float32."""
        product = jnp.matmul(self.down.astype(jnp.float32), self.up.astype(jnp.float32))
        own = array(self.kernel)
        return (own.astype(jnp.float32) + self.scale * product).astype(own.dtype)


def rows(config: DecoderConfig, lora: Lora) -> dict[str, Weight]:
    """The table of an adapter's weights by dotted name: `....kernel.down` and `....kernel.up`.

    Raises:
      ConfigError: where a target is no projection of this model, or has no inputs to leave out.
    """
    table = {}
    for name, row in flat_weights(weights(config)).items():
        if name.endswith(".kernel") and name.split(".")[-2] in lora.targets:
            if lora.dropout and "experts" in row.axes:
                raise ConfigError(
                    f"student.lora.dropout = {lora.dropout}: {name.split('.')[-2]} belongs to "
                    "experts, whose adapters are added to their kernels: take targets of "
                    "attention, or no dropout"
                )
            *outer, inside, outside = row.shape
            *names, first, last = row.axes
            down, up = (*outer, inside, lora.rank), (*outer, lora.rank, outside)
            table[f"{name}.down"] = Weight(down, (*names, first, None), "normal")
            table[f"{name}.up"] = Weight(up, (*names, None, last), "zeros")
    parts = {name.split(".")[-3] for name in table}
    missing = [target for target in lora.targets if target not in parts]
    if missing:
        raise ConfigError(
            f"student.lora.targets: {missing[0]}: a {config.family} model has no such projection; "
            f"it has {', '.join(sorted(_projections(config)))}"
        )
    return table


def _projections(config: DecoderConfig) -> set[str]:
    names = (name.split(".") for name in flat_weights(weights(config)))
    return {parts[-2] for parts in names if parts[-1] == "kernel" and parts[-2] in TARGETS}


def shapes(config: DecoderConfig, lora: Lora) -> dict:
    """The tree of adapters as `jax.ShapeDtypeStruct`s, float32 whatever the kernels are."""
    table = rows(config, lora).items()
    return nest({name: jax.ShapeDtypeStruct(row.shape, jnp.float32) for name, row in table})


def logical_axes(config: DecoderConfig, lora: Lora) -> dict:
    """The tree of adapters as tuples of logical axis names, for `sharding.shardings`."""
    return nest({name: row.axes for name, row in rows(config, lora).items()})


def init(config: DecoderConfig, lora: Lora, key: Array) -> dict:
    """Adapters that change nothing yet: down uniform in +-1 / sqrt(in), up zero."""
    adapters = {}
    for number, (name, row) in enumerate(rows(config, lora).items()):
        adapters[name] = jnp.zeros(row.shape, jnp.float32)
        if row.initial == "normal":
            bound = 1 / math.sqrt(row.shape[-2])
            own = jax.random.fold_in(key, number)
            adapters[name] = jax.random.uniform(own, row.shape, jnp.float32, -bound, bound)
    return nest(adapters)


def attach(params: Mapping, adapters: Mapping, lora: Lora, key: Array | None = None) -> dict:
    """The parameters with a `LoraKernel` where there is an adapter; no array is copied.

    Args:
      params: of the model.
      adapters: of it.
      lora: what they are.
      key: of a training step, in which dropout is on; every kernel of every layer gets its own.
    """
    number = itertools.count()

    def make(kernel, down, up):
        adapted = LoraKernel(kernel, down, up, lora.scale)
        if key is None or not lora.dropout:
            return adapted
        layers = jax.tree.leaves(kernel)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(key, next(number)), layers)
        return dataclasses.replace(adapted, dropout=lora.dropout, key=jax.random.key_data(keys))

    return _with(params, adapters, make)


def merge(params: Mapping, adapters: Mapping, lora: Lora) -> dict:
    """The parameters with adapters added to their kernels: a model like any other."""
    make = lambda kernel, down, up: LoraKernel(kernel, down, up, lora.scale).dequantized()
    return jax.jit(lambda params, adapters: _with(params, adapters, make))(params, adapters)


def _with(params: Any, adapters: Mapping, make: Callable[..., Any]) -> Any:
    if set(adapters) == {"down", "up"} and not isinstance(params, Mapping):
        return make(params, adapters["down"], adapters["up"])
    return {
        name: _with(leaf, adapters[name], make) if name in adapters else leaf
        for name, leaf in params.items()
    }
