"""The long form of tests/serve/test_load.py: two hundred clients for minutes, most of them bad."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from jaxdistill import models
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.serve import app, listening, service

CLIENTS = 200
SECONDS = 300
WARM = 0.2  # share of the time after which memory must not grow


def run(seconds: int, clients: int = CLIENTS, seed: int = 0) -> dict[str, Any]:
    """Serves a tiny model, in this process, to clients of another.

    Args:
      seconds: how long they ask.
      clients: how many there are.
      seed: of what they do.

    Returns:
      How often each outcome was seen, which of them are faults, the slowest answer of /health in
      seconds, and this process's memory in MB, warm and in the end.

    Raises:
      AssertionError: for any fault, memory that grew by 50 MB, or work that is left. How long
        /health took says as much about the machine's other work, whose load stands beside it.
    """
    made = service.Service(_model(), slots=8, length=128)
    taken = listening.bind("127.0.0.1", 0)
    with contextlib.closing(made), listening.running(app.make_app(made, key=None), taken) as port:
        _ask(port, 1, 10, seed).communicate()  # compiles
        asking = _ask(port, clients, seconds, seed, nice=10)
        looking = _ask(port, 0, seconds, seed)  # who asks about health waits for nothing else
        time.sleep(WARM * seconds)
        warm = _megabytes()
        told, _ = asking.communicate(timeout=10 * seconds + 300)
        found = json.loads(told)
        health = json.loads(looking.communicate()[0])
        found["bad"] |= health["bad"]
        found["slowest_health"] = round(health["slowest_health"], 3)
        until = time.monotonic() + 60
        while made.engine.pending and time.monotonic() < until:
            time.sleep(0.1)
        found |= {"clients": clients, "seconds": seconds, "left": made.engine.pending}
        found["load_per_core"] = round(os.getloadavg()[0] / (os.cpu_count() or 1), 1)
        found |= {"megabytes_warm": warm, "megabytes_end": _megabytes()}
    assert not found["bad"] and not found["left"], found
    assert found["megabytes_end"] < found["megabytes_warm"] + 50, found
    return found


def _ask(*numbers: int, nice: int = 0) -> subprocess.Popen:
    command = [
        "nice",
        "-n",
        str(nice),
        sys.executable,
        "-m",
        "tests.serve.load",
        *map(str, numbers),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _model() -> models.Model:
    tokenizer = byte_tokenizer()
    config = models.DecoderConfig(
        "llama",
        vocab_size=len(tokenizer),
        embed=16,
        mlp=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=8,
        max_positions=512,
        initializer_range=0.3,
    )
    return models.random(config, 0, tokenizer=tokenizer)


def _megabytes() -> int:
    """Resident memory of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 2**20
