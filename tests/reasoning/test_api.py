"""A teacher over HTTP: every fault is survived or counted, nothing is asked or counted twice."""

import collections
import re
import subprocess
import sys
import threading
import time
import types

import pytest

from jaxdistill.errors import ModelError
from jaxdistill.reasoning import bounded_http, served
from jaxdistill.reasoning.asking import Job, SamplingParams
from tests.reasoning.teachers import UNSCORED

pytest.importorskip("openai", reason="needs the extra api")

SETTINGS = SamplingParams(max_new_tokens=8, temperature=1.0, top_k=5, stop=("\nQ:",))


def _jobs(count, samples=1):
    return collections.deque(Job(f"q{n}", "x" * n, SETTINGS, count=samples) for n in range(count))


def _api(server, **options):
    from jaxdistill.reasoning.served import ApiClient

    return ApiClient(
        server.url, "m", **({"retries": 2, "timeout": 5.0, "concurrency": 1} | options)
    )


def test_answers_have_text_score_and_are_counted(scripted):
    api = _api(scripted, concurrency=4, prices=(1e6, 2e6))
    answers = list(api.ask(_jobs(9, samples=3)))
    assert {(a.job.id, a.sample) for a in answers} == {
        (f"q{n}", s) for n in range(9) for s in range(3)
    }
    assert all(a.text.startswith(" So it is.") and a.logprob == -1.5 for a in answers)
    assert api.spent() == {"requests": 9, "tokens_in": 90, "tokens_out": 54, "cost": 90 + 108}
    asked = scripted.seen[0]
    assert (asked["n"], asked["top_k"], asked["stop"], asked["logprobs"]) == (3, 5, ["\nQ:"], 0)


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, "die", "not json", "no choices", "no text", "half a character", "one"],
)
def test_a_fault_that_passes_is_tried_again(scripted, fault):
    scripted.faults = [fault]
    answers = list(_api(scripted).ask(_jobs(1, samples=2)))
    assert sorted(a.sample for a in answers) == [0, 1] and not any(a.failed for a in answers)
    assert len(scripted.seen) == 2
    if fault == "one":
        assert [body["n"] for body in scripted.seen] == [2, 1]


def test_a_server_that_hangs_costs_its_time(scripted):
    scripted.faults = ["hang"]
    (answer,) = _api(scripted, timeout=0.5, retries=1).ask(_jobs(1))
    assert not answer.failed and len(scripted.seen) == 2


@pytest.mark.parametrize("fault", ["drip", "drip headers"])
def test_a_server_that_drips_costs_its_time(scripted, fault):
    scripted.faults = [fault]
    began = time.monotonic()
    (answer,) = _api(scripted, timeout=0.5, retries=1).ask(_jobs(1))
    assert not answer.failed and len(scripted.seen) == 2
    assert time.monotonic() - began < 15  # it drips for twenty


def test_the_time_is_that_of_the_whole_request():
    """A body that stops between two pieces has no second time: who asks does not see it resume."""
    http = pytest.importorskip("httpx2")
    resumed = threading.Event()

    class Stops(http.SyncByteStream):
        def __iter__(self):
            yield b"{"
            time.sleep(5.0)  # long after the time
            resumed.set()
            yield b"}"

    transport = bounded_http._bounded(http, 0.1)
    transport._inner = types.SimpleNamespace(
        handle_request=lambda _: http.Response(200, stream=Stops()), close=lambda: None
    )
    with pytest.raises(http.ReadTimeout, match="no whole answer within 0.1 s"):
        transport.handle_request(http.Request("POST", "http://localhost/v1"))
    assert not resumed.is_set()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("gzip", "the answer is compressed"),
        ("large", "more than 50000 bytes"),
        ("redirect", "Redirect|307"),
        ("many", "the answer holds more than 4000 objects"),
        ({"prompt_tokens": -5}, "usage: prompt_tokens: -5 is no number of tokens"),
        ({"completion_tokens": float("nan")}, "usage: completion_tokens: nan is no number"),
        ({"completion_tokens": 10**400}, "usage: completion_tokens: 1000"),
        ({"completion_tokens": 10**9}, "usage: completion_tokens: 1000000000 is no number"),
    ],
)
def test_what_no_server_should_say_is_one_failed_answer(scripted, monkeypatch, fault, words):
    monkeypatch.setattr(bounded_http, "MAX_ANSWER", 50_000)
    monkeypatch.setattr(served, "MAX_OBJECTS", 4_000)
    scripted.faults = [fault] * 3
    api = _api(scripted, retries=2)
    (answer,) = api.ask(_jobs(1))
    assert answer.failed and re.search(words, answer.reason), answer.reason
    assert set(api.spent().values()) == {0.0}


