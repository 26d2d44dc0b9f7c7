"""Pure loss functions on arrays, usable in any JAX codebase: [..., V] logits in, [...] out."""

from jaxdistill.losses.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from jaxdistill.losses.likelihood import cross_entropy, masked_mean, token_log_probability
from jaxdistill.types import Mean

__all__ = [
    "Mean",
    "cross_entropy",
    "forward_kl",
    "generalized_jsd",
    "masked_mean",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
    "token_log_probability",
    "total_variation",
]
