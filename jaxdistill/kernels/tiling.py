"""Block sizes of the kernels: a heuristic by device, and a table that an autotuner writes."""

import dataclasses
import functools
import json
import os
import pathlib
from typing import NamedTuple

from jaxdistill.errors import ConfigError
from jaxdistill.safe import json_file

ROWS = 64
TABLE_VARIABLE = "JAXDISTILL_TILING"  # the path of a table, read at the first call


class Gpu(NamedTuple):
    """What the heuristic knows of a GPU: multiprocessors, and shared memory of each in bytes."""

    multiprocessors: int
    shared_memory: int


# NVIDIA's data sheets; the first name that a device's own contains.
GPUS = {
    "A100": Gpu(108, 167_936),
    "H100": Gpu(132, 233_472),
    "H200": Gpu(132, 233_472),
    "B200": Gpu(148, 233_472),
}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the statistics kernel cuts [N, V].

    Attributes:
      columns: of a tile, a multiple of 64.
      stages: tiles in flight.
      split: blocks that share a row.
    """

    columns: int = 64
    stages: int = 4
    split: int = 1

    def __post_init__(self):
        if self.columns % 64 or not 64 <= self.columns <= 256:
            raise ConfigError(f"columns = {self.columns}: must be 64, 128, 192 or 256")
        if not 1 <= self.stages <= 8:
            raise ConfigError(f"stages = {self.stages}: must be 1 to 8")
        if self.split < 1:
            raise ConfigError(f"split = {self.split}: must be at least 1")


_FIELDS = tuple(field.name for field in dataclasses.fields(Tiling))


def tiling(
    tokens: int, vocab: int, dtype: str, device_kind: str, values: int = 5, models: int = 2
) -> Tiling:
    """The table's entry for these shapes, or else the heuristic's."""
    entry = _table().get(key(tokens, vocab, dtype, device_kind, values, models))
    if entry is None:
        return heuristic(tokens, vocab, dtype, device_kind, values, models)
    return within(Tiling(**entry), vocab, device_kind)


def within(tiling: Tiling, vocab: int, device_kind: str) -> Tiling:
    """The same tiling, or on a GPU whose copies know no bounds one whose tiles all lie inside V.

    Where a split has fewer tiles than another, or a tile fewer columns, such a GPU would read what
    lies behind the row, and behind the array at its end.
    """
    if "A100" not in device_kind:
        return tiling
    columns = tiling.columns if vocab % tiling.columns == 0 else 64
    blocks = vocab // columns
    split = max(n for n in range(1, min(tiling.split, max(blocks, 1)) + 1) if blocks % n == 0)
    return dataclasses.replace(tiling, columns=columns, split=split)


def heuristic(
    tokens: int, vocab: int, dtype: str, device_kind: str, values: int = 5, models: int = 2
) -> Tiling:
    """Tiles of 64 x 64, four in flight, and as many blocks to a row as run at one time.

    A second wave that is partly empty costs more than a smaller split: 128 row blocks on 132
    multiprocessors with 3 blocks each take 3 splits (384 of 396 places), not 4. A kernel of two
    models that carries more than 5 values per row needs 199 registers and more, which leave room
    for 2 blocks of 128 threads; one model's needs no more than 152.
    """
    gpu = next((gpu for name, gpu in GPUS.items() if name in device_kind), GPUS["H100"])
    stages = 4
    tile = ROWS * 64 * (4 if dtype == "float32" else 2)
    fitting = gpu.shared_memory // (models * stages * tile + 2048)
    resident = max(1, min(3 if values <= 5 or models == 1 else 2, fitting))
    row_blocks = -(-tokens // ROWS)
    split = max(1, gpu.multiprocessors * resident // row_blocks)
    return within(Tiling(64, stages, min(split, max(1, vocab // 64 // 4))), vocab, device_kind)


def key(
    tokens: int, vocab: int, dtype: str, device_kind: str, values: int = 5, models: int = 2
) -> str:
    """How a table names a problem; tokens, those of a chunk, by the power of two below them."""
    rows = 1 << (tokens.bit_length() - 1)
    return f"{device_kind}|{rows}|{vocab}|{dtype}|{models} models, {values} values"


def load(path: str | os.PathLike) -> dict[str, dict[str, int]]:
    """Reads a table and checks it.

    Raises:
      ConfigError: if the file is not a table; the message says where.
    """
    try:
        table = json_file.read(pathlib.Path(path))
        for entry in table.values():
            json_file.check(entry, dict.fromkeys(_FIELDS, int))
            Tiling(**entry)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{TABLE_VARIABLE} = {path}: not a table of tilings ({error}); write one with "
            "`jaxdistill bench kernels --tune FILE`, or unset the variable"
        ) from error
    return table


def save(path: str | os.PathLike, entries: dict[str, Tiling]) -> None:
    """Adds entries to a table, which need not exist."""
    path = pathlib.Path(path)
    table = load(path) if path.exists() else {}
    table |= {name: dataclasses.asdict(entry) for name, entry in entries.items()}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, int]]:
    path = os.environ.get(TABLE_VARIABLE)
    return load(path) if path else {}
