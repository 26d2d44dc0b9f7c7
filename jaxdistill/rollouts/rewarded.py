"""Answers that earn rewards as a feed: drawn, judged and compared once, learned from k times."""

import base64
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill import losses
from jaxdistill.data import batching
from jaxdistill.data.feed import Feed
from jaxdistill.data.prompts import Prompts
from jaxdistill.errors import DivergedError
from jaxdistill.reasoning.judging import REASONS, Verdict
from jaxdistill.rollouts import answers as records
from jaxdistill.rollouts import siblings
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.feed import UNREAD
from jaxdistill.rollouts.questions import Questions
from jaxdistill.rollouts.rows import buckets, rows_of
from jaxdistill.rollouts.scores import RoutedScores, Scores
from jaxdistill.rollouts.writing import Writer
from jaxdistill.train.hooks import NO_HOOKS, Hooks
from jaxdistill.types import ORIGINS, STUDENT, Batch, Span

META = "rewarded"  # in a checkpoint's meta: the answers that updates still learn from
LAST_PLACE = 2**31 - 1  # prompts that stand in for others are counted from the end of all places


@dataclasses.dataclass(frozen=True)
class Plan:
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
        found = np.asarray(earned, np.float32)
        if self.ramp is not None:
            sizes = np.asarray([len(one.tokens) for one in answers])
            found = found + losses.overlong_penalty(sizes, limit=self.longest, ramp=self.ramp)
        return np.asarray(found, np.float32).reshape(-1, self.samples)


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


