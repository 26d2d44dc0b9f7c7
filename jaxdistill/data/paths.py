"""Which files a path stands for: itself, those of a folder, or those that match a pattern."""

import filecmp
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from jaxdistill.data import buckets, digests
from jaxdistill.data.buckets import BucketFile
from jaxdistill.errors import DataError

File = Path | BucketFile

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
TABLE_ENDINGS = (".csv", ".tsv", ".parquet")
TEXT_ENDINGS = (".txt", ".text", ".md")
ENDINGS = JSON_ENDINGS + TABLE_ENDINGS + TEXT_ENDINGS
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Beside the data in many folders.
_NO_DATA = ("readme", "license", "licence", "dataset_infos")


def ending_of(path: File) -> str:
    """The ending of a file's name without that of its compression, in small letters."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings else ""


def find(path: str | Path) -> tuple[Sequence[File], tuple[str, ...]]:
    """(the files of a path, sorted; what the user should know about how they were found).

    Raises:
      DataError: if there is none, or one has an ending that cannot be read.
    """
    name = str(path)
    try:
        return _in_bucket(name) if buckets.is_url(name) else _found(Path(path), name)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def size_of(file: File) -> int | None:
    """Bytes of a file; None of an object in a bucket, of which nobody is told."""
    return file.stat().st_size if isinstance(file, Path) else None


def digest_of(file: File) -> str:
    """What tells the content of a file from any other: see `digests.of` and `BucketFile.digest`.

    Raises:
      OSError: if it cannot be read.
    """
    return digests.of(file) if isinstance(file, Path) else file.digest()


def same_content(left: File, right: File) -> bool:
    """Whether two are one file, or files here with the same bytes."""
    if not (isinstance(left, Path) and isinstance(right, Path)):
        return left == right
    return os.path.samefile(left, right) or (
        left.stat().st_size == right.stat().st_size and filecmp.cmp(left, right, shallow=False)
    )


def _found(path: Path, name: str) -> tuple[Sequence[File], tuple[str, ...]]:
    if path.is_dir():
        below = [
            one
            for one in sorted(path.rglob("*"))
            if one.is_file() and not any(p.startswith(".") for p in one.relative_to(path).parts)
        ]
        return _of_folder(below, name, (path / "config.json").is_file())
    if path.is_file():
        matched = [path]
    elif glob.has_magic(name):
        matched = sorted(Path(one) for one in glob.glob(name, recursive=True))
        matched = [one for one in matched if one.is_file()]
        if not matched:
            raise DataError(f"{name}: no file matches (relative paths start at {Path.cwd()})")
    else:
        raise DataError(f"{name}: no such file (relative paths start at {Path.cwd()})")
    _check(matched)
    return matched, ()


def _in_bucket(url: str) -> tuple[Sequence[File], tuple[str, ...]]:
    found, folder = buckets.find(url)
    if folder is None:
        _check(found)
        return found, ()
    inside = lambda one: str(one).removeprefix(folder)
    below = [one for one in found if not any(p.startswith(".") for p in inside(one).split("/"))]
    model = any(inside(one) == "config.json" for one in found)
    files, notes = _of_folder(below, url.rstrip("/"), model)
    _check(files)
    return files, notes


def _check(files: Sequence[File]) -> None:
    """Raises DataError for a file that cannot be read by its ending."""
    for one in files:
        if not _readable(one):
            raise DataError(
                f"{one}: files ending in {one.suffix!r} cannot be read: use {', '.join(ENDINGS)} "
                f"(compressed or not: {', '.join(COMPRESSED)})"
            )
        if isinstance(one, BucketFile) and ending_of(one) == ".parquet":
            raise DataError(
                f"{one}: Parquet is not read from a bucket, as a stream: copy it to a disk, or "
                "write .jsonl.zst files"
            )


def _readable(path: File) -> bool:
    ending = ending_of(path)
    return ending in ENDINGS and not (ending == ".parquet" and path.suffix.lower() != ending)


def _of_folder(
    below: Sequence[File], name: str, model: bool
) -> tuple[Sequence[File], tuple[str, ...]]:
    """All files of records below a folder, or all of text."""
    if model:
        raise DataError(f"{name}: is a folder of a model: name files of data")
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
    kept = set(known)
    left = [one.name for one in below if one not in kept]
    some = ", ".join(left[:5])
    return known, (f"{name}: {len(left)} files in it are not read: {some}",) if left else ()
