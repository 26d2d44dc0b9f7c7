"""Objects of buckets, gs:// and s3://, as files to be read: found by URL, known by generation."""

import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from jaxdistill.data import places
from jaxdistill.errors import DataError, UserError

_URL = re.compile(r"(gs|s3)://([^/]+)/?(.*)", re.DOTALL)
_PIECE = 4 << 20  # bytes of a request; the next one is under way while one is read
# While names are looked for nobody wants to wait; a long reading outlives a server's bad minutes.
_TRIES = 3
_RIGHTS = {
    "gs": "run `gcloud auth application-default login`, or name a key file in "
    "$GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "set $AWS_PROFILE, or $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY",
}


@dataclass(frozen=True)
class BucketFile:
    """An object as it was when it was found: what is written there later is not read.

    Attributes:
      scheme: gs or s3.
      bucket: its name.
      key: of the object in it.
      generation: the store's mark of this content: Google's generation, or an ETag.
    """

    scheme: str
    bucket: str
    key: str
    generation: bytes

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of its key."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The last ending of its name."""
        return PurePosixPath(self.key).suffix

    @property
    def suffixes(self) -> list[str]:
        """All endings of its name."""
        return PurePosixPath(self.key).suffixes

    def digest(self) -> str:
        """A hash of where it is and of its generation: nothing is read."""
        facts = [str(self), self.generation.decode("latin-1"), _server(self.scheme)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def open(self, mode: str) -> io.BufferedReader:
        """Its bytes as a stream. What reading it raises is a DataError."""
        assert mode == "rb", "objects are only read"
        return io.BufferedReader(_ObjectReader(self), 1 << 16)


def is_url(path: str) -> bool:
    """Whether a path names a bucket, or what lies in one."""
    return path.startswith(("gs://", "s3://"))


def find(url: str) -> tuple[list[BucketFile], str | None]:
    """(what a URL stands for, by name; the URL of the folder that it names, or None).

    Raises:
      DataError: if nothing is there, or it cannot be read.
    """
    scheme, bucket, key = _parts(url)
    key, folder = key.rstrip("/"), not key or key.endswith("/")
    here = functools.partial(BucketFile, scheme, bucket)
    if key and not folder and (found := _generations(url, scheme, bucket, [key])):
        return [here(*found[0])], None
    if glob.has_magic(key):
        matches = _pattern(key)
        start = _plain_start(key)
        keys = [one for one in _listed(url, scheme, bucket, start) if matches(one)]
        if not keys:
            raise DataError(f"{url}: no object matches{_perhaps(scheme)}")
        return [here(*one) for one in _generations(url, scheme, bucket, keys)], None
    start = f"{key}/" if key else ""
    keys = [one for one in _listed(url, scheme, bucket, start) if not one.endswith("/")]
    if not keys:
        raise DataError(f"{url}: no such object, and none below it{_perhaps(scheme)}")
    files = [here(*one) for one in _generations(url, scheme, bucket, keys)]
    return files, f"{scheme}://{bucket}/{start}"


def _parts(url: str) -> tuple[str, str, str]:
    match = _URL.fullmatch(url)
    if match is None:
        raise DataError(f"{url}: names no bucket: write gs://BUCKET/NAME or s3://BUCKET/NAME")
    scheme, bucket, key = match.groups()
    if glob.has_magic(bucket):
        raise DataError(f"{url}: patterns are for names within a bucket: name the bucket")
    return scheme, bucket, key


def _perhaps(scheme: str) -> str:
    """What else may be the reason that a list is empty: Google's answer does not say."""
    return ", or there is no such bucket" if scheme == "gs" else ""


def _pattern(key: str) -> Any:
    """Whether a key matches, by parts as `glob` has it: `*` and `?` begin no name with a dot."""
    *folders, last = key.split("/")
    written = [r"(?:(?!\.)[^/]+/)*" if part == "**" else f"{_part(part)}/" for part in folders]
    deep = r"(?:(?!\.)[^/]+/)*(?!\.)[^/]+"
    written.append(deep if last == "**" else _part(last))
    return re.compile("".join(written), re.DOTALL).fullmatch


def _part(pattern: str) -> str:
    """A regular expression for one part of a key."""
    written = "" if pattern.startswith(".") else r"(?!\.)"
    for piece in re.findall(r"\[!?\]?[^]]*\]|.", pattern, re.DOTALL):
        if len(piece) > 1:
            inside = re.sub(r"([\\[&~|^])", r"\\\1", piece[1:-1])
            inside = f"^{inside[1:]}" if inside.startswith("!") else inside
            written += f"(?!/)[{inside}]"
        else:
            written += {"*": "[^/]*", "?": "[^/]"}.get(piece, re.escape(piece))
    return written


def _plain_start(key: str) -> str:
    """What every key that matches begins with."""
    parts = key.split("/")
    plain = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return "/".join([*parts[:plain], re.split(r"[*?\[]", parts[plain])[0]])


def _listed(url: str, scheme: str, bucket: str, start: str) -> list[str]:
    """The keys that begin so, by name."""
    import tensorstore

    store = _store(scheme, bucket, _TRIES)
    last = start[:-1] + chr(ord(start[-1]) + 1) if start else ""
    with _reading(url, scheme, bucket):
        keys = store.list(tensorstore.KvStore.KeyRange(start, last)).result()
        if not keys and scheme == "gs":
            # Of a list that is refused TensorStore makes an empty one: an object's state tells.
            store.read(start or "a", byte_range=slice(0, 0)).result()
    return sorted(key.decode() for key in keys)


def _generations(
    url: str, scheme: str, bucket: str, keys: Sequence[str]
) -> list[tuple[str, bytes]]:
    """(key, generation) of those that are there."""
    store = _store(scheme, bucket, _TRIES)
    with _reading(url, scheme, bucket):
        asked = [(key, store.read(key, byte_range=slice(0, 0))) for key in keys]
        states = [(key, one.result()) for key, one in asked]
    return [(key, one.stamp.generation) for key, one in states if one.state != "missing"]


class _ObjectReader(io.RawIOBase):
    """The bytes of an object, piece by piece.

    Raises:
      DataError: if it is another one by now, or cannot be read.
    """

    mode = "rb"

    def __init__(self, file: BucketFile):
        self.name = str(file)
        self._file, self._at, self._held = file, 0, memoryview(b"")
        self._store = _store(file.scheme, file.bucket, None)
        self._ahead = self._asked()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._held and self._ahead is not None:
            self._held = memoryview(self._next())
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def _asked(self) -> Any:
        piece = slice(self._at, self._at + _PIECE)
        return self._store.read(self._file.key, byte_range=piece)

    def _next(self) -> bytes:
        """The next piece; the one behind it is asked for."""
        ended, key = False, self._file.key
        with _reading(str(self._file), self._file.scheme, self._file.bucket):
            found = _unless_behind(self._ahead)
            if found is None:  # fewer bytes are left than were asked for, or none
                rest = slice(self._at, None) if self._at else None
                found, ended = _unless_behind(self._store.read(key, byte_range=rest)), True
            if found is None:  # none, if it is still the same
                found = self._store.read(key, byte_range=slice(0, 0)).result()
        if found.state == "missing" or found.stamp.generation != self._file.generation:
            what = "was removed" if found.state == "missing" else "changed"
            raise DataError(
                f"{self._file}: {what} while it was read: run the command again when nobody writes "
                "there: what is tokenised of other files is kept"
            )
        self._at += len(found.value)
        self._ahead = None if ended else self._asked()
        return found.value


def _unless_behind(future: Any) -> Any:
    """What was read, or None where it lies behind the end."""
    try:
        return future.result()
    except places.ERRORS as error:
        if str(error).startswith("OUT_OF_RANGE"):
            return None
        raise


@contextlib.contextmanager
def _reading(url: str, scheme: str, bucket: str) -> Iterator[None]:
    """Makes of a failure one that names the URL and the remedy."""
    try:
        yield
    except UserError:
        raise
    except places.ERRORS as error:
        said = places.first_line(error).partition(" [http")[0]
        kind = said.partition(":")[0]
        if kind == "PERMISSION_DENIED":
            why = f"no right to read it: {_RIGHTS[scheme]}"
        elif kind == "NOT_FOUND" and "etag" in said:
            why = "its server gives no ETag, by which a change is seen: copy it to a disk"
        elif kind == "NOT_FOUND":
            why = f"there is no bucket {bucket!r}"
        else:
            why = f"cannot be read: {said}: look at the network, and {_RIGHTS[scheme]}"
        raise DataError(f"{url}: {why}") from error


def _server(scheme: str) -> str:
    """The address of a server of one's own; nothing where it is Google's or Amazon's."""
    return os.environ.get({"gs": "TENSORSTORE_GCS_HTTP_URL", "s3": "AWS_ENDPOINT_URL"}[scheme], "")


def _store(scheme: str, bucket: str, tries: int | None) -> Any:
    """The objects of a bucket."""
    return _opened(scheme, bucket, tries, _server(scheme))


@functools.lru_cache(16)
def _opened(scheme: str, bucket: str, tries: int | None, server: str) -> Any:
    import tensorstore

    retries = {} if tries is None else {"max_retries": tries, "initial_delay": "500ms"}
    driver = {"gs": "gcs", "s3": "s3"}[scheme]
    context = tensorstore.Context({f"{driver}_request_retries": retries})
    url = f"{scheme}://{bucket}"
    with _reading(url, scheme, bucket):
        spec = places.spec(tensorstore, url)
        return tensorstore.KvStore.open(spec, context=context).result()
