"""One process alone: every answer is its own. Several are in tests/engine/test_processes.py."""

import pytest

from jaxdistill import agree
from jaxdistill.errors import DataError


def fail():
    raise DataError("data.train: no file")


def test_a_process_alone_answers_itself_at_once():
    vote = agree.Vote()
    assert [vote(level) for level in (0, 2, 1, 0)] == [0, 2, 1, 0]
    assert agree.leads()
    agree.same({"train.steps": 30})


@pytest.mark.parametrize("how", [agree.together, agree.by_leader])
def test_a_process_alone_works_and_fails_by_itself(how):
    assert how(lambda: 5) == 5
    with pytest.raises(DataError, match="^data.train: no file$"):
        how(fail)
