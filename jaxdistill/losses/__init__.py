"""Pure loss functions on arrays, usable in any JAX codebase: [..., V] logits in, [...] out."""

from jaxdistill.losses.divergences import (
    alpha_beta_divergence,
    alpha_divergence,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from jaxdistill.losses.features import hidden_cosine, hidden_mse, layer_map, relation_kl
from jaxdistill.losses.likelihood import cross_entropy, masked_mean, token_log_probability
from jaxdistill.losses.whole_rows import (
    adaptive_kl,
    alphanet,
    alphanet_value,
    decoupled_kl,
    smoothed_forward_kl,
    taid,
)
from jaxdistill.types import Mean

__all__ = [
    "Mean",
    "adaptive_kl",
    "alpha_beta_divergence",
    "alpha_divergence",
    "alphanet",
    "alphanet_value",
    "cross_entropy",
    "decoupled_kl",
    "forward_kl",
    "generalized_jsd",
    "hidden_cosine",
    "hidden_mse",
    "layer_map",
    "masked_mean",
    "relation_kl",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "smoothed_forward_kl",
    "symmetric_kl",
    "taid",
    "token_log_probability",
    "total_variation",
]
