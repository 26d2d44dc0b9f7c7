"""A teacher behind a server that speaks OpenAI's protocol: retries, limits, counted tokens."""

import collections
import concurrent.futures
import importlib
import json
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from jaxdistill.data.rules import printable, text_problem
from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.reasoning import bounded_http
from jaxdistill.reasoning.asking import Job, SampledAnswer, stream
from jaxdistill.safe.redact import learn, redact

GARBLED_TRIES = 3
MAX_OBJECTS = 4_000_000  # of an answer: tables of log-probabilities of 64 MB have fewer
# Of a log-probability, and of the tokens of one request: the sum of any number of them is a float.
LARGEST = 1e9


class Garbled(Exception):
    """The server answered, and it is no answer."""


class ApiClient:
    """A teacher that is asked over HTTP.

    Transport errors, rate limits and server errors are tried again by the client, ever later and as
    the server asks (`Retry-After`); answers that make no sense are asked for again. What fails for
    good is one failed answer; many in a row, and the teacher gives up.

    Args:
      base_url: such as "http://localhost:8000/v1".
      model: the server's name for the model.
      key: the key; servers of one's own take any.
      chat: ask as the user's turn of a chat; else continue the prompt as text.
      concurrency: requests at the same time.
      timeout: seconds until a try has failed, from its beginning to the last byte.
      retries: further tries.
      max_failures: failed requests in a row until the teacher gives up.
      logprobs: ask for log-probabilities.
      prices: cost of a million tokens read and written.

    Raises:
      ConfigError: if the client, the extra `api`, is not installed.
    """

    # The key or the name is wrong: another try would fail alike.
    hopeless: tuple[str, ...] = ("AuthenticationError", "PermissionDeniedError", "NotFoundError")

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str = "none",
        chat: bool = False,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        max_failures: int = 20,
        logprobs: bool = True,
        prices: tuple[float, float] = (0.0, 0.0),
    ):
        try:
            openai = importlib.import_module("openai")
        except ImportError as error:
            raise ConfigError(
                "teacher.api: needs the client openai, which is not installed: pip install "
                "'jaxdistill[api]'"
            ) from error
        http = bounded_http.client(openai, seconds=timeout)
        weakref.finalize(self, http.close)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=learn(key),
            timeout=timeout,
            max_retries=retries,
            http_client=http,
        )
        self._errors: Any = openai.OpenAIError
        self._no_answer: Any = (openai.APIResponseValidationError, ValueError)
        self._model, self._chat, self._logprobs = model, chat, logprobs
        self._concurrency, self._max_failures, self._prices = concurrency, max_failures, prices
        self._lock = threading.Lock()
        self._spent = {"requests": 0.0, "tokens_in": 0.0, "tokens_out": 0.0, "cost": 0.0}
        self._name = redact(f"{model} at {base_url}")

    def ask(self, jobs: collections.deque[Job]) -> Iterator[SampledAnswer]:
        """Answers as they arrive, from up to `concurrency` requests at a time.

        Raises:
          ModelError: if the server refuses for good, or too many requests in a row failed; what was
            received before has been yielded.
        """
        running: dict[concurrent.futures.Future, Job] = {}
        failures = 0
        while jobs or running:
            while jobs and len(running) < self._concurrency:
                job = jobs.popleft()
                running[self._begin(job)] = job
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                answers, error = _outcome(future, running.pop(future))
                failures = 0 if error is None else failures + 1
                yield from answers
                self._maybe_give_up(error, failures)

    def _begin(self, job: Job) -> concurrent.futures.Future:
        """Asks in a thread that nobody waits for, as the end of a pool or of Python would.

        A server that hangs could hold up Ctrl-C for the time of all tries.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        threading.Thread(target=self._work, args=(future, job), daemon=True).start()
        return future

    def _work(self, future: concurrent.futures.Future, job: Job) -> None:
        try:
            future.set_result(self._request(job))
        except BaseException as error:
            future.set_exception(error)
            del future  # it holds the error, which holds this frame

    def _maybe_give_up(self, error: Exception | None, failures: int) -> None:
        """Stops where going on cannot help."""
        if error is None:
            return
        hopeless = type(error).__name__ in self.hopeless
        if hopeless or failures >= self._max_failures:
            count = "" if hopeless else f", {failures} requests in a row"
            raise ModelError(
                f"teacher {self._name}: {reason_of(error)}{count}; what was received is kept: "
                "mend it and run the command again to go on"
            ) from error

    def _request(self, job: Job) -> list[SampledAnswer]:
        """All samples of a job; a server may give fewer choices than it was asked for."""
        answers: list[SampledAnswer] = []
        garbled = 0
        while len(answers) < job.count:
            first = job.first + len(answers)
            try:
                answers += self._once(job, first, job.count - len(answers))
            except (Garbled, *self._no_answer) as error:
                garbled += 1
                if garbled == GARBLED_TRIES:
                    return answers + _failed(job, first, reason_of(error))
            except self._errors:
                if not answers:
                    raise
                return answers + _failed(job, first, "the server stopped answering")
        return answers

    def _once(self, job: Job, first: int, count: int) -> list[SampledAnswer]:
        settings = job.settings
        options: dict[str, Any] = {
            "model": self._model,
            "n": count,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "seed": (stream(f"{settings.seed}/{job.id}/{first}")) & 0x7FFFFFFF,
        }
        if settings.top_p is not None:
            options["top_p"] = settings.top_p
        if settings.stop:
            options["stop"] = list(settings.stop)
        extra = {name: getattr(settings, name) for name in ("top_k", "min_p")}
        options["extra_body"] = {name: value for name, value in extra.items() if value is not None}
        chat = self._chat and not job.raw
        if chat:
            turns = [{"role": "user", "content": job.prompt}]
            logprobs = {"logprobs": True} if self._logprobs else {}
            ask = self._client.chat.completions.with_raw_response.create
            reply = told(ask(messages=turns, **options, **logprobs))
        else:
            logprobs = {"logprobs": 0} if self._logprobs else {}
            ask = self._client.completions.with_raw_response.create
            reply = told(ask(prompt=job.prompt, **options, **logprobs))
        return self._read(reply, job, first, count, chat)

    def _read(
        self, reply: Any, job: Job, first: int, count: int, chat: bool
    ) -> list[SampledAnswer]:
        choices = field(reply, "choices")
        if not isinstance(choices, list) or not choices:
            raise Garbled("the answer holds no choices")
        answers = []
        for number, choice in enumerate(choices[:count]):
            text = field(
                field(choice, "message") if chat else choice, "content" if chat else "text"
            )
            if not isinstance(text, str):
                raise Garbled("a choice holds no text")
            if problem := text_problem(text):
                raise Garbled(f"a choice's text {problem}")
            logprob, tokens = _score(choice, chat)
            reason = "length" if field(choice, "finish_reason") == "length" else "stop"
            answers.append(SampledAnswer(job, first + number, text, tokens, logprob, reason))
        self._spend(reply)
        return answers

    def _spend(self, reply: Any) -> None:
        """Counts what a reply cost."""
        usage = field(reply, "usage")
        read, written = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
        with self._lock:
            self._spent["requests"] += 1
            self._spent["tokens_in"] += read
            self._spent["tokens_out"] += written
            self._spent["cost"] += (read * self._prices[0] + written * self._prices[1]) / 1e6

    def spent(self) -> dict[str, float]:
        """Answered requests, tokens read and written by the server's count, and their cost."""
        with self._lock:
            return dict(self._spent)