def test_an_answer_that_is_nested_too_deeply_is_one_failed_answer(scripted):
    scripted.faults = ["deep"] * 3
    (answer,) = _api(scripted).ask(_jobs(1))
    assert answer.failed and "nested too deeply" in answer.reason


@pytest.mark.parametrize("fault", UNSCORED)
def test_a_score_that_is_no_number_is_not_known(scripted, fault):
    scripted.faults = [fault]
    (answer,) = _api(scripted).ask(_jobs(1))
    assert answer.logprob is None and not answer.failed and answer.tokens == 0
    assert answer.text.startswith(" So it is.")


def test_who_stops_asking_waits_for_no_server_that_hangs(scripted):
    code = (
        "import collections\n"
        "from jaxdistill.reasoning.served import ApiClient\n"
        "from jaxdistill.reasoning.asking import Job, SamplingParams\n"
        f"api = ApiClient({scripted.url!r}, 'm', timeout=60, retries=5, concurrency=2)\n"
        "jobs = collections.deque(Job(n, n, SamplingParams(8)) for n in 'ab')\n"
        "for answer in api.ask(jobs):\n"
        "    raise KeyboardInterrupt\n"
    )
    released = threading.Event()
    scripted.faults = [None, released]
    command = [sys.executable, "-c", code]
    try:
        ended = subprocess.run(command, timeout=50, stderr=subprocess.PIPE)  # less than one try
    finally:
        released.set()
    assert b"KeyboardInterrupt" in ended.stderr


def test_what_fails_for_good_is_one_failed_answer(scripted):
    scripted.faults = [400]
    answers = list(_api(scripted).ask(_jobs(3)))
    assert sorted(a.failed for a in answers) == [False, False, True]
    failed = next(a for a in answers if a.failed)
    assert failed.reason.startswith("BadRequestError") and len(scripted.seen) == 3
    scripted.faults = ["no text"] * 3
    (answer,) = _api(scripted).ask(_jobs(1))
    assert answer.failed and "a choice holds no text" in answer.reason


def test_many_failures_in_a_row_end_it(scripted):
    scripted.faults = [400, None, 400, 400, 400]
    api, answers = _api(scripted, max_failures=3), []
    with pytest.raises(ModelError, match="scripted 400.*3 requests in a row; what was received"):
        for answer in api.ask(_jobs(50)):
            answers.append(answer)
    assert [a.failed for a in answers] == [True, False, True, True, True]
    scripted.faults = [401]
    with pytest.raises(ModelError, match="AuthenticationError"):
        list(_api(scripted).ask(_jobs(5)))
    scripted.server_close()
    with pytest.raises(ModelError, match="APIConnectionError|APITimeoutError"):
        list(_api(scripted, retries=0, timeout=0.5, max_failures=1).ask(_jobs(2)))


def test_jobs_may_be_added_while_answers_are_read(scripted):
    jobs, seen = _jobs(2), []
    for answer in _api(scripted).ask(jobs):
        seen.append(answer.job.id)
        if answer.job.id == "q0":
            jobs.append(Job("more", "x", SETTINGS))
    assert sorted(seen) == ["more", "q0", "q1"]
