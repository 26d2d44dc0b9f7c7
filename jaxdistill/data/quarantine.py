"""The records that were left out: why, whether that is a fault, and lists for who repairs them."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.data import store
from jaxdistill.data.rules import (
    Empty,
    TooLong,
    Unaligned,
    Unlearned,
    WithoutContext,
    printable,
)
from jaxdistill.errors import DataError

BROKEN = "quarantined"
_NO_FAULT = {
    Empty: "empty",
    TooLong: "too_long",
    Unlearned: "unlearned",
    Unaligned: "unaligned",
    WithoutContext: "without_context",
}
_SHOWN_REASONS = 3


def why(reason: str) -> str:
    """The name of the count that a record belongs to; `BROKEN` where the record is at fault."""
    return next((name for kind, name in _NO_FAULT.items() if isinstance(reason, kind)), BROKEN)


def entry(name: str | int, line: int, reason: str) -> dict[str, Any]:
    """A record that was left out: file, line, reason, and whether the record is at fault."""
    # Reasons quote the data, which must not steer the terminal that shows them.
    shown = printable(reason).replace("\n", "\\n")
    return {"file": name, "line": line, "reason": shown, "broken": why(reason) == BROKEN}


def stop_at(left_out: Mapping[str, Any]) -> None:
    """With `on_bad_record: fail`: refuses the first broken record.

    Raises:
      DataError: if it is one.
    """
    if left_out["broken"]:
        raise DataError(
            f"{_told(left_out)} (data.on_bad_record is 'fail': repair the record, or use "
            "'quarantine' to leave it out)"
        )


def check_share(
    key: str, broken: int, records: int, allowed: float, reasons: Sequence[str], where: str = ""
) -> None:
    """Refuses sources of which too many records are broken.

    Args:
      key: of the sources, such as "data.train".
      broken: how many.
      records: of how many.
      allowed: data.max_bad_fraction.
      reasons: of the first few.
      where: said at the end.

    Raises:
      DataError: with the numbers.
    """
    if broken > allowed * records:
        raise DataError(
            f"{key}: {broken} of {records} records ({broken / records:.2%}) cannot be used, more "
            f"than max_bad_fraction {allowed:g} allows: {'; '.join(reasons)}{where}"
        )


def _told(left_out: Mapping[str, Any]) -> str:
    return f"{left_out['file']}:{left_out['line']}: {left_out['reason']}"


def shown(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first few broken records as `file:line: reason`; of others where none is broken."""
    broken = [one for one in entries if one["broken"]]
    return [_told(one) for one in (broken or entries)[:_SHOWN_REASONS]]


def first_reasons(folder: Path, names: Sequence[str]) -> list[str]:
    """What `shown` says of the records of a folder."""
    return shown(list(_quarantined(folder, names)))


def export(folder: Path, names: Sequence[str], path: Path | None) -> None:
    """Writes the quarantined records of a folder for the user: file, line, reason, as JSONL.

    Args:
      folder: of the data set.
      names: of its sources, in order.
      path: the file; nothing is written for None, or where no record was left out.
    """
    if path is not None and (folder / store.QUARANTINE).stat().st_size:
        write(path, _quarantined(folder, names))


def write(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes records that were left out for the user: file, line, reason, as JSONL.

    Raises:
      StorageError: if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with store.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for one in entries:
                told = {name: one[name] for name in ("file", "line", "reason")}
                file.write(json.dumps(told) + "\n")
        os.replace(temporary, path)


def _quarantined(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    with (folder / store.QUARANTINE).open(encoding="utf-8") as file:
        for line in file:
            one = json.loads(line)
            # The folder knows sources by number: the same content may lie elsewhere by now.
            yield {"file": names[one.pop("source")], **one}
