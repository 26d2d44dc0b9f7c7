"""Which files a path stands for: itself, those of a folder, or those that match a pattern."""

import glob
from pathlib import Path

from jaxdistill.errors import DataError

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
TABLE_ENDINGS = (".csv", ".tsv", ".parquet")
TEXT_ENDINGS = (".txt", ".text", ".md")
ENDINGS = JSON_ENDINGS + TABLE_ENDINGS + TEXT_ENDINGS
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Beside the data in many folders.
_NO_DATA = ("readme", "license", "licence", "dataset_infos")


def ending_of(path: Path) -> str:
    """The ending of a file's name without that of its compression, in small letters."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings else ""


def find(path: str | Path) -> tuple[list[Path], tuple[str, ...]]:
    """(the files of a path, sorted; what the user should know about how they were found).

    Raises:
      DataError: if there is none, or one has an ending that cannot be read.
    """
    name = str(path)
    try:
        return _found(Path(path), name)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _found(path: Path, name: str) -> tuple[list[Path], tuple[str, ...]]:
    if path.is_dir():
        return _below(path, name)
    if path.is_file():
        matched = [path]
    elif glob.has_magic(name):
        matched = sorted(Path(one) for one in glob.glob(name, recursive=True))
        matched = [one for one in matched if one.is_file()]
        if not matched:
            raise DataError(f"{name}: no file matches (relative paths start at {Path.cwd()})")
    else:
        raise DataError(f"{name}: no such file (relative paths start at {Path.cwd()})")
    for one in matched:
        if not _readable(one):
            raise DataError(
                f"{one}: files ending in {one.suffix!r} cannot be read: use {', '.join(ENDINGS)} "
                f"(compressed or not: {', '.join(COMPRESSED)})"
            )
    return matched, ()


def _readable(path: Path) -> bool:
    ending = ending_of(path)
    return ending in ENDINGS and not (ending == ".parquet" and path.suffix.lower() != ending)


def _below(path: Path, name: str) -> tuple[list[Path], tuple[str, ...]]:
    """All files of records below a folder, or all of text."""
    if (path / "config.json").is_file():
        raise DataError(f"{name}: is a folder of a model: name files of data")
    below = [
        one
        for one in sorted(path.rglob("*"))
        if one.is_file() and not any(p.startswith(".") for p in one.relative_to(path).parts)
    ]
    data = [one for one in below if not one.name.lower().startswith(_NO_DATA)]
    known = [one for one in data if _readable(one)]
    if not known:
        raise DataError(
            f"{name}: is a folder without files that can be read: their names must end in "
            f"{', '.join(ENDINGS)}"
        )
    texts = [one for one in known if ending_of(one) in TEXT_ENDINGS]
    if texts and len(texts) < len(known):
        records = next(one for one in known if one not in texts)
        raise DataError(
            f"{name}: is a folder with files of text ({texts[0].name}) and of records "
            f"({records.name}): name the ones to read, such as {name}/*{ending_of(records)}"
        )
    left = [one.name for one in below if one not in known]
    some = ", ".join(left[:5])
    return known, (f"{name}: {len(left)} files in it are not read: {some}",) if left else ()
