"""What the compiled programs take of the requests in the slots: only what some row uses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.models.requests import Request

# Settings that leave every token in.
_OFF: Mapping[str, tuple[float, Any]] = {
    "top_k": (2**31 - 1, np.int32),
    "top_p": (1.0, np.float32),
    "min_p": (0.0, np.float32),
}
_NO_PENALTY = {"repetition": 1.0, "frequency": 0.0, "presence": 0.0}


def settings(requests: Mapping[int, Request], slots: int) -> dict[str, np.ndarray]:
    """Settings of all slots, as `sampling.pick` and `sampling.adjust` take them; {} is greedy.

    Args:
      requests: by slot.
      slots: how many there are.
    """
    made = _biases(requests, slots) | _penalties(requests, slots)
    if not any(request.temperature > 0 for request in requests.values()):
        return made
    made["temperature"] = np.zeros(slots, np.float32)
    for slot, request in requests.items():
        made["temperature"][slot] = request.temperature
    for name, (off, dtype) in _OFF.items():
        given = {slot: getattr(request, name) for slot, request in requests.items()}
        if any(value is not None for value in given.values()):
            made[name] = np.full(slots, off, dtype)
            for slot, value in given.items():
                made[name][slot] = off if value is None else value
    return made


def _biases(requests: Mapping[int, Request], slots: int) -> dict[str, np.ndarray]:
    most = max((len(request.bias) for request in requests.values()), default=0)
    if not most:
        return {}
    shape = slots, 1 << (most - 1).bit_length()
    made = {"bias_token": np.full(shape, -1, np.int32), "bias": np.zeros(shape, np.float32)}
    for slot, request in requests.items():
        for place, (token, added) in enumerate(request.bias):
            made["bias_token"][slot, place], made["bias"][slot, place] = token, added
    return made


def _penalties(requests: Mapping[int, Request], slots: int) -> dict[str, np.ndarray]:
    if not any(request.penalised for request in requests.values()):
        return {}
    made = {name: np.full(slots, off, np.float32) for name, off in _NO_PENALTY.items()}
    for name, values in made.items():
        for slot, request in requests.items():
            values[slot] = getattr(request, f"{name}_penalty")
    return made


def history(
    rows: Mapping[int, tuple[Request, Sequence[int]]], slots: int, length: int
) -> dict[str, np.ndarray]:
    """Tokens read and written by all slots, as `sampling.tally` takes them; {} without penalties.

    Args:
      rows: by slot, the request and what was written so far.
      slots: how many there are.
      length: tokens of the longest row.
    """
    if not any(request.penalised for request, _ in rows.values()):
        return {}
    made = {name: np.full((slots, length), -1, np.int32) for name in ("read", "written")}
    for slot, (request, tokens) in rows.items():
        made["read"][slot, : len(request.tokens)] = request.tokens
        made["written"][slot, : len(tokens)] = tokens
    return made
