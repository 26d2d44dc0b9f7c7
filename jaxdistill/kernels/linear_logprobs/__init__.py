"""What a head says of given tokens and sets of tokens, chunk by chunk: no logits [N, V]."""

from jaxdistill.kernels.linear_logprobs.api import linear_logprobs
from jaxdistill.kernels.linear_logprobs.outputs import Logprobs

__all__ = ["Logprobs", "linear_logprobs"]
