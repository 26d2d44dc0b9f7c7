"""Fused operations: one definition, one API, exact in value and gradient.

    divergence/          reference (the definition), fused (statistics forward, slopes backward)
    linear_divergence/   reference (the definition), fused > mesh > walk > chunk
    both                 token_loss > statistics, mosaic_gpu; rows, softcap

`implementation="reference"` runs the definition, None the fused form with the best statistics.
"""

from jaxdistill.kernels.choice import support
from jaxdistill.kernels.divergence import divergence
from jaxdistill.kernels.linear_divergence import linear_divergence

__all__ = ["divergence", "linear_divergence", "support"]
