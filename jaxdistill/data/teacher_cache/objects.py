"""Objects by name in a folder or behind gs:// or s3://, through TensorStore; arrays among them."""

import contextlib
import functools
import hashlib
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxdistill.data import places
from jaxdistill.errors import DamagedError, StorageError
from jaxdistill.safe import lock

ARRAY_FILE = "zarr.json"
_LOCKS = "locks/"  # of processes that write; no objects
_CACHE_BYTES = 1 << 28  # of decoded chunks, shared by all arrays of a process
_CHUNK_BYTES = 1 << 18  # what is read for a text at least


class Objects:
    """A folder, or a prefix of a bucket: whole objects by name.

        Objects("runs/cache")      Objects("gs://bucket/cache")      Objects("s3://bucket/cache")

    A write is whole or not there. An S3 server of one's own is named by $AWS_ENDPOINT_URL, one that
    speaks Google's protocol by $TENSORSTORE_GCS_HTTP_URL.

    Args:
      place: a folder, which need not exist, or a URL.

    Raises:
      ConfigError: for a URL of another scheme.
    """

    def __init__(self, place: str):
        import tensorstore

        self.place = re.sub(r"(?<=[^/:])/+$", "", str(place))
        self._ts: Any = tensorstore
        self._spec = places.spec(tensorstore, self.place)
        with self._reading(""):
            self._kv = tensorstore.KvStore.open(self._spec, context=_context()).result()

    @property
    def folder(self) -> pathlib.Path | None:
        """The folder on this machine, or None."""
        return pathlib.Path(self._spec["path"]) if self._spec["driver"] == "file" else None

    def names(self) -> list[str]:
        """All objects, in the order of names."""
        with self._reading(""):
            names = sorted(name.decode() for name in self._kv.list().result())
        return [name for name in names if not name.startswith(_LOCKS)]

    @contextlib.contextmanager
    def alone(self, work: str) -> Iterator[None]:
        """Within, no other process does the same work here; behind a URL nobody can tell.

        Args:
          work: a name of it.

        Raises:
          ConfigError: naming the process that does it.
          StorageError: if the folder cannot be written.
        """
        if self.folder is None:
            yield
            return
        place = self.folder / _LOCKS / work
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise lock.cannot_write(place, error) from error
        with lock.held(place):
            try:
                yield
            finally:
                shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # another's lock is in it
            place.parent.rmdir()

    def get(self, name: str) -> bytes | None:
        """The bytes of an object, or None where there is none.

        Raises:
          DamagedError: if it cannot be read.
        """
        with self._reading(name):
            answer = self._kv.read(name).result()
        return None if answer.state == "missing" else bytes(answer.value)

    def put(self, name: str, content: bytes) -> None:
        """Writes an object.

        Raises:
          StorageError: if it cannot be written.
        """
        with self._writing(name):
            self._kv.write(name, content).result()

    def drop(self, prefix: str) -> None:
        """Removes every object whose name begins so."""
        assert prefix, "a whole store is never removed"
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        with self._writing(prefix):
            self._kv.delete_range(self._ts.KvStore.KeyRange(prefix, end)).result()

    def digest(self, name: str) -> list[Any]:
        """[bytes, SHA-256] of an object, read back.

        Raises:
          DamagedError: if it is not there.
        """
        content = self.get(name)
        if content is None:
            raise DamagedError(f"{self.place}: damaged: {name} is missing")
        return [len(content), hashlib.sha256(content).hexdigest()]

    def size(self, name: str) -> int | None:
        """Bytes of an object where that can be told without reading it, else None."""
        if self.folder is None:
            return None
        try:
            return (self.folder / name).stat().st_size
        except OSError:
            return None

    def put_array(self, name: str, values: np.ndarray) -> None:
        """Writes an array once: zarr v3, one shard of chunks of rows, zstd, a CRC-32C of each.

        Raises:
          StorageError: if it cannot be written.
        """
        assert len(values), "TensorStore has no chunks without rows"
        spec = {
            **self._array(name),
            "metadata": _metadata(values),
            "create": True,
            "delete_existing": True,
            # Else a chunk of zeros is no object, and a lost one reads as zeros.
            "store_data_equal_to_fill_value": True,
        }
        with self._writing(name):
            array = self._ts.open(spec, context=_context()).result()
            with self._ts.Transaction() as transaction:  # the shard is one object, written once
                array.with_transaction(transaction).write(values).result()

    def array(self, name: str) -> Any:
        """The `tensorstore.TensorStore` of an array, to read slices of.

        Raises:
          DamagedError: if it cannot be opened.
        """
        with self._reading(name):
            return self._ts.open({**self._array(name), "open": True}, context=_context()).result()

    def read(self, name: str, future: Any) -> np.ndarray:
        """What reading a slice gave.

        Raises:
          DamagedError: if the chunk is not as it was written.
        """
        with self._reading(name):
            return np.asarray(future.result())

    def _array(self, name: str) -> dict[str, Any]:
        kvstore = {**self._spec, "path": f"{self._spec.get('path', '')}{name}/"}
        return {"driver": "zarr3", "kvstore": kvstore}

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except places.ERRORS as error:
            why = places.first_line(error)
            raise DamagedError(f"{self.place}: {name} cannot be read: {why}") from error

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except places.ERRORS as error:
            why = places.first_line(error)
            raise StorageError(
                f"{self.place}: {name} cannot be written: {why}: free space there and run the "
                "command again: what is there is kept"
            ) from error


@functools.cache
def _context() -> Any:
    """What all arrays of this process share: chunks that were read, and connections."""
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


def _metadata(values: np.ndarray) -> Mapping[str, Any]:
    """The zarr metadata of an array of rows."""
    rows, *rest = values.shape
    row_bytes = max(1, values.nbytes // rows)
    inner = max(1, min(rows, _CHUNK_BYTES // row_bytes))
    whole = -(-rows // inner) * inner
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    chunk = [little, {"name": "zstd", "configuration": {"level": 1}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [inner, *rest],
        "codecs": chunk,
        "index_codecs": [little, {"name": "crc32c"}],
    }
    # A shard that is lost while it is read gives what no stored number is: NaN, an id that is no
    # token, counts that add up to too much. Of int8 the scale beside it tells.
    fill: Any = "NaN"
    if values.dtype.kind in "ui":
        fill = int(np.iinfo(values.dtype).max)
    return {
        "shape": list(values.shape),
        "data_type": values.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [whole, *rest]}},
        "fill_value": fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
