"""Safetensors files of a folder: which tensor lies where, read by slices, written in parts."""

import contextlib
import json
import os
import pathlib
import struct
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdistill.errors import ModelError
from jaxdistill.model_folder import check_folder, read_json

MAX_HEADER_BYTES = 32_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


ROUNDED: Mapping[str, np.dtype] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


class Entry(NamedTuple):
    """Where one tensor lies."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    name: str  # in the file


class Folder:
    """Tensors of a model folder; nothing is read before `read`, and only the slice asked for.

    Rounded numbers are no weights, unless the caller knows that the folder is quantised. With a
    `root`, names of a folder where none begins with it get it: GPT-2's was saved without its head.
    With `inside`, only the tensors whose names begin with one of its keys are there, under names
    that begin with its value instead: the text model of a larger one.
    """

    threads = True  # may read at once: a reading names its place, and changes nothing

    def __init__(
        self,
        folder: pathlib.Path,
        rounded: bool = False,
        root: str = "",
        inside: Mapping[str, str] = types.MappingProxyType({}),
    ):
        self.folder = folder
        self._dtypes = {**DTYPES, **(ROUNDED if rounded else {})}
        self.entries: dict[str, Entry] = {}
        self._files = contextlib.ExitStack()
        self._open: dict[str, Any] = {}
        self._mapped: dict[str, np.ndarray] = {}
        self._numbers: dict[str, int] = {}
        self._places: dict[str, Mapping[str, tuple[int, int]]] = {}
        self._index()
        if inside:
            self.entries = {
                ours + name.removeprefix(theirs): entry
                for name, entry in self.entries.items()
                for theirs, ours in inside.items()
                if name.startswith(theirs)
            }
        if root and not any(name.startswith(root) for name in self.entries):
            self.entries = {root + name: entry for name, entry in self.entries.items()}

    @property
    def files(self) -> list[pathlib.Path]:
        """What is read: columns of a row alone too, from pages that the system keeps."""
        return [self.folder / file for file in self._mapped]

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *error) -> None:
        self._open.clear()
        self._mapped.clear()
        self._files.close()

    def read(
        self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None
    ) -> np.ndarray:
        """The slice `index` of tensor `name`.

        One that lies together is read alone, into `memory` where there is enough of it. Of another
        it is a view of the file, whose pages are read where they are used, many around each: its
        gaps are what other devices need.

        Raises:
          ModelError: where the file ends before it.
        """
        entry = self.entries[name]
        begin, end = self._places[entry.file][entry.name]
        mapped = self._mapped[entry.file]
        whole = mapped[begin:end].view(entry.dtype).reshape(entry.shape)
        view = np.asarray(whole)[index]
        if not view.flags.c_contiguous or not view.size:
            return view
        if memory is None or memory.nbytes < view.nbytes:
            memory = np.empty(view.nbytes, np.uint8)
        values = memory[: view.nbytes].view(view.dtype).reshape(view.shape)
        left = memoryview(values.reshape(-1).view(np.uint8))
        place = view.ctypes.data - mapped.ctypes.data
        while left:
            count = os.preadv(self._numbers[entry.file], [left], place)
            if not count:
                raise self._damaged(entry.file, EOFError(f"it ends within {name}"))
            left, place = left[count:], place + count
        return values

    def dtype(self, name: str) -> np.dtype:
        """The dtype of tensor `name`."""
        return self.entries[name].dtype

    def _index(self) -> None:
        """Reads every file's header and checks them against the index where there is one."""
        check_folder(self.folder)
        listed = _listed_files(self.folder)
        for file in sorted(set(listed.values())) if listed else [SINGLE]:
            path = self.folder / file
            if not path.is_file():
                raise ModelError(
                    f"{path}: missing, but {INDEX} names it; copy or download the whole folder"
                )
            self._open[file] = self._checked_open(path)
            self._places[file] = _places(path)
            self._mapped[file] = np.memmap(path, np.uint8, "r")
            self._numbers[file] = self._opened_alone(path)
            for name in self._open[file].keys():
                tensor = self._open[file].get_slice(name)
                kind = tensor.get_dtype()
                if kind in self._dtypes:
                    entry = Entry(file, tuple(tensor.get_shape()), self._dtypes[kind], name)
                else:
                    raise ModelError(
                        f"{path}: tensor {name} has dtype {kind}; supported: {', '.join(DTYPES)}; "
                        "use the unquantised model"
                    )
                self.entries[name] = entry
        wrong = [name for name, file in listed.items() if self._file_of(name) != file]
        if wrong:
            raise ModelError(
                f"{self.folder / INDEX}: places {wrong[0]} in {listed[wrong[0]]}, where it is not; "
                "the folder is mixed from two models or damaged: download it again"
            )

    def _file_of(self, name: str) -> str | None:
        return self.entries[name].file if name in self.entries else None

    def _checked_open(self, path: pathlib.Path):
        """The file's handle, after its header length is known to be sane."""
        try:
            with path.open("rb") as stream:
                start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
                raise ModelError(
                    f"{path}: its header claims {length} bytes (limit {MAX_HEADER_BYTES}, and less "
                    "than the file); the file is damaged or not safetensors"
                )
            return self._files.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise self._damaged(path.name, error) from error

    def _opened_alone(self, path: pathlib.Path) -> int:
        """A number of the file that no reading ahead goes with: what lies behind is another's."""
        number = os.open(path, os.O_RDONLY)
        self._files.callback(os.close, number)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
        return number

    def _damaged(self, file: str, error: Exception) -> ModelError:
        return ModelError(
            f"{self.folder / file}: cannot be read as safetensors ({error}); the file is damaged "
            "or cut short: copy or download it again"
        )


