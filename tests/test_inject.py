"""The injectors: what they break and mark, how often, and that production code has no others."""

import errno
import pathlib
import re

import numpy as np
import pytest

import jaxdistill
from jaxdistill.train.hooks import NO_HOOKS, POINTS
from jaxdistill.types import Batch
from tests.inject import Fault, Poison

SOURCES = [path.read_text() for path in pathlib.Path(jaxdistill.__file__).parent.rglob("*.py")]


def batch():
    ones = np.ones((4, 3), np.int32)
    return Batch(ones, ones, ones > 0, ones, ones)


def test_without_hooks_nothing_happens_and_nothing_changes():
    for name in POINTS:
        NO_HOOKS.at(name)
    one = batch()
    assert NO_HOOKS.batch(3, one) is one and NO_HOOKS.loss(batch) is batch


def test_a_fault_happens_at_its_point_the_time_that_was_asked_for():
    fault = Fault("checkpoint.seal:2:full")
    fault.at("checkpoint.seal")
    fault.at("checkpoint.commit")
    with pytest.raises(OSError, match="No space left.*checkpoint.seal") as error:
        fault.at("checkpoint.seal")
    assert error.value.errno == errno.ENOSPC
    fault.at("checkpoint.seal")


@pytest.mark.parametrize(
    "text", ["nowhere:1:kill", "step.before:1:dance", "step.before:x:kill", "x"]
)
def test_a_fault_that_cannot_be_injected_is_refused(text):
    with pytest.raises(ValueError, match="POINT:N:ACTION"):
        Fault(text)


def test_the_code_has_every_point_and_no_other():
    used = re.findall(r'hooks\.at\("([^"]+)"\)', "\n".join(SOURCES))
    used.remove("step.before"), used.remove("step.after")  # of an example
    assert sorted(used) == sorted(POINTS)


def test_no_environment_variable_breaks_a_run_or_changes_its_numbers():
    variables = set(re.findall(r"JAXDISTILL_[A-Z_]+", "\n".join(SOURCES)))
    assert variables == {"JAXDISTILL_DATA", "JAXDISTILL_LAUNCHER", "JAXDISTILL_TILING"}


def test_it_marks_one_token_of_the_batches_it_is_given_as_often_as_it_is_asked_to():
    poison = Poison("nan@5, inf@6x2,gradient@9")
    marks = lambda index: np.argwhere(np.asarray(poison.batch(index, batch()).positions) < 0)
    assert marks(5).tolist() == marks(5).tolist() == marks(5).tolist() == [[1, 0]]
    assert [marks(6).tolist() for _ in range(3)] == [[[2, 0]], [[2, 0]], []]
    assert marks(9).tolist() == [[1, 0]] and marks(4).tolist() == []


@pytest.mark.parametrize("text", ["nan", "nan@", "zero@3", "nan@3x", "nan@-1", "nan@3;inf@4", ","])
def test_a_poison_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="KIND@BATCH"):
        Poison(text)
