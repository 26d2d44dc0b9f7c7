"""The records that were left out, listed for the person who repairs them."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.data import store

_SHOWN_REASONS = 3


def first_reasons(folder: Path, names: Sequence[str]) -> list[str]:
    """The first few broken records as `file:line: reason`; of others where none is broken."""
    entries = list(_quarantined(folder, names))
    broken = [entry for entry in entries if entry["broken"]]
    reasons = []
    for entry in broken or entries:
        reasons.append(f"{entry['file']}:{entry['line']}: {entry['reason']}")
        if len(reasons) == _SHOWN_REASONS:
            break
    return reasons


def export(folder: Path, names: Sequence[str], path: Path | None) -> None:
    """Writes the quarantined records of a folder for the user: file, line, reason, as JSONL.

    Args:
      folder: of the data set.
      names: of its sources, in order.
      path: the file; nothing is written for None, or where no record was left out.
    """
    if path is None or not (folder / store.QUARANTINE).stat().st_size:
        return
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with store.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for entry in _quarantined(folder, names):
                shown = {name: entry[name] for name in ("file", "line", "reason")}
                file.write(json.dumps(shown) + "\n")
        os.replace(temporary, path)


def _quarantined(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    with (folder / store.QUARANTINE).open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            # The folder knows sources by number: the same content may lie elsewhere by now.
            yield {
                "file": names[entry["source"]],
                "line": entry["line"],
                "reason": entry["reason"],
                "broken": entry["broken"],
            }
