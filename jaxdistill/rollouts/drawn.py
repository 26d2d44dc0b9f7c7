"""Answers of a few updates and what they earned: rewards, numbers of a record, and as JSON."""

import base64
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import losses
from jaxdistill.reasoning.judging import REASONS, Verdict
from jaxdistill.rollouts import answers as records
from jaxdistill.rollouts.answers import Answer

LAST_PLACE = 2**31 - 1  # prompts that stand in for others are counted from the end of all places


@dataclasses.dataclass(frozen=True)
class RewardPlan:
    """Which answers an update learns from, and what they are worth.

    Updates u to u + updates - 1, u a multiple of `updates`, learn from answers to the prompts at
    places (u / updates) * prompts and on. Each stands for `prompts * samples` rows of the stream.

    Attributes:
      prompts, samples: of an update.
      updates: that learn from the same answers.
      advantage: `scale` of `losses.group_advantages`.
      names: of the verifiers.
      longest: tokens of an answer at most.
      mask_cut: whether answers that were cut there count nothing.
      ramp: tokens before it over which the reward falls; None: it does not.
      resample: how often other prompts stand in for those without spread.
      patience: batches in a row without any spread, after which the run stops.
      wrong: whether rows say which answers the first verifier gave less than 1.
      mixed: whether rows say which answers are for the reward, and which for the teacher.
      seed: of the run.
    """

    prompts: int
    samples: int
    updates: int
    advantage: str
    names: tuple[str, ...]
    longest: int
    mask_cut: bool
    ramp: int | None
    resample: int
    patience: int
    wrong: bool
    mixed: bool
    seed: int

    @property
    def rows(self) -> int:
        """Rows of the stream that an update stands for."""
        return self.prompts * self.samples

    def places(self, first: int) -> list[int]:
        """The places of the prompts that are asked before an update."""
        begin = first // self.updates * self.prompts
        return list(range(begin, begin + self.prompts))

    def stand_in(self, place: int, attempt: int) -> int:
        """The place of the prompt that stands in for one, at an attempt from 0."""
        return LAST_PLACE - (place * self.resample + attempt)

    def rewards(self, answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> np.ndarray:
        """float32 [prompts, samples]: what each answer earned; NaN where nobody could say."""
        earned = [np.nan if one.reward is None else one.reward for one in verdicts]
        rewards = np.asarray(earned, np.float32)
        if self.ramp is not None:
            sizes = np.asarray([len(one.tokens) for one in answers])
            rewards = rewards + losses.overlong_penalty(sizes, limit=self.longest, ramp=self.ramp)
        return np.asarray(rewards, np.float32).reshape(-1, self.samples)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The answers of a few updates.

    Attributes:
      answers: group by group, [prompts * samples].
      verdicts: of each.
      stood_in: prompts that stood in for others.
      old: float32 [rows, L], log q_old of the targets; None where one update learns from them.
    """

    answers: list[Answer]
    verdicts: list[Verdict]
    stood_in: int
    old: np.ndarray | None = None

    def packed(self) -> dict[str, Any]:
        """As JSON can hold it."""
        old = {} if self.old is None else {
            "old": base64.b64encode(self.old.tobytes()).decode(),
            "old_rows": len(self.old),
        }  # fmt: skip
        return {
            **records.packed(self.answers),
            "verdicts": [[one.reward, list(one.values), one.reason] for one in self.verdicts],
            "stood_in": self.stood_in,
            **old,
        }


def unpacked(stored: Mapping[str, Any], prompt_at: Callable[[int], Any]) -> Drawn:
    """What `Drawn.packed` was made of."""
    old = None
    if "old" in stored:
        flat = np.frombuffer(base64.b64decode(stored["old"]), np.float32)
        old = flat.reshape(stored["old_rows"], -1)
    verdicts = [Verdict(reward, tuple(values), why) for reward, values, why in stored["verdicts"]]
    return Drawn(records.unpacked(stored, prompt_at), verdicts, stored["stood_in"], old)


def numbers(plan: RewardPlan, drawn: Drawn, flat: int) -> dict[str, float]:
    """What the record of a step says of rewards.

    Args:
      plan: of the run.
      drawn: what the step learns from.
      flat: batches in a row without any spread.
    """
    rewards = plan.rewards(drawn.answers, drawn.verdicts)
    known = rewards[np.isfinite(rewards)]
    judged = np.asarray([one.prompt.judged for one in drawn.answers]).reshape(rewards.shape)
    spread = np.asarray(losses.spread(rewards))[judged[:, 0]]
    over = lambda values: float(np.mean(values)) if values.size else 0.0
    told = {
        "reward/mean": float(known.mean(dtype=np.float64)) if len(known) else 0.0,
        "reward/std": float(known.std(dtype=np.float64)) if len(known) else 0.0,
        "reward/flat_groups": over(~spread),
        "reward/flat_batches": float(flat),
        "reward/stood_in": float(drawn.stood_in),
        "reward/unjudged": over(~np.isfinite(rewards[judged])),
    }
    if plan.mixed:
        taught = [one.prompt.taught for one in drawn.answers]
        told |= {"reward/answers": float(judged.sum()), "reward/taught": float(sum(taught))}
    for reason in REASONS:
        count = sum(one.reason == reason for one in drawn.verdicts)
        told |= {f"reward/{reason}": float(count)} if count else {}
    for number, name in enumerate(plan.names):
        values = [one.values[number] for one in drawn.verdicts]
        said = [value for value in values if value is not None]
        told |= {f"reward/of_{name}": float(np.mean(said))} if said else {}
    return told
