"""Which implementation measures rows of logits: what each one needs, and the best that can run."""

import functools
import importlib.metadata
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks
from jaxdistill.kernels.tiling import ROWS

IMPLEMENTATIONS = ("mosaic_gpu", "xla")  # the best first
FLOATS = ("float32", "bfloat16", "float16")
REFERENCE = "reference"  # of either operation: its definition, never chosen unless named
INTERPRET: Any = None  # tests run the GPU's kernels on a CPU with `plgpu.InterpretGPUParams()`


class Device(NamedTuple):
    """The device that a function is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the device's name, such as "NVIDIA H100 80GB HBM3".
    """

    platform: str
    kind: str


class Support(NamedTuple):
    """Whether an implementation can run, and why or why not."""

    runs: bool
    reason: str


def current_device() -> Device:
    """The device of the mesh in context, which may only be described, or else JAX's first."""
    mesh = jax.sharding.get_abstract_mesh()
    described = None if mesh is None or mesh.empty else mesh.abstract_device
    if described is not None:
        kind = described.device_kind
        return Device(getattr(described, "platform", None) or _platform(kind), kind)
    first = jax.devices()[0]
    return Device(
        {"cuda": "gpu", "rocm": "gpu"}.get(first.platform, first.platform), first.device_kind
    )


def _platform(kind: str) -> str:
    """The platform of a described device; jax 0.10 gives only its name."""
    return "cpu" if kind == "cpu" else "tpu" if "TPU" in kind else "gpu"


def support(
    vocab: int,
    dtype: DTypeLike,
    *,
    device: Device | None = None,
    scalar_temperature: bool = True,
    tokens: int | None = None,
) -> dict[str, Support]:
    """Which implementations of the row statistics run here, and why the others do not.

    The same holds for two models together (`divergence`, `linear_divergence`) and for one alone
    (`linear_logprobs`, cross-entropy, a teacher of whom only a part is known).

    Args:
      vocab: V, columns of the logits.
      dtype: of the logits.
      device: default the one that JAX would use now.
      scalar_temperature: whether one temperature serves all rows.
      tokens: N, rows of logits on a device; None where it is not known.

    Returns:
      name -> (runs, reason), the best first.

    Raises:
      ConfigError: for a vocabulary of no token, or the name of no dtype.
    """
    device = device or current_device()
    checks.whole("vocab", vocab)
    try:
        vocab, dtype = int(vocab), jnp.dtype(dtype).name
    except TypeError as error:
        raise ConfigError(f"dtype = {dtype!r}: must be one of {', '.join(FLOATS)}") from error
    ask = {
        "mosaic_gpu": lambda: _mosaic_gpu(vocab, dtype, device, scalar_temperature, tokens),
        "xla": lambda: None,
    }
    obstacles = {name: ask[name]() for name in IMPLEMENTATIONS}
    return {name: Support(why is None, why or "runs") for name, why in obstacles.items()}


def _mosaic_gpu(
    vocab: int,
    dtype: str,
    device: Device,
    scalar_temperature: bool,
    tokens: int | None,
) -> str | None:
    """Why the Mosaic GPU kernel cannot run, None if it can."""
    version = importlib.metadata.version("jax")
    if tuple(map(int, version.split(".")[:2])) < (0, 11):
        return f"needs jax 0.11 or newer (Python 3.12 or newer); this is jax {version}"
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU; the device is {device.kind} ({device.platform})"
    if capability(device) not in COMPILED_FOR:
        known = ", ".join(f"{major}.{minor}" for major, minor in COMPILED_FOR)
        return f"is compiled and checked for compute capability {known}; not for {device.kind}"
    if dtype not in FLOATS:
        return f"takes logits of {', '.join(FLOATS)}, not {dtype}"
    if vocab % 64:
        return f"needs V to be a multiple of 64, not {vocab}; pad the heads, or slice"
    if tokens is not None and tokens % ROWS and not clips(device):
        return (
            f"needs N to be a multiple of {ROWS} on {device.kind}, whose copies are not bounded by "
            f"the array, not {tokens}; pad the rows, or take `linear_divergence`, which does"
        )
    if not scalar_temperature:
        return "takes one temperature for all rows"
    return None


COMPILED_FOR = ((8, 0), (9, 0), (10, 0))
_CAPABILITIES = {"A100": (8, 0), "H100": (9, 0), "H200": (9, 0), "B200": (10, 0)}


def capability(device: Device) -> tuple[int, int] | None:
    """The compute capability of a GPU, from its name; None for one that is not known."""
    return next((cc for name, cc in _CAPABILITIES.items() if name in device.kind), None)


def clips(device: Device) -> bool:
    """Whether a GPU's bulk copies end where the array ends; before Hopper no copy knows where."""
    found = capability(device)
    return found is not None and found >= (9, 0)


def choose(
    implementation: str | None,
    vocab: int,
    dtype: DTypeLike,
    *,
    device: Device | None = None,
    scalar_temperature: bool = True,
    tokens: int | None = None,
) -> str:
    """The implementation that will run: the named one, or the best that can.

    Raises:
      ConfigError: for an unknown name, or a named one that cannot run; the message says why.
    """
    device = device or current_device()
    states = support(
        vocab,
        dtype,
        device=device,
        scalar_temperature=scalar_temperature,
        tokens=tokens,
    )
    if implementation is None:
        if device.platform == "gpu" and not states["mosaic_gpu"].runs:
            _warn_once(states["mosaic_gpu"].reason)
        return next(name for name, state in states.items() if state.runs)
    if implementation not in states:
        raise ConfigError(
            f"implementation = {implementation!r}: must be one of {', '.join(states)}, "
            f"{REFERENCE}, or None for the best that runs"
        )
    if not states[implementation].runs:
        raise ConfigError(
            f"implementation = {implementation!r} cannot run: {states[implementation].reason}; "
            "None takes the best that runs"
        )
    return implementation


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"XLA serves the distillation losses: mosaic_gpu {reason}", stacklevel=4)


def reads_in_passes(device: Device) -> bool:
    """Whether XLA takes one reduction after the other: a CPU vectorises these, from its cache."""
    return device.platform == "cpu"
