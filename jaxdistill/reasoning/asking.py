"""A teacher that is asked: jobs go in, answers come out one by one, in any order."""

import collections
import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxdistill.data.prompting import Prompter
from jaxdistill.errors import DataError, ModelError
from jaxdistill.models import Model, text
from jaxdistill.models.generator import Generator
from jaxdistill.models.requests import Completion, Request
from jaxdistill.reasoning.prompts import ANSWER_TOKENS


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an answer is drawn; the fields mean what they mean in `requests.Request`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """One prompt to be answered `count` times.

    Attributes:
      id: names the random streams, with the numbers of the samples.
      prompt: the text.
      settings: how answers are drawn.
      first: number of the first sample.
      count: how many.
      tag: whatever the caller wants back.
    """

    id: str
    prompt: str
    settings: Settings
    first: int = 0
    count: int = 1
    tag: Any = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the teacher wrote, or why it did not.

    Attributes:
      job: what was asked.
      sample: which of its samples.
      text: the answer.
      tokens: how many.
      logprob: sum of their log-probabilities; None where the teacher does not tell.
      reason: "stop" or "length"; else why there is no answer.
      failed: whether there is none.
    """

    job: Job
    sample: int
    text: str
    tokens: int
    logprob: float | None
    reason: str
    failed: bool = False


@runtime_checkable
class Teacher(Protocol):
    """Whoever can be asked."""

    def ask(self, jobs: collections.deque[Job]) -> Iterator[Answer]:
        """Takes jobs from the left until none is left and all are answered.

        The caller may add jobs while it reads answers.
        """
        ...

    def spent(self) -> dict[str, float]:
        """Tokens, requests and cost so far."""
        ...


def added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """What was spent in both."""
    return {n: first.get(n, 0.0) + second.get(n, 0.0) for n in {**first, **second}}


def stream(name: str) -> int:
    """A number from 0 to 2**32 - 1 for the name of a question."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass"))


def room(model: Model, asked: Sequence[str], answer: int, second: str = "") -> int:
    """Tokens that the longest of some prompts needs with its answer, as far as the context reaches.

    Args:
      model: with a tokenizer.
      asked: the prompts.
      answer: tokens of the longest answer.
      second: what may be asked behind it, for a short answer more.
    """
    assert model.tokenizer is not None
    longest, behind = (
        max(map(len, model.tokenizer(list(texts))["input_ids"])) for texts in (asked, [second])
    )
    # An answer that is read again as text may be some tokens longer.
    return min(longest + answer + behind + 2 * ANSWER_TOKENS, model.config.max_positions)


class Local:
    """A model on this machine, asked through the generation engine.

    Args:
      model: the model, with a tokenizer.
      length: tokens of the longest prompt and answer together; longer ones fail.
      slots: answers that are written at the same time.
      chat: put the prompt as the user's turn of the chat template.
      cache_dtype: as in `generator.Generator`.

    Raises:
      ModelError: if the model has no tokenizer, or no chat template where one is asked for.
    """

    def __init__(
        self,
        model: Model,
        *,
        length: int,
        slots: int = 32,
        chat: bool = False,
        cache_dtype: str | None = None,
    ):
        if model.tokenizer is None:
            raise ModelError(f"{model.source}: has no tokenizer: texts need one")
        if chat and not model.tokenizer.chat_template:
            raise ModelError(f"{model.source}: has no chat template: leave chat out")
        self._tokenizer, self._prompter = model.tokenizer, Prompter(model.tokenizer)
        self._chat = chat
        self._generator = Generator(
            model.config, model.params, slots=slots, length=length, cache_dtype=cache_dtype
        )
        self._slots = slots
        self._spent = {"requests": 0.0, "tokens_in": 0.0, "tokens_out": 0.0}

    def ask(self, jobs: collections.deque[Job]) -> Iterator[Answer]:
        """Answers as they are finished."""
        while jobs or self._generator.busy:
            while jobs and self._generator.waiting < 2 * self._slots:
                yield from self._submit(jobs.popleft())
            for done in self._generator.step():
                yield self._answer(done)

    def _submit(self, job: Job) -> Iterator[Answer]:
        self._spent["requests"] += 1
        given = dataclasses.asdict(job.settings)
        try:
            given["stop"] = text.stop_at(self._tokenizer, job.settings.stop)
            tokens = self._tokens(job.prompt)
            self._spent["tokens_in"] += len(tokens)
            self._generator.submit(
                Request(
                    tokens,
                    samples=job.count,
                    first=job.first,
                    stream=stream(job.id),
                    tag=job,
                    **given,
                )
            )
        except (DataError, ModelError) as error:
            for sample in range(job.first, job.first + job.count):
                yield Answer(job, sample, "", 0, None, str(error), failed=True)

    def _tokens(self, prompt: str) -> list[int]:
        if not self._chat:
            return self._prompter.text(prompt)
        return self._prompter.turns([{"role": "user", "content": prompt}])

    def _answer(self, done: Completion) -> Answer:
        self._spent["tokens_out"] += len(done.tokens)
        return Answer(
            done.request.tag,
            done.sample,
            text.text_of(self._tokenizer, done),
            len(done.tokens),
            float(sum(done.logprobs)),
            done.reason,
        )

    def spent(self) -> dict[str, float]:
        """Prompts, and tokens read and written."""
        return dict(self._spent)
