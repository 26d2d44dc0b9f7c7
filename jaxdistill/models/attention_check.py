"""Compares the attention kernel that a run will use with XLA's form, before it starts."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.models import attention, attention_ring_tpu
from jaxdistill.models.architecture import DecoderConfig

_LENGTH, _WINDOW = 256, 100


def self_check(
    who: str, name: str, config: DecoderConfig, length: int, dtype: DTypeLike = jnp.bfloat16
) -> str:
    """Compares value and gradient of the chosen kernel with XLA's, by XLA's own rounding.

    Both are compared with float32 on two rows of several documents, with one group of the model's
    heads, its soft cap, and a window where it has any.

    Args:
      who: "teacher" or "student", for the message.
      name: one of `attention.IMPLEMENTATIONS`.
      config: of the model.
      length: tokens of its rows in the run.
      dtype: of its activations.

    Returns:
      What computes it, as in `attention.of_form`; only kernels are compared. Those of a ring are
      with the parts of two devices on one.

    Raises:
      ConfigError: if the kernel is further off than four times XLA's form in the same dtype.
    """
    form = attention.chosen(name, config, length, dtype)
    if form not in attention.KERNELS:
        return form
    ring = form == "ring-splash"
    windowed = not ring and config.windows and any(config.windows)
    small = dataclasses.replace(
        config,
        heads=config.heads // config.kv_heads,
        kv_heads=1,
        layers=1,
        windows=(_WINDOW,) if windowed else None,
        turned=None,
    )
    length = 2 * _LENGTH if ring else _LENGTH  # two chunks of 128 tokens for each device
    for what, (off, allowed) in errors(form, small, length, dtype).items():
        if not off <= allowed:
            raise ConfigError(
                f"the {who}'s attention {form} computes something else than XLA's on this device: "
                f"its {what} is off by {off:.1e} (allowed {allowed:.1e}). Set "
                f"{who}.attention: xla to go on without it, and please report it"
            )
    return form


def errors(
    form: str, config: DecoderConfig, length: int, dtype: DTypeLike, interpret: bool = False
) -> dict[str, tuple[float, float]]:
    """How far a form's values and gradients are off, beside what XLA's rounding allows.

    Two rows of several documents, relative to the largest number, against XLA in float32.

    Args:
      form: as in `attention.of_form`; "ring-splash" without a mesh.
      config: of the model, whose first layer it is.
      length: tokens of a row.
      dtype: of the activations.
      interpret: as in `attention.of_form`.

    Returns:
      What it is of -> (the form's error, four times that of XLA's form in the same dtype).
    """
    draw = np.random.default_rng(0)
    groups = (config.heads, config.kv_heads, config.kv_heads)
    shapes = [(2, length, heads, config.head_dim) for heads in groups]
    arrays = [jnp.asarray(draw.standard_normal(shape), dtype) for shape in shapes]
    segments = jnp.asarray(np.sort(draw.integers(1, 4, (2, length)), axis=1), jnp.int32)

    def answers(form: str, arrays: list[Array], interpret: bool = False) -> list[np.ndarray]:
        if form == "ring-splash":
            scale = attention.score_scale(config)
            attend = attention_ring_tpu.on_one_device(config, length, scale, interpret)
        else:
            attend = attention.of_form(form, config, length, segments, interpret)
        return _answers(attend, arrays, segments)

    with jax.default_matmul_precision("highest"):  # float32 is rounded by default on TPUs and GPUs
        exact = answers("xla", [x.astype(jnp.float32) for x in arrays])
    rounded, answer = answers("xla", arrays), answers(form, arrays, interpret)
    told = {}
    for what, true, plain, ours in zip(_NAMES, exact, rounded, answer, strict=True):
        off = lambda x, true=true: float(np.abs(x - true).max() / np.abs(true).max())
        told[what] = off(ours), max(4 * off(plain), 1e-5)
    return told


_NAMES = ("values", "gradient by query", "gradient by key", "gradient by value")


def _answers(
    attend: Callable[..., Array], arrays: list[Array], segments: Array
) -> list[np.ndarray]:
    """Mixed values, and the gradients of a weighted sum of them, as float32."""

    def total(*qkv: Array) -> tuple[Array, Array]:
        key, value = (attention.repeated(qkv[0], x) for x in qkv[1:])
        mixed = attend(jnp.int32(0), qkv[0], key, value, segments).astype(jnp.float32)
        weight = jnp.cos(jnp.arange(mixed.size, dtype=jnp.float32)).reshape(mixed.shape)
        return jnp.sum(weight * mixed), mixed

    (_, mixed), slopes = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(x, np.float32) for x in (mixed, *slopes)]
