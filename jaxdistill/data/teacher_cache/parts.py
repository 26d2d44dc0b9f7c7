"""Parts of a stored teacher: segments, their arrays, and a note that says the part is whole."""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.data.teacher_cache.formats import Format, pack_ids
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.data.teacher_cache.segments import KEY_BYTES, SegmentKey
from jaxdistill.errors import DamagedError
from jaxdistill.safe import json_file

FOLDER = "parts/"
NOTE = "part.json"
BYTES = 1 << 26  # of an array, at most about: it is one object
TOKENS = "tokens"
_SEGMENTS, _MASKS = "segments.npy", "masks.npy"
_ROW = np.dtype([("key", "u1", KEY_BYTES), ("length", "<i4"), ("rows", "<i4")])


class Wanted(NamedTuple):
    """A segment to store.

    Attributes:
      key: of its tokens.
      mask: bool [N], the positions to store.
      tokens: int32 [N]; they are stored too, so that anybody can ask again.
    """

    key: SegmentKey
    mask: np.ndarray
    tokens: np.ndarray


def name_of(segments: Iterable[Wanted]) -> str:
    """The name of a part: it follows from what is in it."""
    digest = hashlib.blake2b(digest_size=12)
    for one in segments:
        digest.update(one.key + np.packbits(one.mask).tobytes())
    return digest.hexdigest()


def whole(objects: Objects) -> set[str]:
    """Names of the parts that are whole."""
    return {
        name[len(FOLDER) :].partition("/")[0]
        for name in objects.names()
        if name.startswith(FOLDER) and name.endswith("/" + NOTE)
    }


def write(
    objects: Objects, form: Format, segments: Sequence[Wanted], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Writes a part; its note comes last, and until then it is none.

    Args:
      objects: where.
      form: what is stored.
      segments: at least one, each with a position that counts.
      arrays: per field [rows, ...]: the counted positions of all segments, in order.

    Returns:
      The note: segments, rows and, per object, [bytes, SHA-256].

    Raises:
      StorageError: if it cannot be written.
    """
    prefix = f"{FOLDER}{name_of(segments)}/"
    objects.drop(prefix)  # of a capture that was killed
    table = np.zeros(len(segments), _ROW)
    for row, one in zip(table, segments, strict=True):
        row["key"] = np.frombuffer(one.key, np.uint8)
        row["length"], row["rows"] = len(one.mask), int(one.mask.sum())
    masks = np.concatenate([np.packbits(one.mask) for one in segments])
    for name, values in ((_SEGMENTS, table), (_MASKS, masks)):
        objects.put(prefix + name, _npy(values))
    assert all(len(values) == table["rows"].sum() for values in arrays.values())
    text = np.concatenate([one.tokens for one in segments])
    together = {TOKENS: pack_ids(text, form.id_bytes), **arrays}
    written = [_SEGMENTS, _MASKS]
    for field, values in together.items():
        objects.put_array(prefix + field, values)
        shard = "/".join(["c"] + ["0"] * values.ndim)
        written += [f"{field}/zarr.json", f"{field}/{shard}"]
    note = {
        "segments": len(segments),
        "rows": int(table["rows"].sum()),
        "objects": {name: objects.digest(prefix + name) for name in sorted(written)},
    }
    objects.put(prefix + NOTE, json.dumps(note, sort_keys=True).encode())
    return note


def note(objects: Objects, name: str) -> dict[str, Any]:
    """The note of a whole part.

    Raises:
      DamagedError: if it is none.
    """
    path = f"{FOLDER}{name}/{NOTE}"
    content = objects.get(path)
    try:
        parsed = json_file.parse(content or b"")
        json_file.check(parsed, {"segments": int, "rows": int, "objects": dict})
    except ValueError as error:
        raise DamagedError(f"{objects.place}: damaged: {path} is no note of a part") from error
    return parsed


class PartIndex(NamedTuple):
    """The segments of a part.

    Attributes:
      keys: uint8 [S, 16].
      lengths: int32 [S], tokens of each.
      rows: int32 [S], stored positions of each.
      masks: uint8, packed bits of which positions are stored, one segment after the other.
    """

    keys: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    masks: np.ndarray


def index(objects: Objects, name: str) -> PartIndex:
    """The index of a part, whose objects have been compared with the manifest.

    Raises:
      DamagedError: if it cannot be read.
    """
    table = _from_npy(objects, f"{FOLDER}{name}/{_SEGMENTS}")
    masks = _from_npy(objects, f"{FOLDER}{name}/{_MASKS}")
    if table.dtype != _ROW or masks.dtype != np.uint8:
        raise DamagedError(f"{objects.place}: damaged: part {name} has no index of ours")
    return PartIndex(table["key"], table["length"], table["rows"], masks)


def is_array_chunk(name: str) -> bool:
    """Whether an object is a shard, whose chunks carry checksums of their own."""
    return "/c/" in name


def rows_per_part(form: Format) -> int:
    """Positions whose largest array has about `BYTES`."""
    sizes = (dtype.itemsize * int(np.prod(shape)) for dtype, shape in form.fields().values())
    return max(1, BYTES // max(sizes))


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, allow_pickle=False)
    return file.getvalue()


def _from_npy(objects: Objects, name: str) -> np.ndarray:
    content = objects.get(name)
    try:
        return np.lib.format.read_array(io.BytesIO(content or b""), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DamagedError(f"{objects.place}: damaged: {name} is no array") from error
