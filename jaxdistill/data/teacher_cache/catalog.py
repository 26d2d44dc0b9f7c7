"""The manifest of a stored teacher: what it is of, every object with its digest, and the checks."""

import concurrent.futures
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdistill.data.teacher_cache import parts
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.errors import ConfigError, DamagedError, MismatchError
from jaxdistill.safe import json_file

MANIFEST = "manifest.json"
IDENTITY = "identity.json"  # written first: whose answers the parts are
TEACHER = "teacher/"
HEAD = "head"
_READERS = 8
PENDING = "pending/"  # single answers of a server, whose part is not whole yet


def begin(objects: Objects, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Makes a new store, or refuses one of another teacher, tokenizer, template or format.

    Raises:
      MismatchError: naming every field that differs.
      ConfigError: if something else is there.
    """
    check_place(objects)
    if objects.get(IDENTITY) is None:
        content = {"identity": identity, "notes": notes}
        objects.put(IDENTITY, json.dumps(content, sort_keys=True, indent=1).encode())
        return
    known = read_identity(objects)["identity"]
    differing(objects.place, known, identity)


@contextlib.contextmanager
def alone(objects: Objects, share: tuple[int, int]) -> Iterator[None]:
    """Within, no other process captures the same share: each would remove the other's parts.

    Args:
      objects: where.
      share: (which, of how many).

    Raises:
      ConfigError: naming the process that does; or if something else is there.
      StorageError: if the folder cannot be written.
    """
    check_place(objects)
    number, count = share
    with objects.alone(f"{number}-of-{count}"):
        yield


def check_place(objects: Objects) -> None:
    """Refuses a place with something else in it.

    Raises:
      ConfigError: if it is neither empty nor a store.
    """
    if objects.get(IDENTITY) is None and objects.names():
        raise ConfigError(f"{objects.place}: is not empty and holds no teacher's answers")


def read_identity(objects: Objects) -> dict[str, Any]:
    """The identity, and the notes, of a store that was begun.

    Raises:
      ConfigError: if there is none.
      DamagedError: if it cannot be read.
    """
    content = objects.get(IDENTITY)
    if content is None:
        raise ConfigError(
            f"teacher.cache = {objects.place}: holds no teacher's answers: "
            "`jaxdistill teacher cache CONFIG -o DIR` asks for them"
        )
    try:
        parsed = json_file.parse(content)
        json_file.check(parsed, {"identity": dict, "notes": dict})
    except ValueError as error:
        raise DamagedError(f"{objects.place}: damaged: {IDENTITY} is no identity") from error
    return parsed


def differing(place: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Compares fields; those that `given` lacks do not count.

    Raises:
      MismatchError: naming every field that differs, with both values.
    """
    told = [
        f"{name}: {short(known.get(name))} there, {short(value)} here"
        for name, value in given.items()
        if known.get(name) != json.loads(json.dumps(value))
    ]
    if told:
        raise MismatchError(
            f"{place}: holds the answers of another teacher or to other text ({'; '.join(told)}): "
            "give the folder that was captured with these, or capture into another one"
        )


def short(value: Any) -> str:
    """A value for people: of a digest the beginning."""
    return value[:8] if isinstance(value, str) and len(value) == 64 else repr(value)


def describe(place: str) -> dict[str, Any]:
    """What is stored at a place: identity, notes, and how much, as a dict for JSON.

    Raises:
      ConfigError: if there is nothing.
      DamagedError: if it cannot be read.
    """
    objects = Objects(place)
    facts = {"place": objects.place, **read_identity(objects)}
    if objects.get(MANIFEST) is None:
        return facts | {"whole": False, "parts": len(parts.whole(objects))}
    content = read(objects)
    return facts | {
        "whole": True,
        "parts": len(content["parts"]),
        "segments": content["segments"],
        "positions": content["rows"],
        "bytes": sum(size for size, _ in content["objects"].values()),
    }


def seal(objects: Objects) -> dict[str, Any]:
    """Writes the manifest over all whole parts, and removes what is half-written.

    Returns:
      The content of the manifest.
    """
    names = sorted(parts.whole(objects))
    listed: dict[str, Any] = {}
    segments = rows = 0
    for name in names:
        note = parts.note(objects, name)
        segments, rows = segments + note["segments"], rows + note["rows"]
        prefix = f"{parts.FOLDER}{name}/"
        listed |= {prefix + own: told for own, told in note["objects"].items()}
        listed[prefix + parts.NOTE] = objects.digest(prefix + parts.NOTE)
    found = objects.names()
    beside = [n for n in found if n.startswith(TEACHER) or n == IDENTITY]
    listed |= dict(zip(beside, _digests(objects, beside), strict=True))
    for stray in sorted({_part(n) for n in found if n.startswith(parts.FOLDER)} - set(names)):
        objects.drop(f"{parts.FOLDER}{stray}/")
    content = {
        **read_identity(objects),
        "parts": names,
        "segments": segments,
        "rows": rows,
        "objects": listed,
    }
    sealed = {"sha256": _digest(content), "content": content}
    objects.put(MANIFEST, json.dumps(sealed, sort_keys=True, indent=1).encode())
    return content


def _part(name: str) -> str:
    return name[len(parts.FOLDER) :].partition("/")[0]


def read(objects: Objects) -> dict[str, Any]:
    """The content of the manifest.

    Raises:
      ConfigError: if there is no store, or its capture has not ended.
      DamagedError: if the manifest is not as it was written.
    """
    stored = objects.get(MANIFEST)
    if stored is None:
        read_identity(objects)
        raise ConfigError(
            f"teacher.cache = {objects.place}: its capture has not ended: run `jaxdistill teacher "
            "cache` again, it goes on where it was"
        )
    try:
        sealed = json_file.parse(stored)
        json_file.check(sealed, {"content": dict, "sha256": str})
        content = sealed["content"]
        intact = sealed["sha256"] == _digest(content)
    except ValueError as error:
        raise DamagedError(f"{objects.place}: damaged: {MANIFEST} is no manifest") from error
    if not intact:
        raise DamagedError(f"{objects.place}: damaged: {MANIFEST} has another digest")
    return content


def check(objects: Objects, content: Mapping[str, Any], *, thorough: bool = False) -> None:
    """Compares the objects that are there with the manifest.

    All names; sizes where they can be told; digests of all that has no checksum of its own, which
    are the small objects. `thorough` reads the shards too.

    Raises:
      DamagedError: naming the first object that is missing, new or changed.
    """
    listed = content["objects"]
    names = {n for n in objects.names() if n != MANIFEST and not n.startswith(PENDING)}
    # What a later capture has not sealed yet is no damage.
    sealed = set(content["parts"])
    names = {n for n in names if not n.startswith(parts.FOLDER) or _part(n) in sealed}
    for name in sorted(listed.keys() ^ names):
        state = "missing" if name in listed else "new"
        raise DamagedError(f"{objects.place}: damaged: {name} is {state} since it was captured")
    for name, (size, _) in listed.items():
        now = objects.size(name)
        if now is not None and now != size:
            told = f"{name} has {now} bytes, not {size}"
            raise DamagedError(f"{objects.place}: damaged: {told}")
    compared = [name for name in listed if thorough or not parts.is_array_chunk(name)]
    for name, now in zip(compared, _digests(objects, compared), strict=True):
        if now != listed[name]:
            raise DamagedError(
                f"{objects.place}: damaged: {name} is changed since it was captured: remove "
                "its part's folder and capture again"
            )


def _digests(objects: Objects, names: Sequence[str]) -> Iterator[list[Any]]:
    """The digest of each object, several read at a time: a bucket answers slowly, and many."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(objects.digest, names)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
