"""What many samples say together: majority, pass@k, and intervals around accuracies."""

import math
from collections.abc import Sequence

import numpy as np


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer given most often; of several, the one seen first; None where nothing was parsed.

    Unparsable answers (None) have no vote.

    >>> majority(["8", "7", None, "7", "8"]), majority([None])
    ('8', None)

    Reference: Wang et al. 2022, arXiv 2203.11171.
    """
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=lambda answer: counts[answer]) if counts else None


def maj_at_k(
    rows: Sequence[Sequence[str | None]], golds: Sequence[str | None], k: int
) -> np.ndarray:
    """float64 [instances]: how often the majority of k samples is right.

    The samples of an instance are cut into groups of k in the order in which they were drawn; each
    votes, and the value is the mean over the groups. What is left over has no say.

    Raises:
      ValueError: if an instance has fewer than k samples.
    """
    return np.asarray([_share_right(row, gold, k) for row, gold in zip(rows, golds, strict=True)])


def _share_right(row: Sequence[str | None], gold: str | None, k: int) -> float:
    groups = len(row) // k if k > 0 else 0
    if not groups:
        raise ValueError(
            f"maj@k: k = {k} needs at least that many samples, and there are {len(row)}"
        )
    votes = [majority(row[group * k : (group + 1) * k]) for group in range(groups)]
    return sum(vote is not None and vote == gold for vote in votes) / groups


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k samples, drawn from `samples` without putting back, is right.

        1 - C(n - c, k) / C(n, k)

    >>> pass_at_k(10, 0, 5), pass_at_k(10, 1, 10), pass_at_k(4, 2, 1)
    (0.0, 1.0, 0.5)

    Raises:
      ValueError: unless 0 <= correct <= samples and 1 <= k <= samples.

    Reference: Chen et al. 2021, arXiv 2107.03374.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@k: {correct} of {samples} samples and k = {k} do not go together")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def wilson(right: int | float, total: int, level: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share of independent yes-or-no results; (0, 1) of nothing.

    >>> tuple(round(end, 4) for end in wilson(8, 10))
    (0.4902, 0.9433)

    Reference: Wilson 1927, J. Am. Stat. Assoc. 22.
    """
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, level**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = math.sqrt(share * (1 - share) / total + square / (4 * total**2)) * level
    half /= 1 + square / total
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    values: Sequence[float] | np.ndarray, seed: int = 0, rounds: int = 2000
) -> tuple[float, float]:
    """95 % interval of a mean over instances, by drawing instances with putting back.

    For values that are no plain yes or no, such as `maj_at_k` of several groups.

    Raises:
      ValueError: for no values.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("bootstrap: there are no values")
    draws = np.random.default_rng(seed).integers(0, values.size, (rounds, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