class RewardedFeed(Feed):
    """Batches of answers with their advantages.

    The advantages are of whole groups, before a batch is split. Answers and verdicts are recalled
    while updates learn from them, and kept in the checkpoints between these.

    Args:
      plan: which answers, and what they are worth.
      prompts: what is answered.
      writer: answers.
      judge: answers -> verdicts, the same in all processes.
      params_of: state -> the student's parameters.
      old_of: (parameters, rows of this process) -> log q of the targets of all rows, by the program
        that trains.
      shape: arguments of `rows_of` but for its answers, sizes, and what is beside them.
      unit: of the numbers of rows, see `buckets`.
      rows: number of rows of a global batch -> which of them this process wants.
      left_out: the ranges of rows that no batch holds, as they are now.
      recalled: updates that a rerun may go back to.
      questions: that are asked at each evaluation, or None.
      hooks: what the caller handed in.
      told: answers behind the prompts of a teacher that is told of others of their group, see
        `siblings.told`; None: it is not.
      leaks: as `RolloutFeed` takes it.
      scores: likewise.
    """

    def __init__(
        self,
        plan: Plan,
        prompts: Prompts,
        writer: Writer,
        judge: Callable[[Sequence[Answer]], list[Verdict]],
        *,
        params_of: Callable[[Any], Any],
        old_of: Callable[[Any, Batch], np.ndarray],
        shape: Mapping[str, Any],
        unit: int,
        rows: Callable[[int], Sequence[int]],
        left_out: Callable[[], Sequence[tuple[int, int]]],
        recalled: int,
        questions: Questions | None = None,
        hooks: Hooks = NO_HOOKS,
        told: Callable[[Sequence[Answer], Sequence[Verdict]], Sequence[Answer]] | None = None,
        leaks: Callable[[Sequence[np.ndarray]], float] | None = None,
        scores: Scores | RoutedScores | None = None,
    ):
        self.plan, self._prompts, self._writer, self._judge = plan, prompts, writer, judge
        self._told_of, self._leaks, self._scores = told, leaks, scores
        self._params_of, self._old_of, self._shape = params_of, old_of, shape
        self._sizes, self._rows = buckets(plan.rows, unit), rows
        self._left_out, self._recalled, self._questions = left_out, recalled, questions
        self._hooks = hooks
        self.begin({})

    def begin(self, meta: Mapping[str, Any]) -> None:
        """Starts from a checkpoint's meta, or from the start, where it is empty."""
        stored = meta.get(META, {})
        # Batches in a row without any spread: as many as ended before the updates of a number.
        self._flat: dict[int, int] = {}
        self._flat_now: int = stored.get("flat", 0)
        self._drawn = {one["first"]: unpacked(one, self._prompt) for one in stored.get("drawn", ())}
        self._told: dict[int, dict[str, float]] = {}

    def _prompt(self, place: int) -> Any:
        return self._prompts.at(place, self.plan.seed)

    def kept(self, row: int) -> dict[str, Any]:
        """What a checkpoint keeps whose next step begins at a row."""
        following = row // self.plan.rows
        first = following - following % self.plan.updates
        drawn = []
        if first != following and first in self._drawn:
            drawn = [{"first": first, **self._drawn[first].packed()}]
        return {META: {"flat": self._flat_now, "drawn": drawn}}

    def measure(self, state: Any) -> Mapping[str, float]:
        """How often the student is right on held-out questions, where there are some."""
        if self._questions is None:
            return {}
        return self._questions.measure(self._params_of(state), int(state.step))

    def numbers(self, span: Span) -> dict[str, float]:
        """What the record of a step says of its answers and rewards."""
        return self._told.get(span.first_row // self.plan.rows, {})

    def origin(self, span: Span) -> str:
        """The student wrote all of it."""
        return ORIGINS[STUDENT]

    def epoch(self, row: int) -> float:
        """Times that every prompt was asked."""
        return row / (len(self._prompts) * self.plan.samples * self.plan.updates)

    def next(self, row: int, state: Any) -> tuple[Span, Batch] | None:
        """The batch at a row of the stream; None: a process was asked to stop meanwhile.

        Raises:
          DivergedError: after `patience` batches in a row whose groups had no spread.
        """
        plan = self.plan
        for begin, end in self._left_out():
            row = end if begin <= row < end else row
        update = row // plan.rows
        first = update - update % plan.updates
        self._drawn = {
            one: drawn
            for one, drawn in self._drawn.items()
            if one <= update and one > update - plan.updates - self._recalled
        }
        step, params = int(state.step), self._params_of(state)
        fresh = first not in self._drawn
        if fresh and not self._draw(first, step, params):
            return None
        drawn = self._drawn[first]
        taught = None if self._scores is None else self._scores(drawn.answers)
        if taught is None and self._scores is not None:
            return None
        rows = self._rows_of(drawn, taught)
        mine = self._rows(len(rows))
        batch = batching.stack([rows[number] for number in mine])
        if plan.updates > 1 and drawn.old is None:
            old = self._old_of(params, batch)
            self._drawn[first] = drawn = dataclasses.replace(drawn, old=old)
            rows = self._rows_of(drawn, taught)
            batch = batching.stack([rows[number] for number in mine])
        told = {
            "rollout/epoch": self.epoch(row + plan.rows),
            "rollout/rows": float(len(rows)),
            "rollout/reused": float(update - first),
            **dict(records.numbers(drawn.answers, step)),
            **self._rewarded(drawn),
        }
        if self._told_of is not None:
            told["reward/siblings"] = siblings.share(self._behind(drawn))
        if self._leaks is not None:
            told["rollout/leaks"] = self._leaks([one.tokens for one in drawn.answers])
        if self._scores is not None:
            told["perf/teacher_cost"] = self._scores.cost
            told["perf/scoring_seconds"] = self._scores.seconds
        self._told = {one: t for one, t in self._told.items() if one > update - UNREAD}
        self._told[update] = told | (self._took if fresh else {})
        return Span(row, row + plan.rows), batch

    def _draw(self, first: int, step: int, params: Any) -> bool:
        """Draws and judges the answers of an update and those after it; False: to stop."""
        plan, seconds, written, judging = self.plan, 0.0, 0, 0.0
        places = plan.places(first)
        groups: dict[int, tuple[list[Answer], list[Verdict]]] = {}
        asked, stood_in, flat = dict(zip(places, places, strict=True)), 0, places
        for attempt in range(plan.resample + 1):
            prompts = {place: self._prompt(place) for place in asked.values()}
            answers = self._writer.write(params, step, prompts)
            if answers is None:
                return False
            seconds += self._writer.seconds
            written += sum(len(one.tokens) for one in answers)
            by_place = {place: [a for a in answers if a.place == place] for place in prompts}
            ordered = [answer for place in asked.values() for answer in by_place[place]]
            began = time.perf_counter()
            verdicts = self._judge(ordered)
            judging += time.perf_counter() - began
            self._hooks.at("rollout.judged")
            for number, place in enumerate(asked):
                part = slice(number * plan.samples, (number + 1) * plan.samples)
                groups[place] = ordered[part], verdicts[part]
            flat = [place for place in places if not self._spread(*groups[place])]
            if not flat or attempt == plan.resample:
                break
            stood_in += len(flat)
            asked = {place: plan.stand_in(place, attempt) for place in flat}
        before = self._flat.setdefault(first, self._flat_now)  # of an update that is run again
        self._flat_now = before + 1 if len(flat) == len(places) else 0
        self._drawn[first] = Drawn(
            [answer for place in places for answer in groups[place][0]],
            [verdict for place in places for verdict in groups[place][1]],
            stood_in,
        )
        self._took = {
            "perf/rollout_seconds": seconds,
            "perf/judging_seconds": judging,
            "perf/rollout_tokens_per_second": written / max(seconds, 1e-9),
        }
        if self._flat_now >= plan.patience:
            raise DivergedError(
                f"reward.patience = {plan.patience}: so many batches in a row had groups whose "
                "answers all earned the same, so that there is nothing to learn: look at the "
                "verifier and at the prompts (too easy, or too hard), or raise rollout.samples"
            )
        return True

    def _spread(self, answers: list[Answer], verdicts: list[Verdict]) -> bool:
        return bool(losses.spread(self.plan.rewards(answers, verdicts))[0])

    def _behind(self, drawn: Drawn) -> Sequence[Answer]:
        """The answers, each with the prompt that its teacher reads."""
        if self._told_of is None:
            return drawn.answers
        return self._told_of(drawn.answers, drawn.verdicts)

    def _rows_of(
        self, drawn: Drawn, taught: Sequence[np.ndarray | None] | None
    ) -> list[dict[str, Any]]:
        """The rows of the whole batch, with what servers said of the answers."""
        plan = self.plan
        gains = losses.group_advantages(
            plan.rewards(drawn.answers, drawn.verdicts), scale=plan.advantage
        )
        sampled: dict[str, Sequence[Any]] = {
            "advantages": list(np.asarray(gains, np.float32).ravel()),
        }
        if plan.wrong:
            values = [one.values[0] for one in drawn.verdicts]
            sampled["wrong"] = [np.bool_(value is None or value < 1) for value in values]
        silent = [plan.mask_cut and not one.ended for one in drawn.answers]
        rows, _ = rows_of(
            self._behind(drawn),
            sizes=self._sizes,
            silent=silent,
            sampled=sampled,
            sampler=True,
            taught=taught,
            **self._shape,
        )
        if plan.updates > 1:
            old = drawn.old
            for number, row in enumerate(rows):
                # Rows beyond those that were drawn are padding of another mesh's bucket.
                none = np.zeros(len(row["tokens"]), np.float32)
                row["sampled"]["old"] = none if old is None or number >= len(old) else old[number]
        return rows

    def _rewarded(self, drawn: Drawn) -> dict[str, float]:
        """What the record of a step says of rewards."""
        rewards = self.plan.rewards(drawn.answers, drawn.verdicts)
        known = rewards[np.isfinite(rewards)]
        spread = np.asarray(losses.spread(rewards))
        told = {
            "reward/mean": float(known.mean(dtype=np.float64)) if len(known) else 0.0,
            "reward/std": float(known.std(dtype=np.float64)) if len(known) else 0.0,
            "reward/flat_groups": float(np.mean(~spread)),
            "reward/flat_batches": float(self._flat_now),
            "reward/stood_in": float(drawn.stood_in),
            "reward/unjudged": float(np.mean(~np.isfinite(rewards))),
        }
        for reason in REASONS:
            count = sum(one.reason == reason for one in drawn.verdicts)
            told |= {f"reward/{reason}": float(count)} if count else {}
        for number, name in enumerate(self.plan.names):
            values = [one.values[number] for one in drawn.verdicts]
            said = [value for value in values if value is not None]
            told |= {f"reward/of_{name}": float(np.mean(said))} if said else {}
        return told