def told(response: Any) -> Any:
    """The JSON of a raw response of the client's.

    What the client itself makes of JSON takes 16 us for every object in it: minutes for an answer
    that is only choices.

    Raises:
      Garbled, ValueError: where it is none.
    """
    content = response.http_response.content
    if content.count(b"{") + content.count(b"[") > MAX_OBJECTS:
        raise Garbled(f"the answer holds more than {MAX_OBJECTS} objects and lists")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise Garbled("the answer is nested too deeply") from error


def field(value: Any, name: str) -> Any:
    """A field of an object of JSON; None where there is none."""
    return value.get(name) if isinstance(value, dict) else None


def _count(usage: Any, name: str) -> float:
    """A number of tokens by the server's count, which goes into the bill; 0 where it tells none."""
    value = field(usage, name)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
        raise Garbled(f"usage: {name}: {str(value)[:40]} is no number of tokens")
    return float(value)


def _outcome(
    future: concurrent.futures.Future, job: Job
) -> tuple[list[SampledAnswer], Exception | None]:
    """Answers of a request, and the error that made it fail altogether."""
    error = future.exception()
    if error is None:
        answers = future.result()
        lost = [answer for answer in answers if answer.failed]
        return answers, Garbled(lost[0].reason) if len(lost) == len(answers) else None
    if not isinstance(error, Exception):
        raise error
    return _failed(job, job.first, reason_of(error)), error


def _failed(job: Job, first: int, reason: str) -> list[SampledAnswer]:
    numbers = range(first, job.first + job.count)
    return [SampledAnswer(job, number, "", 0, None, reason, failed=True) for number in numbers]


def reason_of(error: Exception) -> str:
    # A server may repeat what it was sent, and the reason is kept.
    # The client says "Connection error." and means what caused it.
    words = [str(one) for one in (error, error.__cause__) if one is not None and str(one)]
    text = printable(redact(": ".join(words)).splitlines()[0][:200]) if words else ""
    return f"{type(error).__name__.lstrip('_')}: {text}"


def _score(choice: Any, chat: bool) -> tuple[float | None, int]:
    """(sum of log-probabilities or None, number of tokens or 0) of a choice."""
    values = field(field(choice, "logprobs"), "content" if chat else "token_logprobs")
    if chat and isinstance(values, list):
        values = [field(entry, "logprob") for entry in values]
    if not isinstance(values, list) or not values or not all(map(_is_score, values)):
        return None, 0
    return float(sum(values)), len(values)


def _is_score(value: Any) -> bool:
    """Whether a value may be a log-probability; NaN and numbers that are no float are none."""
    return type(value) in (int, float) and abs(value) < LARGEST


def key_from(variable: str) -> str:
    """The key that an environment variable holds; a placeholder where it is not set."""
    return os.environ.get(variable) or "none"
