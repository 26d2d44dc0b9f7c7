"""Rewards: what each verifier gives, and that a hostile answer costs its own reward and no more."""

import concurrent.futures
import contextlib
import math
import re
import signal
import threading
import time

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.reasoning import judging
from jaxdistill.reasoning.judging import Judges, Question, WeightedVerifier
from jaxdistill.safe import deadline

THOUGHT = "<think>2 + 3\nis 5</think> The answer is 5."


def asked(answer, gold="5", **beside):
    record = beside if gold is None else {"answer": gold, **beside}
    return Question("2 + 3 = ", answer, record)


def test_each_verifier_gives_its_number_and_the_sum_is_weighted():
    parts = [
        WeightedVerifier("number", 2.0),
        WeightedVerifier("format", 0.5),
        WeightedVerifier("numeric", 1.0, {"rel": 0.1}),
        WeightedVerifier("regex", 1.0, {"pattern": r"is (\d)\."}),
        WeightedVerifier("length", 0.1, {"limit": 60, "ramp": 20}),
    ]
    with Judges(parts, workers=2, seconds=60.0) as judges:
        right, near, long = judges([asked(THOUGHT), asked("4.8"), asked(THOUGHT + " " * 8)])
    assert right.values == (1.0, 1.0, 1.0, 1.0, pytest.approx((40 - len(THOUGHT)) / 20))
    assert right.reward == pytest.approx(2 + 0.5 + 1 + 1 + 0.1 * right.values[-1])
    assert near.values[:4] == (0.0, 0.0, 1.0, 0.0) and near.values[4] == 0.0
    assert long.values[4] == pytest.approx((40 - len(THOUGHT) - 8) / 20)
    assert {one.reason for one in (right, near, long)} == {None}


def test_functions_of_the_caller_cost_an_answer_at_most():
    said = {"good": 1, "none": None, "nan": math.nan, "large": 1e9, "word": "x"}
    said |= {"text": "1", "endless": 10**400}

    def mine(prompt, answer, record):
        assert prompt == "2 + 3 = " and record["level"] == "2"
        if answer == "raise":
            raise KeyError(answer)
        if answer == "exit":
            raise SystemExit(3)
        return said[answer]

    with Judges([WeightedVerifier("mine")], functions={"mine": mine}) as judges:
        found = judges([asked(name, level="2") for name in (*said, "raise", "exit")])
    assert [one.reward for one in found] == [1.0] + [None] * 8
    assert [one.reason for one in found] == [
        None,
        judging.SILENT,
        *[judging.REFUSED] * 5,
        *[judging.FAILED] * 2,
    ]


def _loops(answer):
    while answer:
        pass


def _keeps(answer):
    """Catches what it can, and goes on."""
    for _ in range(3):
        with contextlib.suppress(Exception):
            time.sleep(60)


def test_functions_run_one_after_the_other_in_the_thread_that_asks_and_are_ended(caplog):
    """A loop, a regular expression, sleep, and a function that catches exceptions."""
    threads = []
    hang = {
        "loop": _loops,
        "regex": lambda _: re.match(r"(a+)+$", "a" * 60 + "b"),
        "sleep": lambda _: time.sleep(60),
        "keep": _keeps,
    }

    def slow(prompt, answer, record):
        threads.append(threading.current_thread())
        hang.get(answer, len)(answer)
        return 1.0

    parts = [WeightedVerifier("slow"), WeightedVerifier("length", 1.0, {"limit": 9, "ramp": 9})]
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0
    with Judges(parts, functions={"slow": slow}, workers=2, seconds=60.0) as judges:
        judges._seconds = 0.05  # of functions; the processes start in their own time
        found = judges([asked(name) for name in (*hang, "quick", "quick")])
    assert set(threads) == {threading.current_thread()}
    assert [one.values[0] for one in found] == [None] * 4 + [1.0] * 2
    assert [one.reason for one in found] == [judging.TIMED_OUT] * 4 + [None] * 2
    assert len(caplog.messages) == 4
    assert "verifier slow: has said nothing for 0.05 s of the answer 'loop'" in caplog.messages[0]
    after = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert after == before


def test_in_another_thread_a_slow_function_is_named_and_waited_for(caplog):
    def slow(prompt, answer, record):
        end = time.monotonic() + 30  # seconds that a warning may take on a busy machine
        while not caplog.messages and time.monotonic() < end:
            time.sleep(0.001)
        return 1.0

    with Judges([WeightedVerifier("slow")], functions={"slow": slow}, seconds=0.05) as judges:
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            (found,) = other.submit(judges, [asked("slow")]).result()
    assert found.reward == 1.0
    (said,) = caplog.messages
    assert "nothing else can end it" in said


def test_a_timer_of_the_caller_is_set_again_after_a_deadline():
    rang = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with deadline.within(60.0):
            time.sleep(0.1)
            assert not rang
        end = time.monotonic() + 30
        while not rang and time.monotonic() < end:
            time.sleep(0.001)
        assert rang
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_a_hostile_answer_costs_its_own_reward():
    """A pattern without end is killed; the others are judged by the same two processes."""
    parts = [WeightedVerifier("regex", 1.0, {"pattern": r"(a+)+$"})]
    good = asked("aaa", "aaa")
    with Judges(parts, workers=2, seconds=60.0) as judges:
        judges([good] * 2)  # both processes run
        processes = [process for _, process in judges._processes]
        for process in processes:
            process._seconds = 0.5
        found = judges([asked("a" * 40 + "b"), *[good] * 5, asked("", None)])
        assert [process for _, process in judges._processes] == processes
    assert [one.reason for one in found] == [judging.TIMED_OUT, *[None] * 5, judging.SILENT]
    assert [one.reward for one in found] == [None, *[1.0] * 5, None]


def test_numbers_beyond_all_bounds_are_wrong_or_without_reward():
    answers = ["9" * 1_000_000, "1" + "0" * 400 + ".5", "\x00\ud800", "__import__('os')._exit(3)"]
    with Judges(
        [WeightedVerifier("number"), WeightedVerifier("numeric"), WeightedVerifier("expression")],
        seconds=60.0,
    ) as judges:
        found = judges([asked(answer) for answer in (*answers, "5")])
    assert [one.reward for one in found[:-1]] == [0.0] * 4
    assert found[-1].reward >= 2.0


def test_math_has_processes_of_its_own():
    pytest.importorskip("math_verify", reason="needs the extra math")
    with Judges(
        [WeightedVerifier("math"), WeightedVerifier("format")], workers=1, seconds=60.0
    ) as judges:
        (found,) = judges([asked(r"<think>x</think> \boxed{\frac{10}{2}}")])
        assert len(judges._processes) == 2
    assert found.values == (1.0, 1.0)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (WeightedVerifier("poem"), "is neither one of"),
        (WeightedVerifier("regex"), "options are not these"),
        (WeightedVerifier("regex", 1.0, {"pattern": "("}), "pattern"),
        (WeightedVerifier("length", 1.0, {"limit": 4, "ramp": 9}), "ramp must be in 1 to limit"),
        (WeightedVerifier("number", 1.0, {"rel": 0.1}), "options are not these"),
        (WeightedVerifier("numeric", 1.0, {"rel": math.inf}), "must be finite"),
    ],
)
def test_what_cannot_judge_is_refused(part, message):
    with pytest.raises(ConfigError, match=message):
        Judges([part])
    with pytest.raises(ConfigError, match="is the name of a built-in one"):
        Judges([WeightedVerifier("number")], functions={"number": len})
