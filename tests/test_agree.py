"""Processes agree: one alone with itself at once, two real ones with each other."""

import json
import os
import subprocess
import sys

import pytest

from jaxdistill import agree
from jaxdistill.cli import launch
from jaxdistill.errors import DataError

pytestmark = pytest.mark.floor


def fail():
    raise DataError("data.train: no file")


def test_a_process_alone_answers_itself_at_once():
    vote = agree.Vote()
    assert [vote(level) for level in (0, 2, 1, 0)] == [0, 2, 1, 0]
    assert agree.leads()
    agree.same({"train.steps": 30})


@pytest.mark.parametrize("how", [agree.together, agree.by_leader, agree.leader_first])
def test_a_process_alone_works_and_fails_by_itself(how):
    assert how(lambda: 5) == 5
    with pytest.raises(DataError, match="^data.train: no file$"):
        how(fail)


@pytest.fixture(scope="module")
def learned():
    """What each of two processes learned."""
    port = launch._free_port()
    command = [sys.executable, "-m", "tests.agreeing"]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | launch._environment(rank, 2, 1, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_a_wish_of_one_is_heard_by_all_in_the_same_call_and_once(learned):
    assert [one["heard"] for one in learned] == [[0, 0, 0, 2, 0, 0, 0]] * 2


def test_errors_of_one_are_errors_of_all(learned):
    first, second = learned
    assert (first["together"], second["together"]) == (0, 1)
    assert second["failure"] == ["DataError", "a: no file\nb: no file"]
    assert first["failure"] == ["DataError", "process 1: a: no file\nprocess 1: b: no file"]
    assert first["leader"] == second["leader"] == {"by": 0}
    assert first["crash"] == ["RuntimeError", "division"]
    assert second["crash"] == ["RuntimeError", "process 0: division"]
    assert (first["order"], second["order"]) == ([True], [False])


def test_the_others_wait_for_a_leader_who_takes_longer_than_a_question(learned):
    assert [one["slow"] for one in learned] == ["built", "built"]


def test_what_differs_is_named_with_its_process(learned):
    for one in learned:
        assert one["same"] is None
        kind, words = one["other"]
        assert kind == "ConfigError"
        assert "train.steps: process 0 has 0, process 1 has 1" in words
        assert "r1: process 0 has None, process 1 has 0" in words and "seed" not in words
