"""The injector: off by default, and every named point is somewhere in the code."""

import errno
import pathlib
import re

import pytest

import jaxdistill
from jaxdistill.train import faults


@pytest.fixture
def armed():
    yield faults.arm
    faults.arm("")


def test_nothing_happens_unless_asked():
    for name in faults.POINTS:
        faults.point(name)


def test_a_fault_happens_at_its_point_the_time_that_was_asked_for(armed):
    armed("checkpoint.seal:2:full")
    faults.point("checkpoint.seal")
    faults.point("checkpoint.commit")
    with pytest.raises(OSError, match="No space left.*checkpoint.seal") as error:
        faults.point("checkpoint.seal")
    assert error.value.errno == errno.ENOSPC
    faults.point("checkpoint.seal")


@pytest.mark.parametrize(
    "text", ["nowhere:1:kill", "step.before:1:dance", "step.before:x:kill", "x"]
)
def test_what_cannot_be_injected_is_refused(armed, text):
    with pytest.raises(ValueError, match="JAXDISTILL_FAULT = .*POINT:N:ACTION"):
        armed(text)


def test_the_code_has_every_point_and_no_other():
    root = pathlib.Path(jaxdistill.__file__).parent
    used = set()
    for path in root.rglob("*.py"):
        used |= set(re.findall(r'faults\.point\("([^"]+)"\)', path.read_text()))
    assert used == set(faults.POINTS)