def _places(path: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a file lies, in bytes; the file's header is known to be right."""
    with path.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    begin = 8 + length
    return {
        name: (begin + row["data_offsets"][0], begin + row["data_offsets"][1])
        for name, row in header.items()
    }


def _listed_files(folder: pathlib.Path) -> dict[str, str]:
    """Tensor name -> file from the index; empty where one file holds everything."""
    if (folder / SINGLE).is_file():
        return {}
    index = folder / INDEX
    if not index.is_file():
        raise _without_weights(folder)
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{index}: weight_map: must map tensor names to files; download it again")
    for name, file in listed.items():
        plain = isinstance(file, str) and file == pathlib.PurePosixPath(file).name
        if not plain or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{index}: weight_map: {name}: {str(file)[:80]!r} must be the plain name of a "
                ".safetensors file inside the folder"
            )
    return listed


def _without_weights(folder: pathlib.Path) -> ModelError:
    """The error for a folder without our kind of weights, with the way out that fits it."""
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return ModelError(
            f"{folder}: its weights are pickled ({pickled[0]}), and reading a pickle can run any "
            "code; only safetensors are read. Convert it where you trust the file: transformers' "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    fault = f"found {others[0]}, which no index names" if others else "found no weights"
    return ModelError(f"{folder}: needs {SINGLE} or {INDEX}; {fault}; download the whole model")


def parts(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut so that no part exceeds `limit` bytes unless one tensor alone does."""
    cut: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not cut or size > room:
            cut.append([])
            room = limit
        cut[-1].append(name)
        room -= size
    return cut


def write(
    folder: pathlib.Path, sizes: Mapping[str, int], tensors: Iterator[np.ndarray], limit: int
) -> None:
    """Writes tensors (in the order of `sizes`) as one file, or as parts with an index."""
    cut = parts(sizes, limit)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(cut, start=1):
        one = len(cut) == 1
        file = SINGLE if one else f"model-{number:05d}-of-{len(cut):05d}.safetensors"
        part = {name: np.ascontiguousarray(next(tensors)) for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(cut) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
