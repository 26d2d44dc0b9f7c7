"""The loss from logits [N, V] that exist anyway, with a gradient of its own."""

from jaxdistill.kernels.divergence.api import divergence

__all__ = ["divergence"]
