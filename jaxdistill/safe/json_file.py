"""The one reader of small JSON files: a value of the shape that is asked for, or one message."""

import json
import math
import pathlib
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from jaxdistill.errors import DamagedError, UserError
from jaxdistill.safe import strict_json

MAX_BYTES = 100_000_000  # far above what any of them has; far below what memory has

_ROUNDING = 1e-6  # by which a share of sums in float32 may be beyond its range

FieldTypes = Mapping[str, type | tuple[type, ...]]


def read(path: pathlib.Path, shape: FieldTypes | None = None, *, missing: Any = ...) -> Any:
    """The JSON object in a file.

    Args:
      path: a regular file; a pipe or a device would never end.
      shape: keys that the object must have -> types that their values may have.
      missing: returned where there is no file; without it that is an error.

    Raises:
      DamagedError: naming the file and what is wrong with it: missing, cut, empty, not UTF-8, no
        JSON, nested too deeply, numbers beyond a float, text that is no Unicode, another shape.
    """
    try:
        if missing is not ... and not path.exists():
            return missing
        value = parse(_bytes(path))
        check(value, shape or {})
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{path}: is damaged: {error}") from error
    return value


def parse(data: str | bytes) -> Any:
    """The value of a JSON text that can be written again.

    Raises:
      ValueError: saying what is wrong.
    """
    if not data.strip():
        raise ValueError("it is empty")
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    value = strict_json.loads(text)
    if "\\u" in text:  # an escape may name half a character, which nothing can print or keep
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it holds a lone surrogate, half a character") from None
    return value


def check(value: Any, shape: FieldTypes) -> None:
    """Raises ValueError where a value is no object, or one of its fields is of another type."""
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    for name, types in shape.items():
        if name not in value:
            raise ValueError(f"it has no field {name!r}")
        allowed = types if isinstance(types, tuple) else (types,)
        entry = value[name]
        wrong = isinstance(entry, bool) and bool not in allowed
        if wrong or not isinstance(entry, allowed):
            names = " or ".join(one.__name__ for one in allowed)
            raise ValueError(f"its field {name!r} is no {names}")


def check_shares(value: Any, names: Iterable[str]) -> None:
    """Raises ValueError where one of the fields is no share: a number from 0 to 1."""
    for name in names:
        check(value, {name: (int, float)})
        if not -_ROUNDING <= value[name] <= 1 + _ROUNDING:
            raise ValueError(f"its field {name!r} is {value[name]!r:.40}: must be from 0 to 1")


def amounts(value: Any) -> dict[str, float]:
    """The object's numbers, none of them negative; ValueError where that is not so."""
    check(value, {})
    check(value, dict.fromkeys(value, (int, float)))
    for name, number in value.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name[:40]}: {number!r:.40} is no amount")
    return {name: float(number) for name, number in value.items()}


def _bytes(path: pathlib.Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES} bytes")
    return path.read_bytes()
