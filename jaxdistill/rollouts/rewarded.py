"""Answers that earn rewards as a feed: drawn, judged and compared once, learned from k times."""

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
from jaxdistill.reasoning.judging import Verdict
from jaxdistill.rollouts import answers as records
from jaxdistill.rollouts import drawn as drawing
from jaxdistill.rollouts import siblings
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.drawn import Drawn, RewardPlan
from jaxdistill.rollouts.feed import UNREAD
from jaxdistill.rollouts.questions import Questions
from jaxdistill.rollouts.rows import buckets, rows_of
from jaxdistill.rollouts.scores import RoutedScores, Scores
from jaxdistill.rollouts.writing import Writer
from jaxdistill.train.hooks import NO_HOOKS, Hooks
from jaxdistill.types import ORIGINS, STUDENT, Batch, Span

META = "rewarded"  # in a checkpoint's meta: the answers that updates still learn from


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
        plan: RewardPlan,
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
        self._drawn = {
            one["first"]: drawing.unpacked(one, self._prompt) for one in stored.get("drawn", ())
        }
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

    def shown(self) -> Sequence[Mapping[str, str]]:
        """Right and wrong answers to held-out questions, as they were when last asked."""
        return [] if self._questions is None else self._questions.shown

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
        taught = None if self._scores is None else self._scored(drawn.answers)
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
            **drawing.numbers(plan, drawn, self._flat_now),
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
        earning = [place for place in places if self._prompt(place).judged]
        asked, stood_in, flat = dict(zip(places, places, strict=True)), 0, earning
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
            verdicts = self._judged(ordered)
            judging += time.perf_counter() - began
            self._hooks.at("rollout.judged")
            for number, place in enumerate(asked):
                part = slice(number * plan.samples, (number + 1) * plan.samples)
                groups[place] = ordered[part], verdicts[part]
            flat = [place for place in earning if not self._spread(*groups[place])]
            asked = {place: plan.stand_in(place, attempt) for place in flat}
            # Whoever would only be taught stands in for nobody.
            asked = {place: at for place, at in asked.items() if self._prompt(at).judged}
            if not asked or attempt == plan.resample:
                break
            stood_in += len(asked)
        before = self._flat.setdefault(first, self._flat_now)  # of an update that is run again
        if earning:  # who is only taught says nothing of it
            self._flat_now = before + 1 if len(flat) == len(earning) else 0
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

    def _judged(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict for each; of those that are for the teacher alone one that says nothing."""
        said = iter(self._judge([one for one in answers if one.prompt.judged]))
        nothing = Verdict(None, (None,) * len(self.plan.names))
        return [next(said) if one.prompt.judged else nothing for one in answers]

    def _scored(self, answers: Sequence[Answer]) -> list[np.ndarray | None] | None:
        """What servers say of each, None of those that are for the reward alone; None: to stop."""
        assert self._scores is not None, "only asked for where there are some"
        said = self._scores([one for one in answers if one.prompt.taught])
        if said is None:
            return None
        each = iter(said)
        return [next(each) if one.prompt.taught else None for one in answers]

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
        if plan.mixed:
            sampled["rewarded"] = [np.bool_(one.prompt.judged) for one in drawn.answers]
            sampled["taught"] = [np.bool_(one.prompt.taught) for one in drawn.answers]
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
