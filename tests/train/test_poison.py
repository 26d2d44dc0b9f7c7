"""The injector of bad numbers: what it marks, how often, and what it refuses to read."""

import numpy as np
import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.train import poison
from jaxdistill.types import Batch


def batch():
    ones = np.ones((4, 3), np.int32)
    return Batch(ones, ones, ones > 0, ones, ones)


def test_it_marks_one_token_of_the_batches_it_is_told_as_often_as_it_is_told():
    plan = poison.Poison("nan@5, inf@6x2,gradient@9")
    marks = lambda index: np.argwhere(np.asarray(plan.mark(index, batch()).positions) < 0).tolist()
    assert marks(5) == marks(5) == marks(5) == [[1, 0]]
    assert [marks(6), marks(6), marks(6)] == [[[2, 0]], [[2, 0]], []]
    assert marks(9) == [[1, 0]] and marks(4) == []


def test_it_is_off_unless_the_variable_asks(monkeypatch):
    monkeypatch.delenv(poison.VARIABLE, raising=False)
    assert poison.from_environment() is None
    monkeypatch.setenv(poison.VARIABLE, "nan@3")
    assert poison.from_environment() is not None


@pytest.mark.parametrize("text", ["nan", "nan@", "zero@3", "nan@3x", "nan@-1", "nan@3;inf@4", ","])
def test_what_it_cannot_read_is_refused(text):
    with pytest.raises(ConfigError, match="JAXDISTILL_POISON.*KIND@BATCH"):
        poison.Poison(text)
