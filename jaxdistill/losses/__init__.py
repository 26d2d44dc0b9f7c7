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
from jaxdistill.losses.filters import (
    init_filters,
    init_projectors,
    project,
    ted_stage1,
    ted_stage2,
)
from jaxdistill.losses.likelihood import cross_entropy, masked_mean, token_log_probability
from jaxdistill.losses.pairs import (
    Response,
    distillm,
    distillm2,
    distillm2_balance,
    distillm2_skew,
    sequence_weights,
)
from jaxdistill.losses.temperature import (
    cosine_lambda,
    ctkd_temperature,
    init_temperature_head,
    reverse_gradient,
    temperature_head,
)
from jaxdistill.losses.whole_rows import (
    adaptive_kl,
    alphanet,
    alphanet_value,
    decoupled_kl,
    detached_skew_reverse_kl,
    smoothed_forward_kl,
    taid,
)
from jaxdistill.types import Mean

__all__ = [
    "Mean",
    "Response",
    "adaptive_kl",
    "alpha_beta_divergence",
    "alpha_divergence",
    "alphanet",
    "alphanet_value",
    "cosine_lambda",
    "cross_entropy",
    "ctkd_temperature",
    "decoupled_kl",
    "detached_skew_reverse_kl",
    "distillm",
    "distillm2",
    "distillm2_balance",
    "distillm2_skew",
    "forward_kl",
    "generalized_jsd",
    "hidden_cosine",
    "hidden_mse",
    "init_filters",
    "init_projectors",
    "init_temperature_head",
    "layer_map",
    "masked_mean",
    "project",
    "relation_kl",
    "reverse_gradient",
    "reverse_kl",
    "sequence_weights",
    "skew_forward_kl",
    "skew_reverse_kl",
    "smoothed_forward_kl",
    "symmetric_kl",
    "taid",
    "ted_stage1",
    "ted_stage2",
    "temperature_head",
    "token_log_probability",
    "total_variation",
]
