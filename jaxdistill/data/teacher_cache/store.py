"""A stored teacher that is whole: found by the text, checked against its manifest, read by rows."""

import functools
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.data.teacher_cache import catalog, formats, parts
from jaxdistill.data.teacher_cache.formats import Format
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.data.teacher_cache.segments import SegmentKey
from jaxdistill.errors import DamagedError

_OPEN_ARRAYS = 512


class Store:
    """What a teacher said about texts.

        store = Store("runs/cache")
        entry = store.find(key, mask)             # None where these positions are not stored
        arrays = store.reading(entry)()           # {"hidden": [rows, D]}

    Attributes:
      place: the folder or URL.
      format: of the stored signals.
      identity: whose answers they are; what differs is another store.
      notes: what is told of the capture and not compared.
      content: of the manifest.

    Args:
      place: as `objects.Objects` takes it.
      thorough: whether every shard is read and compared too.

    Raises:
      ConfigError: if there is no store, or its capture has not ended.
      DamagedError: if an object is missing, new or changed.
    """

    def __init__(self, place: str, *, thorough: bool = False):
        self.objects = Objects(place)
        self.place = self.objects.place
        self.content = catalog.read(self.objects)
        catalog.check(self.objects, self.content, thorough=thorough)
        self.identity: Mapping[str, Any] = self.content["identity"]
        self.notes: Mapping[str, Any] = self.content["notes"]
        self.format: Format = formats.of_facts(self.identity["format"])
        self._array = functools.lru_cache(maxsize=_OPEN_ARRAYS)(self.objects.array)

    @functools.cached_property
    def bytes(self) -> int:
        """Of all objects."""
        return sum(size for size, _ in self.content["objects"].values())

    @functools.cached_property
    def _index(self) -> "_Index":
        return _Index([parts.index(self.objects, name) for name in self.content["parts"]])

    def find(self, key: SegmentKey, mask: np.ndarray) -> int | None:
        """The entry that holds all positions of a mask, or None."""
        return self._index.find(key, mask)

    def has(self, key: SegmentKey) -> bool:
        """Whether any position of a segment is stored."""
        return self._index.find(key, None) is not None

    def mask(self, entry: int) -> np.ndarray:
        """bool [N], which positions of its segment an entry holds."""
        return self._index.mask(entry)

    def reading(self, entry: int) -> Any:
        """Begins to read an entry; () -> field -> [rows, ...], which waits.

        Raises:
          DamagedError: if a chunk is not as it was written.
        """
        part, start = self._index.places[entry]
        rows = int(self._index.rows[entry])
        prefix = f"{parts.FOLDER}{self.content['parts'][part]}/"
        here = slice(int(start), int(start) + rows)
        names = {field: prefix + field for field in self.format.fields()}
        futures = {field: self._array(name)[here].read() for field, name in names.items()}

        def wait() -> dict[str, np.ndarray]:
            arrays = {f: self.objects.read(names[f], futures[f]) for f in futures}
            for field, values in arrays.items():
                if self.format.unsound(field, values):
                    raise DamagedError(f"{self.place}: damaged: {names[field]} lacks numbers")
            return arrays

        return wait

    def __len__(self) -> int:
        """How many segments are stored."""
        return len(self._index.rows)

    def tokens(self, entry: int) -> np.ndarray:
        """int32 [N], the text of an entry's segment.

        Raises:
          DamagedError: if it is not as it was written.
        """
        part, start = self._index.texts[entry]
        name = f"{parts.FOLDER}{self.content['parts'][part]}/{parts.TOKENS}"
        here = slice(int(start), int(start) + len(self.mask(entry)))
        stored = self.objects.read(name, self._array(name)[here].read())
        return formats.unpack_ids(stored)

    def head(self) -> np.ndarray:
        """The teacher's head [V, D], of `hidden`.

        Raises:
          DamagedError: if it is not as it was written.
        """
        name = catalog.TEACHER + catalog.HEAD
        return self.objects.read(name, self.objects.array(name).read())

    @functools.cached_property
    def teacher(self) -> pathlib.Path:
        """A folder with the teacher's config.json and the tokenizer."""
        if self.objects.folder is not None:
            return self.objects.folder / catalog.TEACHER
        self._copy = tempfile.TemporaryDirectory(prefix="jaxdistill-teacher-")
        for name in self.content["objects"]:
            inner = name.removeprefix(catalog.TEACHER)
            if name.startswith(catalog.TEACHER) and "/" not in inner:
                (pathlib.Path(self._copy.name) / inner).write_bytes(self.objects.get(name) or b"")
        return pathlib.Path(self._copy.name)


class _Index:
    """Where every segment lies: sorted keys, and per entry its part, first row and mask.

    Attributes:
      places: int64 [E, 2], part and first row of each entry.
      texts: int64 [E, 2], part and first token of each.
      rows: int32 [E].
    """

    def __init__(self, indices: list[parts.PartIndex]):
        together = lambda arrays, empty: np.concatenate([empty, *arrays])
        self.rows = together([one.rows for one in indices], np.zeros(0, np.int32))
        self._lengths = together([one.lengths for one in indices], np.zeros(0, np.int32))
        self._masks = together([one.masks for one in indices], np.zeros(0, np.uint8))
        empty = np.zeros(0, np.int64)
        part = [np.full(len(one.rows), number) for number, one in enumerate(indices)]

        def begins(counts: list[np.ndarray]) -> np.ndarray:
            starts = [np.cumsum(one, dtype=np.int64) - one for one in counts]
            return np.stack([together(part, empty), together(starts, empty)], axis=1)

        self.places = begins([one.rows for one in indices])
        self.texts = begins([one.lengths for one in indices])
        size = -(-self._lengths // 8)
        self._mask_starts = np.cumsum(size, dtype=np.int64) - size
        keys = together([one.keys for one in indices], np.zeros((0, 16), np.uint8))
        pairs = np.ascontiguousarray(keys).view(">u8")
        self._order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        self._high, self._low = (pairs[self._order, side].astype(np.uint64) for side in (0, 1))

    def find(self, key: SegmentKey, mask: np.ndarray | None) -> int | None:
        high, low = (np.uint64(one) for one in np.frombuffer(key, ">u8"))
        first = int(np.searchsorted(self._high, high))
        while first < len(self._high) and self._high[first] == high:
            entry = int(self._order[first])
            if self._low[first] == low:
                if mask is None:
                    return entry
                if self._lengths[entry] == len(mask) and not (mask & ~self.mask(entry)).any():
                    return entry
            first += 1
        return None

    def mask(self, entry: int) -> np.ndarray:
        length, start = int(self._lengths[entry]), int(self._mask_starts[entry])
        bits = np.unpackbits(self._masks[start : start - (-length // 8)])
        return bits[:length].astype(bool)
