"""JSON from strangers: one meaning for every text, and a ValueError for all others."""

import json
import math
from typing import Any

MOST_DIGITS = 308  # of a whole number: with more it is no float, and dividing it is an error


def loads(text: str | bytes, *, nonfinite: bool = False) -> Any:
    """The value of a JSON text; with `nonfinite`, NaN and Infinity are read as null.

    Stricter than `json.loads`, which takes the last of two equal keys, and NaN and Infinity, which
    JSON does not have, and numbers beyond the range of a float; and what is nested too deeply, or
    is no UTF-8, is a ValueError too.

    >>> loads('{"a": [1, null]}')
    {'a': [1, None]}
    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key "a" stands there twice

    Raises:
      ValueError: saying what is wrong.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=(lambda _: None) if nonfinite else _no_number,
            parse_int=_whole,
            parse_float=_float,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"the key {json.dumps(name[:40])} stands there twice")
        made[name] = value
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"{text[:20]}... is a number beyond the range of a float")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is a number beyond the range of a float")
    return value
