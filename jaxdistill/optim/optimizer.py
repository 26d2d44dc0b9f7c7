"""The chain: knobs, clipping, AdamW with decay on matrices alone, learning-rate schedule."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill.errors import ConfigError
from jaxdistill.optim.schedules import knob


def optimizer(
    learning_rate: float | optax.Schedule,
    *,
    knobs: Mapping[str, float | optax.Schedule] | None = None,
    clip_norm: float | None = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """Knobs, then clipping by the global norm, then AdamW.

    Args:
      learning_rate: a number, or update number -> number.
      knobs: name -> number or schedule, see `schedules.knob`.
      clip_norm: largest global gradient norm; None does not clip.
      betas: decay of the first and second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled; only kernels and embeddings decay, never biases or norm scales.

    Reference: Loshchilov, Hutter 2017, arXiv 1711.05101.
    """
    chain = [knob(name, value) for name, value in (knobs or {}).items()]
    if clip_norm is not None:
        chain.append(optax.clip_by_global_norm(clip_norm))
    chain.append(
        optax.adamw(
            learning_rate,
            b1=betas[0],
            b2=betas[1],
            eps=eps,
            weight_decay=weight_decay,
            mask=decays,
            mu_dtype=jnp.float32,
        )
    )
    return optax.chain(*chain)


def decays(params: Any) -> Any:
    """Which leaves decay: those not called bias or scale."""

    def one(path, leaf):
        return getattr(path[-1], "key", None) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(one, params)


def learning_rate(
    shape: str, peak: float, steps: int, *, warmup: int = 0, end_ratio: float = 0.1
) -> optax.Schedule:
    """Linear rise over `warmup` steps to `peak`, then constant, or down to end_ratio * peak.

    Raises:
      ConfigError: for a shape other than constant, linear or cosine, or a warmup that leaves no step.
    """
    if warmup >= steps:
        raise ConfigError(f"optimizer.warmup = {warmup}: must be below train.steps ({steps})")
    falls = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end_ratio * peak, steps - warmup),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup, alpha=end_ratio),
    }
    if shape not in falls:
        raise ConfigError(f"optimizer.schedule = {shape!r}: must be one of {', '.join(falls)}")
    if not warmup:
        return falls[shape]()
    # The first update moves already: (step + 1) / warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, falls[shape]()], [warmup])
