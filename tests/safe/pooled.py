"""What the processes of `test_pool` do: standard library alone, so that they start at once."""

import os
import pathlib
import signal
import time

from jaxdistill.errors import DataError


def opened(folder):
    """Answers a command with the process's id and the command; `folder` remembers who died."""
    if folder == b"broken":
        raise DataError("setup: is broken")
    place = pathlib.Path(folder.decode())

    def answer(command):
        words = command.decode().split()
        if words[0] == "refuse":
            raise DataError("data.x: is refused")
        if words[0] == "fail":
            raise KeyError("inner")
        if words[0] == "sleep":
            (place / "asleep").touch()
            time.sleep(600)
        if words[0] == "wait":
            time.sleep(float(words[1]))
        if words[0] == "exit":
            print("last words", flush=True)  # on stdout, which is for answers
            os._exit(3)
        if words[0] == "die" and not (place / words[1]).exists():
            (place / words[1]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{os.getpid()} ".encode() + command

    return answer
