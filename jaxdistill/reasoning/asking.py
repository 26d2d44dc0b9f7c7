"""Asks a model or a server: questions go in, replies come out one by one, in any order.

one stage     prompt -> answer
two stages    prompt -> rationale;  prompt + rationale + "Therefore, the answer is" -> answer

`ask` is the loop; `Local` and `served.ApiClient` are who can be asked.
"""

import collections
import dataclasses
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxdistill.data.prompting import Prompter
from jaxdistill.errors import DataError, ModelError
from jaxdistill.models import Model, text
from jaxdistill.models.generator import Generator
from jaxdistill.models.requests import Completion, Request
from jaxdistill.reasoning.prompts import ANSWER_TOKENS

CHAT_TOKENS = 64  # that a chat template may put around a question
PROGRESS_SECONDS = 15.0  # between two lines of progress

# (prompt, what was answered) -> the second question.
SecondStage = Callable[[str, str], str]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
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
      tag: whatever the caller wants to find in `SampledAnswer.job` again.
      raw: whether the prompt is a rendered one: continued as text, its special tokens read.
    """

    id: str
    prompt: str
    settings: SamplingParams
    first: int = 0
    count: int = 1
    tag: Any = None
    raw: bool = False


@dataclasses.dataclass(frozen=True)
class SampledAnswer:
    """One sample of a job, or why there is none.

    Attributes:
      job: what was asked.
      sample: which of its samples.
      text: the answer.
      tokens: how many.
      logprob: sum of their log-probabilities; None where the server does not report them.
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
class Respondent(Protocol):
    """Whoever can be asked."""

    def ask(self, jobs: collections.deque[Job]) -> Iterator[SampledAnswer]:
        """Takes jobs from the left until none is left and all are answered.

        The caller may add jobs while it reads answers.
        """
        ...

    def spent(self) -> dict[str, float]:
        """Tokens, requests and cost so far."""
        ...


# (prompts, tokens of the longest answer) -> who can be asked them.
OpenRespondent = Callable[[list[str], int], Respondent]


class Reply(NamedTuple):
    """One sample of a question.

    Attributes:
      answer: to the question.
      second: the answer to the second question; None where it was not asked.
    """

    answer: SampledAnswer
    second: SampledAnswer | None = None

    @property
    def problem(self) -> str | None:
        """Why one of the two could not be had, or None."""
        last = self.second or self.answer
        return last.reason if last.failed else None


def ask(
    respondent: Respondent, jobs: Iterable[Job], second: SecondStage | None = None
) -> Iterator[Reply]:
    """Replies to all samples of all jobs, as they come.

    In two stages every answer is followed by a second question, whose answer is greedy, one line
    and at most `ANSWER_TOKENS` long. It is asked before further jobs.

    Args:
      respondent: who is asked.
      jobs: the questions.
      second: makes the second question; None: one stage.
    """
    waiting = collections.deque(jobs)
    brief = SamplingParams(ANSWER_TOKENS, stop=("\n",))
    for answer in respondent.ask(waiting):
        if isinstance(answer.job.tag, SampledAnswer):
            yield Reply(answer.job.tag, answer)
        elif second is None or answer.failed:
            yield Reply(answer)
        else:
            question = second(answer.job.prompt, answer.text)
            waiting.appendleft(Job(answer.job.id, question, brief, answer.sample, 1, answer))


def every(seconds: float) -> Callable[[], bool]:
    """A function that is true once in so many seconds; not before the first have passed."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        if time.monotonic() - last <= seconds:
            return False
        last = time.monotonic()
        return True

    return due


def added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The sums of two records of `spent`, name by name."""
    return {n: first.get(n, 0.0) + second.get(n, 0.0) for n in {**first, **second}}


def stream(name: str) -> int:
    """A number from 0 to 2**32 - 1 for the name of a question."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass"))


def context_length(
    model: Model, prompts: Sequence[str], max_new_tokens: int, second: SecondStage
) -> int:
    """Tokens that the longest prompt needs with its answers, at most the context of the model.

    Args:
      model: with a tokenizer.
      prompts: the first questions.
      max_new_tokens: tokens of the longest answer.
      second: makes the second question, which may be asked too.
    """
    assert model.tokenizer is not None
    longest, behind = (
        max(map(len, model.tokenizer(list(texts))["input_ids"]))
        for texts in (prompts, [second("", "")])
    )
    # An answer that is read again as text may be some tokens longer.
    needed = longest + max_new_tokens + behind + 2 * ANSWER_TOKENS
    return min(needed, model.config.max_positions)


class Local:
    """A model on this machine, asked through the generation engine.

    Args:
      model: the model, with a tokenizer.
      length: tokens of the longest prompt and answer together; longer ones fail.
      slots: answers that are written at the same time.
      chat: put the prompt as the user's turn of the chat template.
      cache_dtype: as in `generator.Generator`.

    Raises:
      ModelError: if the model has no tokenizer, or no chat template where `chat` needs one.
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

    def ask(self, jobs: collections.deque[Job]) -> Iterator[SampledAnswer]:
        """Answers as they are finished."""
        while jobs or self._generator.busy:
            while jobs and self._generator.waiting < 2 * self._slots:
                yield from self._submit(jobs.popleft())
            for done in self._generator.step():
                yield self._answer(done)

    def _submit(self, job: Job) -> Iterator[SampledAnswer]:
        self._spent["requests"] += 1
        given: dict[str, Any] = dataclasses.asdict(job.settings)
        try:
            given["stop"] = text.stop_at(self._tokenizer, job.settings.stop)
            tokens = self._tokens(job)
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
                yield SampledAnswer(job, sample, "", 0, None, str(error), failed=True)

    def _tokens(self, job: Job) -> list[int]:
        if job.raw:
            return self._prompter.text(job.prompt, "parse")
        if not self._chat:
            return self._prompter.text(job.prompt)
        return self._prompter.turns([{"role": "user", "content": job.prompt}])

    def _answer(self, done: Completion) -> SampledAnswer:
        self._spent["tokens_out"] += len(done.tokens)
        return SampledAnswer(
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


def open_local(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int,
    second: SecondStage,
    *,
    slots: int,
    chat: bool,
    cache_dtype: str | None = None,
) -> Respondent:
    """A model on this machine with the context that these prompts and their answers need.

    Raises:
      ModelError: as `Local`.
    """
    longest = max_new_tokens + (CHAT_TOKENS if chat else 0)
    length = context_length(model, prompts, longest, second)
    return Local(model, length=length, slots=slots, chat=chat, cache_dtype=cache_dtype)
