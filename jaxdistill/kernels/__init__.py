"""Fused operations: one definition, one API, exact in value and gradient.

    divergence/          reference (the definition), fused (statistics forward, slopes backward)
    linear_divergence/   reference (the definition), fused > mesh > walk > chunk
    linear_logprobs/     reference (the definition), fused > walk > rows
    columns/             definition and rows of heads that agree only on listed columns
    sparse/              definition and rows of a teacher of whom only some tokens are known
    all                  token_loss, logprob_rows > measure > statistics, mosaic_gpu > mosaic_stream

`implementation="reference"` runs the definition, None the fused form with the best statistics.
"""

from jaxdistill.kernels.choice import support
from jaxdistill.kernels.divergence import divergence
from jaxdistill.kernels.linear_divergence import linear_divergence
from jaxdistill.kernels.linear_logprobs import Logprobs, linear_logprobs

__all__ = ["Logprobs", "divergence", "linear_divergence", "linear_logprobs", "support"]
