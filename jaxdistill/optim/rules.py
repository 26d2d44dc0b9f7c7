"""The rules by which a gradient becomes an update: AdamW, Lion, Adafactor and Muon, all of Optax.

Each ends in p = p - lr (u + weight_decay p), with the decay on matrices alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from optax import contrib

from jaxdistill.errors import ConfigError
from jaxdistill.ranges import OPTIMIZER as DEFAULTS
from jaxdistill.ranges import UNREAD

NAMES = ("adamw", "lion", "adafactor", "muon")
# Muon's updates have this root mean square, as AdamW's have it, so that its learning rates serve.
_MUON_RMS = 0.2


def rule(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    moments: DTypeLike,
) -> optax.GradientTransformation:
    """The named rule.

        adamw       u = m_hat / (sqrt(v_hat) + eps)
        lion        u = sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g
        adafactor   u = g / sqrt(v), v a row and a column for each matrix; its mean square at most 1
        muon        u = m with all singular values near 1, of kernels; AdamW of all else

    Muon's momenta are Nesterov's, and so is that of its AdamW.

    Args:
      name: of `NAMES`.
      learning_rate: a number, or update number (from 0) -> number.
      betas: decay of the moments; adafactor has its own, 1 - n^-0.8, and muon 0.95.
      eps: of adamw, and of what muon leaves to it.
      weight_decay: decoupled; of the leaves that `decays` names.
      moments: type of the first moment; the second is float32. In bfloat16 half of AdamW's memory
        for the first is saved.

    Raises:
      ConfigError: for another name, or an option that the rule does not read (`ranges.UNREAD`) and
        that has not its default.

    Reference: Loshchilov, Hutter 2017, arXiv 1711.05101; Chen et al. 2023, arXiv 2302.06675;
    Shazeer, Stern 2018, arXiv 1804.04235; Jordan et al. 2024 (Muon), scaled as in arXiv 2502.16982.
    """
    given = {"betas": tuple(betas), "eps": eps, "moments": jnp.dtype(moments).name}
    for option in UNREAD.get(name, ()):
        if given[option] != DEFAULTS[option]:
            raise ConfigError(
                f"{option} = {given[option]}: has no effect with name = {name!r}; leave it out"
            )
    b1, b2 = betas
    decay: dict[str, Any] = {"weight_decay": weight_decay, "mask": decays}
    if name == "adamw":
        return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, mu_dtype=moments, **decay)
    if name == "lion":
        return optax.lion(learning_rate, b1=b1, b2=b2, mu_dtype=moments, **decay)
    if name == "adafactor":
        direction = optax.adafactor(None, multiply_by_parameter_scale=False)
    elif name == "muon":
        direction = contrib.muon(
            1.0, eps=eps, adam_b1=b1, adam_b2=b2, mu_dtype=moments, consistent_rms=_MUON_RMS,
            muon_weight_dimension_numbers=_matrices,
        )  # fmt: skip
    else:
        raise ConfigError(f"optimizer.name = {name!r}: must be one of {', '.join(NAMES)}")
    # These have a sign already: the direction is -u.
    shrink = optax.add_decayed_weights(-weight_decay, decays)
    rate = optax.scale_by_learning_rate(learning_rate, flip_sign=False)
    return optax.chain(direction, shrink, rate)


def decays(params: Any) -> Any:
    """Which leaves decay: matrices and embeddings, never biases, norm scales or single numbers.

    Nothing of the objective's own decays: a decayed temperature would drift to its middle.

    Layers are stacked on a first dim, so a bias may have two: names tell, not the number of dims.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> bool:
        if getattr(path[0], "key", None) == "objective":
            return False
        return getattr(path[-1], "key", None) not in ("bias", "scale") and leaf.ndim >= 2

    return jax.tree_util.tree_map_with_path(one, params)


def _matrices(params: Any) -> Any:
    """Muon's leaves: kernels [layers, ..., in, out] of the student; the others' are AdamW's."""
    sides = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [getattr(key, "key", None) for key in path]
        inside = names[0] != "objective" and "layers" in names and names[-1] == "kernel"
        return sides if inside and leaf.ndim >= 3 else None

    return jax.tree_util.tree_map_with_path(one, params)
