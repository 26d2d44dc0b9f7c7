"""On-policy distillation as a feed: which update learns from whose text, and the batch of it."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data import batching
from jaxdistill.data.feed import Feed
from jaxdistill.data.prompts import Prompts
from jaxdistill.rollouts import answers as records
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.replay import LOSS, ReplayBuffer
from jaxdistill.rollouts.rows import buckets, rows_of
from jaxdistill.rollouts.scores import RoutedScores, Scores
from jaxdistill.rollouts.views import Aligner
from jaxdistill.rollouts.writing import Writer
from jaxdistill.types import DATA, ORIGINS, STUDENT, Batch, Span

FILE = "rollouts"  # beside a checkpoint's manifest: answers that later updates may learn from
WRITING, SCORING = "rollout", "scoring"  # what takes time, in the names of its numbers
UNREAD = 4  # updates whose record may not be written yet

Difference = Callable[[Any, Batch, np.ndarray], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """Which text an update learns from.

    Update u stands for `prompts * samples` rows of the run's stream of rows. Where it is the
    student's it learns from answers to as many prompts, those at places u * prompts and on; else
    from the corpus' rows at the same positions.

    Attributes:
      share: the chance that an update is the student's.
      prompts, samples: of an update.
      max_age: answers for so many further updates are written at once.
      seed: of the run.
    """

    share: float
    prompts: int
    samples: int
    max_age: int
    seed: int

    @property
    def rows(self) -> int:
        """Rows of the stream that an update stands for."""
        return self.prompts * self.samples

    def update(self, row: int) -> int:
        """The update that begins at a row of the stream."""
        assert row % self.rows == 0, "updates lie one behind the other"
        return row // self.rows

    def draw(self, update: int) -> float:
        """A number from [0, 1), from a stream of its own: whose turn it is follows from it."""
        name = f"{self.seed} rollout.share {update}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / 2**53

    def of_student(self, update: int) -> bool:
        """Whether an update learns from the student's text, where the share does not adapt."""
        return self.draw(update) < self.share

    def written_with(self, update: int) -> list[int]:
        """The student's updates whose answers are written at once, from an update on."""
        last = (update // (self.max_age + 1) + 1) * (self.max_age + 1)
        return [one for one in range(update, last) if self.of_student(one)]


class RolloutFeed(Feed):
    """Batches of the student's answers and of a corpus.

    An iteration is a function of the state before it, the position and the seed: asked again it
    answers with what it recalls, or writes the same once more. Answers that later updates learn
    from are kept in checkpoints, because the parameters that wrote them are gone by then.

    Args:
      plan: whose turn it is.
      prompts: what is answered.
      writer: answers.
      corpus: gives the other batches, without a memory; None: there are none.
      params_of: state -> the student's parameters.
      shape: arguments of `rows_of` but for its answers and sizes.
      unit: of the numbers of rows, see `buckets`.
      rows: number of rows of a global batch -> which of them this process wants.
      left_out: the ranges of rows that no batch holds, as they are now.
      replay: lets the share adapt, and old answers be met again; None: the share is the plan's.
      recalled: updates whose answers are kept, because a rerun may go back to them.
      difference: (parameters, rows of this process, log q of the sampler) -> numbers for the
        record; None: not asked.
      recorded: whether a step is recorded, by its number.
      scores: says log p of the answers' tokens, which rows then carry; None: the step asks.
      leaks: tokens of answers -> the share of them that speaks of what only the teacher was told;
        None: nobody looks.
    """

    def __init__(
        self,
        plan: RolloutPlan,
        prompts: Prompts,
        writer: Writer,
        *,
        corpus: Feed | None,
        params_of: Callable[[Any], Any],
        shape: Mapping[str, Any],
        unit: int,
        rows: Callable[[int], Sequence[int]],
        left_out: Callable[[], Sequence[tuple[int, int]]],
        replay: ReplayBuffer | None = None,
        recalled: int,
        difference: Difference | None = None,
        recorded: Callable[[int], bool] = lambda step: True,
        scores: Scores | RoutedScores | None = None,
        leaks: Callable[[Sequence[np.ndarray]], float] | None = None,
        aligner: Aligner | None = None,
    ):
        self.plan, self._prompts, self._writer, self._corpus = plan, prompts, writer, corpus
        self._params_of, self._shape = params_of, shape
        self._sizes, self._rows = buckets(plan.rows, unit), rows
        self._left_out, self._replay, self._recalled = left_out, replay, recalled
        self._difference, self._recorded = difference, recorded
        self._scores, self._leaks, self._aligner = scores, leaks, aligner
        self.begin({})

    def begin(self, meta: Mapping[str, Any]) -> None:
        """Starts from a checkpoint's meta, or from the start, where it is empty."""
        at = lambda place: self._prompts.at(place, self.plan.seed)
        stored = meta.get(FILE, {})
        # Of every update its answers, and the update before which they were written.
        self._answers = {
            one["update"]: (one["before"], records.unpacked(one, at))
            for one in stored.get("ahead", ())
        }
        if self._replay is not None:
            self._replay.begin(meta, stored.get("replay"), at)
        self._told: dict[int, dict[str, float]] = {}
        # Of every update since the last record: seconds of writing, and tokens that were written;
        # of scoring likewise.
        self._spent: dict[str, dict[int, tuple[float, int]]] = {WRITING: {}, SCORING: {}}

    def kept(self, row: int) -> dict[str, Any]:
        """What a checkpoint's meta keeps whose next step begins at a row."""
        return {} if self._replay is None else self._replay.kept(row // self.plan.rows)

    def evaluated(self, row: int, metrics: Mapping[str, float]) -> None:
        """Hears the validation loss of the state whose next step begins at a row."""
        if self._replay is not None:
            self._replay.evaluated(row // self.plan.rows, metrics[LOSS])

    def beside(self, row: int) -> dict[str, Any]:
        """The answers that such a checkpoint keeps."""
        following = row // self.plan.rows
        ahead = [
            {"update": update, "before": before, **records.packed(answers)}
            for update, (before, answers) in sorted(self._answers.items())
            if before < following <= update
        ]
        numbers: dict[str, Any] = {"ahead": ahead} if ahead else {}
        if self._replay is not None and (old := self._replay.packed(following)) is not None:
            numbers["replay"] = old
        return {FILE: numbers} if numbers else {}

    def numbers(self, span: Span) -> dict[str, float]:
        """What the record of a step says of its text; of the writing, all since the last record."""
        update = self.plan.update(span.first_row)
        told = dict(self._told.get(update, {}))
        for what, by_update in self._spent.items():
            spent = [by_update.pop(one) for one in sorted(by_update) if one <= update]
            if spent:
                seconds, tokens = (sum(parts) for parts in zip(*spent, strict=True))
                told[f"perf/{what}_seconds"] = seconds
                told[f"perf/{what}_tokens_per_second"] = tokens / seconds
        return told

    def _spend(self, what: str, update: int, seconds: float, tokens: int) -> None:
        """Adds what an update took, which may be run again."""
        before = self._spent[what].get(update, (0.0, 0))
        self._spent[what][update] = before[0] + seconds, before[1] + tokens

    def origin(self, span: Span) -> str:
        """Who wrote the text of a step, a value of `types.ORIGINS`."""
        return ORIGINS[STUDENT if self._of_student(self.plan.update(span.first_row)) else DATA]

    def _of_student(self, update: int) -> bool:
        """Whether an update learns from the student's text."""
        if self._replay is None:
            return self.plan.of_student(update)
        return self._replay.meets(update, self.plan.draw(update))

    def epoch(self, row: int) -> float:
        """Epochs of the corpus where it is read, else of the prompts."""
        read = self._read
        return self._asked(row) if read is None else read.epoch(row)

    def _asked(self, row: int) -> float:
        """Epochs of the prompts: times that each was asked, had the student always written."""
        return row / (len(self._prompts) * self.plan.samples)

    def usual(self) -> Batch | None:
        """As the corpus' batches; answers come in numbers of rows that nobody knows yet."""
        read = self._read
        return None if read is None else read.usual()

    @property
    def _read(self) -> Feed | None:
        """The corpus, where an update may learn from it."""
        return self._corpus if self.plan.share < 1 else None

    def next(self, row: int, state: Any) -> tuple[Span, Batch] | None:
        """The batch at a row of the stream; None: a process was asked to stop meanwhile."""
        for first, end in self._left_out():
            row = end if first <= row < end else row
        update = self.plan.update(row)
        self._forget(update)
        told = {"rollout/epoch": self._asked(row + self.plan.rows)}
        if self._replay is not None:
            told["rollout/share"] = self._replay.phi(update)
            fresh = self._replay.writes(update, self.plan.draw(update))
            told["rollout/replayed"] = float(self._of_student(update) and not fresh)
        if not self._of_student(update):
            assert self._read is not None, "checked before: who has none writes all its text"
            self._tell(update, told | {"rollout/student": 0.0})
            return self._read.next(row, state)
        step = int(state.step)
        params = self._params_of(state)
        answers = self._met_by(update, step, params)
        if answers is None:
            return None
        taught = None
        if self._scores is not None:
            taught = self._scores(answers)
            if taught is None:
                return None
            if self._scores.seconds:  # of several teachers perhaps no server was asked
                self._spend(SCORING, update, self._scores.seconds, self._scores.tokens)
            told["perf/teacher_cost"] = self._scores.cost
        learned, beside = answers, None
        if self._aligner is not None:
            learned, beside, shares = self._aligner(answers)
            told |= shares
        rows, logprobs = rows_of(
            learned, sizes=self._sizes, taught=taught, beside=beside, **self._shape
        )
        mine = self._rows(len(rows))
        batch = batching.stack([rows[number] for number in mine])
        told |= {"rollout/student": 1.0, "rollout/rows": float(len(rows))}
        told |= dict(records.numbers(answers, step))
        if self._leaks is not None:
            told["rollout/leaks"] = self._leaks([one.tokens for one in answers])
        if self._difference is not None and self._recorded(step + 1):
            told |= self._difference(params, batch, logprobs[list(mine)])
        self._tell(update, told)
        return Span(row, row + self.plan.rows), batch

    def _tell(self, update: int, numbers: dict[str, float]) -> None:
        """Keeps the numbers of an update until its record is written, a few updates later."""
        self._told[update] = numbers
        self._told = {one: told for one, told in self._told.items() if one > update - UNREAD}

    def _met_by(self, update: int, step: int, params: Any) -> list[Answer] | None:
        """The answers that an update learns from; None: a process is to stop."""
        replay = self._replay
        if replay is None:
            return self._answers_of(update, step, params)
        if not replay.writes(update, self.plan.draw(update)):
            return replay.drawn(update, self.plan.rows)
        answers = self._answers_of(update, step, params)
        if answers is not None:
            replay.push(update, answers)
        return answers

    def _forget(self, update: int) -> None:
        """Forgets what nobody will ask for, or ask for again from another state.

        Whoever goes back to an update meets another state behind it, whoever's text it learns from:
        what was written later is not known yet.
        """
        self._answers = {
            one: (before, answers)
            for one, (before, answers) in self._answers.items()
            if before <= update and one > update - self._recalled
        }
        if self._replay is not None:
            self._replay.forget(update)

    def _answers_of(self, update: int, step: int, params: Any) -> list[Answer] | None:
        """The answers of an update, recalled or written now; None: a process is to stop."""
        plan = self.plan
        if update in self._answers:
            return self._answers[update][1]
        updates = plan.written_with(update) if self._replay is None else [update]
        places = {
            place: self._prompts.at(place, plan.seed)
            for one in updates
            for place in range(one * plan.prompts, (one + 1) * plan.prompts)
        }
        answers = self._writer.write(params, step, places)
        if answers is None:
            return None
        for number, one in enumerate(updates):
            theirs = answers[number * plan.rows : (number + 1) * plan.rows]
            self._answers[one] = update, theirs
        written = sum(len(one.tokens) for one in answers)
        self._spend(WRITING, update, self._writer.seconds, written)
        return self._answers[update][1]
