"""JSON from strangers: one meaning for every text, and a ValueError for all others."""

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Stricter than `json.loads`, which takes the last of two equal keys, and NaN and Infinity, which
    JSON does not have; and what is nested too deeply is a ValueError too.

    >>> loads('{"a": [1, null]}')
    {'a': [1, None]}
    >>> loads('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key "a" stands there twice

    Raises:
      ValueError: saying what is wrong.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
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
