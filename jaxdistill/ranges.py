"""The parameters of every divergence: default and range."""

from collections.abc import Mapping
from typing import NamedTuple


class Range(NamedTuple):
    """What a parameter may be: its default, and the ends of its range."""

    default: float
    least: float
    most: float


_UNIT = Range(0.5, 0, 1)

# Rows of `kernels.rows`, entry by entry: their parameters may move during a run.
ENTRIES: Mapping[str, Mapping[str, Range]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"weight": _UNIT},
    "generalized_jsd": {"beta": _UNIT},
    "skew_forward_kl": {"skew": Range(0.1, 0, 1)},
    "skew_reverse_kl": {"skew": Range(0.1, 0, 1)},
    "total_variation": {},
    "alpha_divergence": {"alpha": _UNIT},
    "alpha_beta_divergence": {"alpha": Range(0.2, 0, 10), "beta": Range(0.7, 0, 10)},
}
# Functions of `losses.whole_rows`: their parameters are part of the compiled program.
WHOLE_ROWS: Mapping[str, Mapping[str, Range]] = {
    "adaptive_kl": {"mu": _UNIT},
    "alphanet": {"clip": Range(5.0, 0.01, 1e6)},
    "decoupled_kl": {"target_weight": Range(1.0, 0, 1e6), "rest_weight": Range(0.5, 0, 1e6)},
    "smoothed_forward_kl": {"target_smoothing": Range(0.1, 0, 1)},
}
PARAMETERS = {**ENTRIES, **WHOLE_ROWS}
