"""When a save is due, and what becomes of a run that cannot save."""

import pytest

from jaxdistill.errors import StorageError
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.saving import Saver, SaveSchedule


class Disk(Checkpoints):
    """Stands in for Checkpoints: `full` fails at once, `breaks` in the background."""

    def __init__(self):
        self.full = self.breaks = False
        self.saved, self.sent = [], None

    def save(self, number, state, meta, metrics, beside):
        self.wait()
        if self.full:
            raise StorageError(f"step {number}: no space")
        self.sent = number

    def wait(self):
        sent, self.sent = self.sent, None
        if sent is not None:
            if self.breaks:
                raise StorageError(f"step {sent}: no space")
            self.saved.append(sent)

    poll = wait


class Case:
    """A saver on a clock that a test moves, in seconds."""

    def __init__(self, steps=None, minutes=None, unsaved=10.0, first=0, last=1000):
        self.now, self.disk, self.told = 0.0, Disk(), []
        schedule = SaveSchedule(steps, minutes, unsaved)
        note = lambda error: self.told.append(str(error))
        self.saver = Saver(self.disk, schedule, first, last, note, lambda: self.now)

    def save(self, number, final=False):
        return self.saver.save(number, None, {}, None, final)


@pytest.mark.parametrize("first", [0, 400])
def test_the_first_save_comes_after_one_percent_of_the_steps_or_two_minutes(first):
    case = Case(steps=500, first=first)
    due = [number for number in range(first + 1, 1001) if case.saver.due(number)]
    assert due == [first + 10, 500, 1000]
    assert not case.saver.overdue()
    case.now = 119.9
    assert not case.saver.overdue()
    case.now = 120.0
    assert case.saver.overdue()


def test_a_short_run_saves_its_first_step():
    assert Case(last=7).saver.due(1)


def test_time_is_counted_from_the_last_save_and_may_be_shorter_than_two_minutes():
    case = Case(minutes=1.0)
    case.now = 60.0
    assert case.saver.overdue()
    case.save(3)
    assert not case.saver.overdue()
    case.now = 119.0
    assert not case.saver.overdue()
    case.now = 120.0
    assert case.saver.overdue()


@pytest.mark.parametrize("how", ["full", "breaks"])
def test_a_failed_save_is_told_and_tried_again_after_a_minute_until_it_works(how):
    case = Case(minutes=15.0)
    assert case.save(1)
    case.saver.poll()
    assert case.disk.saved == [1]
    setattr(case.disk, how, True)
    case.now = 100.0
    assert case.save(2) is (how == "breaks")
    case.saver.poll()
    assert case.told == ["step 2: no space"]
    case.now = 159.0
    assert not case.saver.overdue()
    case.now = 160.0
    assert case.saver.overdue()
    setattr(case.disk, how, False)
    assert case.save(3)
    case.saver.poll()
    assert case.disk.saved == [1, 3] and len(case.told) == 1
    case.now = 160.0 + 14 * 60  # and the old rhythm is back
    assert not case.saver.overdue()


def test_a_run_that_has_saved_nothing_for_too_long_ends_with_the_reason():
    case = Case(minutes=15.0, unsaved=10.0)
    case.now = 60.0
    case.save(1)
    case.now = 120.0
    case.save(2)  # tells that the one at 60 s is complete
    case.disk.full = True
    case.now = 60.0 + 600.0
    assert not case.save(3)  # ten minutes since then: still allowed
    case.now = 60.0 + 601.0
    with pytest.raises(StorageError, match="step 4: no space.*10 minutes.*max_unsaved_minutes"):
        case.save(4)


def test_the_last_save_is_waited_for_and_tried_twice():
    case = Case()
    case.save(1, final=True)
    assert case.disk.saved == [1]
    case.disk.breaks = True
    assert case.save(2)
    case.disk.breaks = False
    assert case.save(3, final=True)
    assert case.disk.saved == [1, 2, 3]
    case.disk.full = True
    with pytest.raises(StorageError, match="step 4"):
        case.save(4, final=True)
