"""What is asked of each row of logits, and the answer."""

import dataclasses
from typing import NamedTuple

from jax import Array

from jaxdistill.kernels.linear_divergence.chunk import Static
from jaxdistill.kernels.linear_divergence.mesh import Layout


class Logprobs(NamedTuple):
    """Per token, float32 and in nats; 0 or -1 for a token that the mask leaves out.

    Attributes:
      logprobs: log q of the given ids, in their shape; None without ids.
      entropy: -sum_v q_v log q_v, [...].
      log_sum_exp: log sum_v e^(s_v / T), [...].
      argmax: int32, the most likely token, of equal ones the lowest, [...]; no gradient.
      log_masses: log of the mass of each set, [..., M]; None without sets.
      top_ids: int32, the most likely tokens, descending, [..., top_k]; no gradient. None without.
      top_logprobs: log q of these, [..., top_k].
    """

    logprobs: Array | None
    entropy: Array
    log_sum_exp: Array
    argmax: Array
    log_masses: Array | None
    top_ids: Array | None
    top_logprobs: Array | None


class Residuals(NamedTuple):
    """What the way back needs of each row beside the operands, so that it reduces nothing.

    Attributes:
      top: the largest logit, [...].
      log_sum: log sum_v e^((s_v - top) / T), [...].
      entropy: [...].
      log_masses: of `logprob_rows.log_mass`, [..., M], or None.
      top_ids: [..., top_k], or None.
    """

    top: Array
    log_sum: Array
    entropy: Array
    log_masses: Array | None
    top_ids: Array | None


class Cotangents(NamedTuple):
    """Of a `Logprobs`, float32; None where nothing depends on the number."""

    logprobs: Array | None = None
    entropy: Array | None = None
    log_sum_exp: Array | None = None
    log_masses: Array | None = None
    top_logprobs: Array | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """The static arguments of a call.

    Attributes:
      static: in which pieces the tokens are walked.
      place: where tokens and vocabulary lie.
      top_k: how many of the most likely tokens are asked for.
    """

    static: Static
    place: Layout
    top_k: int
