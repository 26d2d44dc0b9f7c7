"""The numbers of losses and their ranges: the parameters of every divergence, and what all take.

And of optimizers: the defaults of what their rules take, and which rule does not read what.
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple


class Range(NamedTuple):
    """What a number may be: its default, and the ends of its range.

    `above` leaves the least value itself out, `below` the most.
    """

    default: float
    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        """Whether the value is a number in the range; NaN and the infinities never are."""
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            return False
        number = float(value)
        low = self.least < number if self.above else self.least <= number
        return low and (number < self.most if self.below else number <= self.most)

    def __str__(self) -> str:
        if math.isinf(self.most):
            if self.least == 0:
                return "positive" if self.above else "at least 0, and finite"
            return f"{'above' if self.above else 'at least'} {self.least:g}"
        first, last = "(" if self.above else "[", ")" if self.below else "]"
        return f"in {first}{self.least:g}, {self.most:g}{last}"


_UNIT = Range(0.5, 0, 1)
_CAP = Range(30.0, 0, math.inf, above=True)
SKEW = Range(0.1, 0, 1)
BALANCE = Range(1.0, 0, 2)  # of DistiLLM-2's two sides: the share of the rejected one
# TAID's own numbers; the step size is that of the mode "paper".
TAID: Mapping[str, Range] = {
    "t_start": Range(0.4, 0, 1),
    "t_end": Range(1.0, 0, 1),
    "step_size": Range(5e-4, 0, 1, above=True),
    "beta": Range(0.99, 0, 1, below=True),
}

# Rows of `kernels.rows`, entry by entry: their parameters may move during a run.
ENTRIES: Mapping[str, Mapping[str, Range]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"weight": _UNIT},
    "generalized_jsd": {"beta": _UNIT},
    "skew_forward_kl": {"skew": SKEW},
    "skew_reverse_kl": {"skew": SKEW},
    "total_variation": {},
    "alpha_divergence": {"alpha": _UNIT},
    "alpha_beta_divergence": {"alpha": Range(0.2, 0, 10), "beta": Range(0.7, 0, 10)},
}
# Functions of `losses.whole_rows`: their parameters are part of the compiled program.
WHOLE_ROWS: Mapping[str, Mapping[str, Range]] = {
    "adaptive_kl": {"mu": _UNIT},
    "alphanet": {"clip": Range(5.0, 0, math.inf, above=True)},
    "decoupled_kl": {"target_weight": Range(1.0, 0, 1e6), "rest_weight": Range(0.5, 0, 1e6)},
    "smoothed_forward_kl": {"target_smoothing": Range(0.1, 0, 1)},
    "logit_mse": {},
}
# What every loss of logits takes beside its own parameters.
COMMON: Mapping[str, Range] = {
    "alpha": Range(0.0, 0, 1),
    "temperature": Range(1.0, 0, math.inf, above=True),
    "taid_t": Range(1.0, 0, 1),
    "label_smoothing": Range(0.0, 0, 1),
    "softcap": _CAP,
    "student_softcap": _CAP,
    "teacher_softcap": _CAP,
}
# How tokens are drawn.
DRAWING: Mapping[str, Range] = {
    "temperature": Range(1.0, 0, 1000),
    "top_k": Range(1, 1, 2**31 - 1),
    "top_p": Range(1.0, 0, 1, above=True),
    "min_p": Range(0.0, 0, 1),
}
PARAMETERS = {**ENTRIES, **WHOLE_ROWS}

# What the rules of `optim.rules` take, with defaults, and what one of them does not read.
OPTIMIZER: Mapping[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "moments": "float32"}
UNREAD: Mapping[str, tuple[str, ...]] = {
    "adafactor": ("betas", "eps", "moments"),
    "lion": ("eps",),
}
