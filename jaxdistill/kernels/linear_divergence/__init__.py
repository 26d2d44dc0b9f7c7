"""The loss from hidden states and heads, chunk by chunk: logits [N, V] never exist."""

from jaxdistill.kernels.linear_divergence.api import linear_divergence

__all__ = ["linear_divergence"]
