"""Judges answers in a fixed number of killable processes: a reward, or why there is none."""

import concurrent.futures
import contextlib
import importlib.util
import logging
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdistill.errors import ConfigError
from jaxdistill.reasoning import extract, scorers
from jaxdistill.safe import deadline
from jaxdistill.safe.guarded import Guarded, TimedOut

_log = logging.getLogger(__name__)
# function(prompt, answer, record) -> a number, or None where it cannot say.
Function = Callable[[str, str, Mapping[str, str]], float | None]

LARGEST = 1000.0  # a reward beyond it is a fault of the verifier
CALLS = 10_000  # of a process, before it is replaced
TIMED_OUT, FAILED, REFUSED, SILENT = "timed_out", "failed", "refused", "silent"
REASONS = (TIMED_OUT, FAILED, REFUSED, SILENT)
_TO_END = 2.0  # seconds within which a function that was ended has ended
_ENDED = "it was ended, and the answer has no reward"
_STUCK = (
    "a function runs in the process of the run, and nothing else can end it; stop the run, or wait"
)
_RATE = "jaxdistill.reasoning.scorers:rate"
_MATH = "jaxdistill.reasoning.math_judge:judge"


class WeightedVerifier(NamedTuple):
    """One verifier of a reward.

    Attributes:
      name: a key of `scorers.SCORERS`, `scorers.MATH`, or of the functions that are handed in.
      weight: of its number in the sum.
      options: of the scorer.
    """

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = {}


class Question(NamedTuple):
    """What is judged.

    Attributes:
      prompt: the text that was asked.
      answer: the text that came.
      record: what stands beside the prompt; the right answer is `answer`.
    """

    prompt: str
    answer: str
    record: Mapping[str, str]


class Verdict(NamedTuple):
    """What the verifiers say of an answer.

    Attributes:
      reward: the weighted sum; None where one of them gave no number.
      values: of each verifier, None where it gave none.
      reason: of REASONS, why there is no reward; None where there is one.
    """

    reward: float | None
    values: tuple[float | None, ...]
    reason: str | None = None


class Judges:
    """A pool of processes that judge answers.

        parts = [WeightedVerifier("number"), WeightedVerifier("format", 0.1)]
        with Judges(parts, workers=2, seconds=5.0) as judges:
            judges([Question("1 + 1 = ", "2", {"answer": "2"})])[0].reward       # 1.0

    The processes are made when they are first needed, and there are never more than `workers` for
    each kind of verifier. One that takes too long is killed, and costs that answer its reward; so
    does one that fails. A reward that is not finite, or beyond LARGEST, is refused.

    Functions run in the thread that asks, one after the other. In the main thread one that takes
    longer is ended too, and named; in another nothing can end it, and a warning says so.

    Args:
      parts: at least one.
      workers: processes.
      seconds: a verifier that takes longer is killed.
      functions: name -> function, for names that are no scorers.

    Raises:
      ConfigError: for a name or options that do not exist, or a package that is missing.
    """

    def __init__(
        self,
        parts: Sequence[WeightedVerifier],
        *,
        workers: int = 2,
        seconds: float = 5.0,
        functions: Mapping[str, Function] | None = None,
    ):
        self._parts, self._functions = tuple(parts), dict(functions or {})
        for part in self._parts:
            check(part, self._functions)
        self._seconds = seconds
        names = {_home(part.name) for part in self._parts if part.name not in self._functions}
        self._idle: Mapping[str, queue.SimpleQueue[Guarded]] = {
            name: queue.SimpleQueue() for name in names
        }
        self._processes = [
            (name, Guarded(name, seconds=seconds, calls=CALLS))
            for name in names
            for _ in range(workers)
        ]
        for name, process in self._processes:
            self._idle[name].put(process)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, "verifier")

    def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
        """Verdicts in the order of the questions."""
        tasks = [(part, one) for one in questions for part in self._parts]
        ours = {n for n, (part, _) in enumerate(tasks) if part.name in self._functions}
        asked = {
            n: self._threads.submit(self._ask, *tasks[n])
            for n in range(len(tasks))
            if n not in ours
        }
        said = [
            self._call(*task) if number in ours else asked[number].result()
            for number, task in enumerate(tasks)
        ]
        count = len(self._parts)
        return [self._sum(said[i * count : (i + 1) * count]) for i in range(len(questions))]

    def _ask(self, part: WeightedVerifier, question: Question) -> float | str:
        """A number of a process, or one of REASONS."""
        idle = self._idle[_home(part.name)]
        process = idle.get()
        try:
            return _of_process(process, part, question)
        finally:
            idle.put(process)

    def _call(self, part: WeightedVerifier, question: Question) -> float | str:
        """A number of a function, or one of REASONS."""
        ending = deadline.possible()
        wait = self._seconds + (_TO_END if ending else 0.0)
        late = threading.Timer(wait, _warn, (part.name, wait, question, _STUCK))
        late.daemon = True
        late.start()
        try:
            with deadline.within(self._seconds) if ending else contextlib.nullcontext():
                return _of_function(self._functions[part.name], question)
        except deadline.TooLate:
            _warn(part.name, self._seconds, question, _ENDED)
            return TIMED_OUT
        finally:
            late.cancel()

    def _sum(self, said: Sequence[float | str]) -> Verdict:
        values = tuple(None if isinstance(one, str) else one for one in said)
        reason = next((one for one in said if isinstance(one, str)), None)
        if reason is not None:
            return Verdict(None, values, reason)
        pairs = zip(self._parts, said, strict=True)
        return Verdict(sum(part.weight * float(one) for part, one in pairs), values)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for _, process in self._processes:
            process.close()

    def __enter__(self) -> "Judges":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _warn(name: str, seconds: float, question: Question, told: str) -> None:
    _log.warning(
        "verifier %s: has said nothing for %g s of the answer %r to %r: %s",
        name,
        seconds,
        question.answer[:200],
        question.prompt[-200:],
        told,
    )


