"""A pool of processes: answers in order, failures in words, nobody left behind."""

import os
import signal
import time

import pytest

from jaxdistill.errors import DataError
from jaxdistill.safe.pool import Died, Pool

MAIN = "tests.safe.pooled:opened"


def gone(process):
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    return True


@pytest.fixture
def pool(tmp_path):
    with Pool(MAIN, str(tmp_path).encode(), 2) as made:
        yield made


def asked(pool, *commands):
    """(process, command) of each answer."""
    for number, (place, answer) in enumerate(
        pool.answers((n, command.encode()) for n, command in enumerate(commands))
    ):
        assert place == number
        process, _, command = answer.decode().partition(" ")
        yield int(process), command


def test_answers_come_in_the_order_of_the_messages_from_several_processes(pool):
    # The first messages take longest: their answers are ready last.
    commands = [f"wait {(12 - n) / 100}" for n in range(12)] + ["x" * 3_000_000]
    found = list(asked(pool, *commands))
    assert [command for _, command in found] == commands
    assert len({process for process, _ in found}) == 2
    assert [command for _, command in asked(pool, "again")] == ["again"]
    pool.close()
    assert all(gone(process) for process, _ in found)


def test_what_is_raised_there_is_raised_here_and_the_pool_goes_on(pool, tmp_path):
    with pytest.raises(DataError, match="^data.x: is refused$"):
        list(asked(pool, "a", "refuse", "b"))
    with pytest.raises(RuntimeError, match="KeyError: 'inner'"):
        list(asked(pool, "fail"))
    assert [command for _, command in asked(pool, "a", "b")] == ["a", "b"]
    with Pool(MAIN, b"broken", 1) as other, pytest.raises(DataError, match="setup: is broken"):
        list(asked(other, "a"))


def test_what_reading_raises_comes_behind_the_answers_before_it(pool):
    def commands():
        yield 0, b"wait 0.2"
        yield 1, b"b"
        raise DataError("line 3")

    found = []
    with pytest.raises(DataError, match="line 3"):
        found.extend(place for place, _ in pool.answers(commands()))
    assert found == [0, 1]


def test_a_killed_process_is_replaced_and_its_message_answered(pool, caplog):
    commands = ["a", "die one", "b", "c", "die two", "d"]
    found = list(asked(pool, *commands))
    assert [command for _, command in found] == commands
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all("was ended by SIGKILL, as where memory is short" in one and
                                  "is done again" in one for one in told)  # fmt: skip


def test_processes_that_end_while_they_wait_take_no_message_along(pool, tmp_path):
    for _ in range(2):
        processes = {process for process, _ in asked(pool, *["wait 0.05"] * 6)}
        assert len(processes) == 2
        for process in processes:
            os.kill(process, signal.SIGKILL)
            os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    found = list(asked(pool, "die one", "a", "b"))
    assert [command for _, command in found] == ["die one", "a", "b"]


def test_a_message_that_ends_two_processes_is_named(pool, caplog):
    with pytest.raises(Died, match="ended with code 3: last words") as caught:
        list(asked(pool, "a", "exit", "b"))
    assert caught.value.place == 1 and len(caplog.records) == 1


def test_ctrl_c_is_for_the_one_who_asks_and_ends_all(tmp_path):
    processes = []
    with pytest.raises(KeyboardInterrupt):
        with Pool(MAIN, str(tmp_path).encode(), 2) as pool:
            for process, _ in asked(pool, "a", "b", "c", "d", "e", "sleep", "f", "g", "h", "i"):
                processes.append(process)
                os.kill(process, signal.SIGINT)  # which they do not mind
                while len(processes) == 5 and not (tmp_path / "asleep").exists():
                    time.sleep(0.01)
                if len(processes) == 5:
                    os.kill(os.getpid(), signal.SIGINT)
    assert len(processes) == 5 and all(map(gone, set(processes)))
