"""Block sizes of the kernels: a heuristic by device, and a table that an autotuner writes."""

import dataclasses
import functools
import json
import os
import pathlib
from typing import NamedTuple

from jaxdistill.errors import ConfigError
from jaxdistill.kernels.rows import KINDS
from jaxdistill.kernels.statistics import MOMENTS
from jaxdistill.safe import json_file

ROWS = 64
TABLE_VARIABLE = "JAXDISTILL_TILING"  # the path of a table, read at the first call


class GpuLimits(NamedTuple):
    """What the heuristic knows of a GPU: multiprocessors, and shared memory of each in bytes."""

    multiprocessors: int
    shared_memory: int


# NVIDIA's data sheets; the first name that a device's own contains.
GPUS = {
    "A100": GpuLimits(108, 167_936),
    "H100": GpuLimits(132, 233_472),
    "H200": GpuLimits(132, 233_472),
    "B200": GpuLimits(148, 233_472),
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


_SCRATCH = 2048  # bytes of a block's shared memory beside its tiles

# Kinds whose second read makes the logarithm of a mixture.
_OF_MIXTURES = ("generalized_jsd", "skew_forward_kl", "skew_reverse_kl")

_FIELDS = tuple(field.name for field in dataclasses.fields(Tiling))


class Work(NamedTuple):
    """What a kernel does with the logits that it reads: its program but for their shape.

    Attributes:
      sums: names of the statistics that it carries, others where T is known to be 1; or the kind of
        a divergence whose second read it is.
      models: whose logits it reads.
      mixed: whether it makes TAID's mixture of both.
    """

    sums: tuple[str, ...]
    models: int = 2
    mixed: bool = False


def tiling(tokens: int, vocab: int, dtype: str, device_kind: str, work: Work) -> Tiling:
    """The table's entry for these shapes and this work, or else the heuristic's."""
    entry = _table().get(key(tokens, vocab, dtype, device_kind, work))
    if entry is None:
        return heuristic(tokens, vocab, dtype, device_kind, work)
    return within(Tiling(**entry), vocab, device_kind)


def within(tiling: Tiling, vocab: int, device_kind: str) -> Tiling:
    """The same tiling, or on a GPU whose copies know no bounds one whose tiles all lie inside V.

    Where a tile has fewer columns than another, such a GPU would read what lies behind the row, and
    behind the array at its end.
    """
    if "A100" not in device_kind or vocab % tiling.columns == 0:
        return tiling
    return dataclasses.replace(tiling, columns=64)


def heuristic(tokens: int, vocab: int, dtype: str, device_kind: str, work: Work) -> Tiling:
    """Tiles of 64 x 64, and as many blocks to a row as run at one time.

    A second wave that is partly empty costs more than a smaller split: 128 row blocks on 132
    multiprocessors with 3 blocks each take 3 splits (384 of 396 places), not 4. Up to four tiles
    are in flight, and fewer rather than fewer blocks: float32 tiles are twice as large.
    """
    gpu = next((gpu for name, gpu in GPUS.items() if name in device_kind), GPUS["H100"])
    tile = work.models * ROWS * 64 * (4 if dtype == "float32" else 2)
    tiles = lambda resident: min(4, (gpu.shared_memory // resident - _SCRATCH) // tile)
    resident = next((n for n in range(resident_blocks(work), 1, -1) if tiles(n) >= 2), 1)
    row_blocks = -(-tokens // ROWS)
    split = max(1, gpu.multiprocessors * resident // row_blocks)
    split = min(split, max(1, vocab // 64 // 4))
    return within(Tiling(64, tiles(resident), split), vocab, device_kind)


def resident_blocks(work: Work) -> int:
    """Blocks of a kernel, of 128 threads each, that a multiprocessor's registers hold.

    As compiled (benchmarks/README.md): of two models up to four sums at one temperature, or three
    at two, take 168 registers of a thread at most, which leaves room for 3 blocks; more sums take
    up to 250, and the second read of a mixture's divergence 200. One model takes 128, at two
    temperatures 152.
    """
    if work.sums[0] in KINDS:
        return 2 if work.sums[0] in _OF_MIXTURES else 3
    one = len({MOMENTS[name].tempered for name in work.sums if name in MOMENTS}) == 1
    if work.models == 1:
        return 4 if one else 3
    return 3 if len(work.sums) <= (4 if one else 3) else 2


def key(tokens: int, vocab: int, dtype: str, device_kind: str, work: Work) -> str:
    """How a table names a problem; tokens, those of a chunk, by the power of two below them."""
    rows = 1 << (tokens.bit_length() - 1)
    sums = "+".join(sorted(_of_any_model(work.sums) if work.models == 1 else work.sums))
    does = f"{work.models} models{', mixed' if work.mixed else ''}, {sums}"
    return f"{device_kind}|{rows}|{vocab}|{dtype}|{does}"


def _of_any_model(sums: tuple[str, ...]) -> list[str]:
    """The sums of one model alone: either's program is the same, at any one temperature."""
    names = [name.replace("_t", "_s") for name in sums]
    at_one = all(name.endswith("1") for name in names)
    return [name.removesuffix("1") for name in names] if at_one else names


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