def _of_function(function: Function, question: Question) -> float | str:
    """What a function of the caller says, or one of REASONS."""
    try:
        value = function(*question)
    except (Exception, SystemExit):  # whatever a caller's function makes of a strange answer
        return FAILED
    return SILENT if value is None else _checked(value)


def _of_process(process: Guarded, part: WeightedVerifier, question: Question) -> float | str:
    """What a scorer in a process says, or one of REASONS."""
    gold = question.record.get("answer")
    if gold is None and part.name not in scorers.NEED_NO_ANSWER:
        return SILENT
    text = question.answer
    try:
        if part.name == scorers.MATH:
            text = extract.without_thinking(text)[-extract.LONGEST :]
            return float(bool(process(text, gold)[1]))
        return _checked(process(part.name, dict(part.options), text, gold))
    except TimedOut:
        return TIMED_OUT
    except RuntimeError:
        return FAILED


def _checked(value: Any) -> float | str:
    """A reward that can be used, or REFUSED."""
    if isinstance(value, str | bytes):
        return REFUSED
    try:
        number = float(value)
    except Exception:  # of no number, of one beyond floats, or of a class of the caller's
        return REFUSED
    return number if math.isfinite(number) and abs(number) <= LARGEST else REFUSED


def _home(name: str) -> str:
    """The function of a process that judges by this name."""
    return _MATH if name == scorers.MATH else _RATE


def check(part: WeightedVerifier, functions: Mapping[str, Any]) -> None:
    """Refuses a verifier that does not exist, or cannot work.

    Raises:
      ConfigError: naming it.
    """
    known = {*scorers.SCORERS, scorers.MATH}
    if part.name in functions and part.name in known:
        raise ConfigError(f"verifier {part.name}: is the name of a built-in one: choose another")
    if part.name not in functions and part.name not in known:
        raise ConfigError(
            f"verifier {part.name}: is neither one of {', '.join(sorted(known))} nor handed in: "
            "distill(config, verifiers={name: function})"
        )
    if told := scorers.check(part.name, part.options):
        raise ConfigError(f"verifier {part.name}: {told}")
    if part.name == scorers.MATH and importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "verifier math: needs math-verify, which is not installed: pip install "
            "'jaxdistill[math]'"
        )
