"""Columns of tables that are records, and data sets of the library `datasets`."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from jaxdistill.data import meaning
from jaxdistill.data.records import KINDS, LOST, READ, NumberedObjects, Rejected, kinds_of
from jaxdistill.errors import DataError

_BATCH = 1024
_OPTIONS = ("split", "config", "revision")


def columns(names: Iterable[str], format: str, where: str, unread: set[str]) -> list[str]:
    """The columns that are read.

    Raises:
      DataError: if those of the kind are missing.
    """
    names = list(names)
    kinds = [format] if format != "auto" else kinds_of(dict.fromkeys(names))
    if not kinds or not all(field in names for field in KINDS[kinds[0]]):
        shown = ", ".join(names[:8])
        need = format if format != "auto" else "text, messages, or prompt and completion"
        raise DataError(f"{where}: has no columns for {need}: found {shown}")
    wanted = frozenset().union(*(READ[kind] | LOST.get(kind, {}).keys() for kind in kinds))
    # What may have to be refused is read too: only its values show whether it must.
    chosen = [name for name in names if name in wanted or meaning.may_matter(name)]
    unread.update(name for name in names if name not in chosen)
    return chosen


def _numbered(batches: Iterable[Any]) -> NumberedObjects:
    from jaxdistill.data import parquet  # NumPy, which `validate` does without

    number = 0
    for batch in batches:
        for row in parquet.rows(batch):
            number += 1
            bad = isinstance(row, str)
            yield Rejected(number, row) if bad else (number, parquet.without_nulls(row))


class HubDataset:
    """A data set that the library `datasets` reads: `hf:NAME?split=train&config=C&revision=R`.

    NAME is a folder (of files, or of `save_to_disk`), or a name on the Hub.

    Raises:
      DataError: if the name or an option is unknown, or the network is needed and not allowed.
    """

    def __init__(self, name: str, allow_network: bool):
        self.name = name
        self._path, _, query = name.removeprefix("hf:").partition("?")
        self._options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = [option for option in self._options if option not in _OPTIONS]
        if not self._path or unknown:
            raise DataError(f"{name}: write it as hf:NAME?split=train&config=C&revision=R")
        if not Path(self._path).exists() and not allow_network:
            raise DataError(
                f"{name}: no such folder; if it is a name to download, set "
                "security.allow_network: true"
            )

    @functools.cached_property
    def _dataset(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{self.name}: needs the library datasets: pip install 'jaxdistill[hf]'"
            ) from None
        split = self._options.get("split", "train")
        try:
            if (Path(self._path) / "state.json").is_file():
                return datasets.load_from_disk(self._path)
            if (Path(self._path) / "dataset_dict.json").is_file():
                return datasets.load_from_disk(self._path)[split]
            return datasets.load_dataset(
                self._path,
                self._options.get("config"),
                split=split,
                revision=self._options.get("revision"),
            )
        # The library raises what its readers raise, of many kinds.
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            raise DataError(f"{self.name}: cannot be read as a data set: {reason}") from error

    def objects(self, format: str, unread: set[str]) -> NumberedObjects:
        """Its rows, numbered from 1.

        Raises:
          DataError: as `columns`.
        """
        wanted = columns(self._dataset.column_names, format, self.name, unread)
        chosen = self._dataset.select_columns(wanted).with_format("arrow")
        yield from _numbered(chosen.iter(_BATCH))

    def digest(self) -> str:
        """A hash of its content, whatever its path and times."""
        hasher = hashlib.sha256()
        for batch in self._dataset.with_format("arrow").iter(_BATCH):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                hasher.update(repr((name, column.to_pylist())).encode("utf-8", "surrogatepass"))
        return hasher.hexdigest()
