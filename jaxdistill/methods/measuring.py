"""The losses that models are measured by, whatever method trained them."""

from typing import Unpack

from jaxdistill.methods import kd, sft
from jaxdistill.methods.base import Head, Objective, at_known_temperature

# With these knobs the loss of `against_teacher` is the cross-entropy that a control is trained on.
KNOBS = {"alpha": 1.0, "temperature": 1.0}


def cross_entropy(**head: Unpack[Head]) -> Objective:
    """Cross-entropy, perplexity and agreement with the data; no knobs, no teacher."""
    return sft.objective(**head)


def against_teacher(**head: Unpack[Head]) -> Objective:
    """As `cross_entropy`, and KL and agreement with a teacher.

    Knobs: alpha, and temperature, which is 1 whatever is given.
    """
    return at_known_temperature(kd.objective(**head), KNOBS)
