"""Rows are read that lie together, as many bytes as are needed, and become columns to the bit."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from jax import NamedSharding, P

from jaxdistill.formats import exchange
from jaxdistill.formats.assemble import Source, weight
from jaxdistill.formats.tensor_names import Part, TensorName, file_shape
from jaxdistill.models.architecture import Weight

STACKED = TensorName("w.{}", transposed=True)
EXPERTS = TensorName("w.{}.{}", transposed=True)
TABLE = TensorName("w")
# name, our shape, part of the file's tensor, where it shall lie, into how many parts rows are cut.
CASES = {
    "columns": (STACKED, (3, 16, 24), None, P(None, "fsdp", None), 2),
    "columns and rows": (STACKED, (3, 16, 24), None, P(None, "fsdp", "tensor"), 4),
    "columns over two axes": (STACKED, (3, 16, 24), None, P(None, ("tensor", "fsdp"), None), 4),
    "a table, tied or not": (TABLE, (24, 16), None, P("tensor", "fsdp"), 4),
    "experts": (EXPERTS, (2, 4, 8, 12), None, P(None, "tensor", "fsdp", None), 2),
    "fused": (STACKED, (2, 16, 12), Part(4, 4, 12, 36), P(None, "fsdp", "tensor"), 4),
}
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn)


def exchange_all(monkeypatch):
    """As among several processes, and of small tensors too."""
    monkeypatch.setattr(exchange, "_whole_rows", lambda *given: False)
    monkeypatch.setattr(exchange, "_LEAST", 0)


class _Counted:
    """Tensors of random bits, NaNs among them; keeps every slice that is read."""

    def __init__(self, name, row, part, dtype):
        rng, shape = np.random.default_rng(0), file_shape(name, row, part)
        width = np.dtype(dtype).itemsize
        self.named = {
            name.pattern.format(*index): rng.integers(
                0, 256, (*shape[:-1], shape[-1] * width), np.uint8
            ).view(dtype)
            for index in np.ndindex(*row.shape[: name.stacked])
        }
        self.slices = []

    def read(self, name, index, memory=None):
        self.slices.append(self.named[name][index])
        return self.slices[-1]

    def dtype(self, name):
        return self.named[name].dtype


def _loaded(case, dtype, mesh):
    name, shape, part, place, _ = CASES[case]
    row = Weight(shape, (None,) * len(shape), "zeros")
    source = _Counted(name, row, part, dtype)
    array = weight(name, row, part, NamedSharding(mesh, place), Source.of(source, mesh, None))
    tensors = [one.T if name.transposed else one for one in source.named.values()]
    if part is not None:
        tensors = [one[:, part.places(shape[-1])] for one in tensors]
    return source.slices, array, np.stack(tensors).reshape(shape)


@pytest.mark.parametrize(("case", "dtype"), [
    ("columns", DTYPES[0]), ("columns", DTYPES[1]), ("columns", DTYPES[2]), ("columns", DTYPES[3]),
    *((case, ml_dtypes.bfloat16) for case in list(CASES)[1:]),
])  # fmt: skip
def test_as_many_bytes_as_needed_are_read_and_lie_together(case, dtype, mesh8, monkeypatch):
    exchange_all(monkeypatch)
    slices, array, whole = _loaded(case, dtype, mesh8)
    _, shape, part, place, parts = CASES[case]
    assert all(one.flags.c_contiguous for one in slices)
    # Every row of ours once, in that many parts, whatever axes the parts are over.
    assert sum(one.nbytes for one in slices) == whole.nbytes
    if part is None:
        rows = shape[-1] if len(shape) > 2 else shape[0]
        assert {len(one) for one in slices} == {rows // parts}
    assert array.sharding == NamedSharding(mesh8, place)
    for shard in array.addressable_shards:
        assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes()


@pytest.mark.parametrize("case", CASES)
def test_a_process_that_needs_all_columns_reads_each_row_once(case, mesh8):
    slices, array, whole = _loaded(case, ml_dtypes.bfloat16, mesh8)
    assert sum(one.nbytes for one in slices) == whole.nbytes
    assert all(one.flags.c_contiguous for one in slices)
    assert np.asarray(array).tobytes() == whole.tobytes()


def test_of_one_process_small_and_what_does_not_divide_is_read_as_it_lies(mesh8, monkeypatch):
    slices, array, whole = _loaded("columns", np.float32, mesh8)
    assert {one.shape for one in slices} == {(24, 16)}  # whole rows: two devices share a reading
    assert np.asarray(array).tobytes() == whole.tobytes()
    monkeypatch.setattr(exchange, "_whole_rows", lambda *given: False)
    small, _, _ = _loaded("columns", np.float32, mesh8)
    assert {one.shape for one in small} == {(24, 16)}
    exchange_all(monkeypatch)
    monkeypatch.setitem(CASES, "odd", (STACKED, (3, 16, 9), None, P(None, "fsdp", None), 1))
    slices, array, whole = _loaded("odd", np.float32, mesh8)
    assert {one.shape for one in slices} == {(9, 16)}
    assert np.asarray(array).tobytes() == whole.tobytes()


def test_numbers_of_four_bits_travel_in_bytes(mesh8, monkeypatch):
    exchange_all(monkeypatch)
    values = np.random.default_rng(0).integers(-8, 8, (2, 8, 6), np.int8)
    place = NamedSharding(mesh8, P(None, "fsdp", None))
    read = lambda slices: [values[one] for one in slices]
    array = exchange.array(values.shape, place, read, 2, 1, "int4")
    assert array.dtype == "int4" and array.sharding == place
    np.testing.assert_array_equal(np.asarray(array).astype(np.int8), values)


class _Device(NamedTuple):
    number: int
    process_index: int


def test_rows_are_exchanged_only_where_a_process_needs_parts_of_them():
    left, right, upper, lower = slice(0, 4), slice(4, 8), slice(0, 2), slice(2, 4)
    first, second = [_Device(number, 0) for number in (0, 1)], [_Device(2, 1), _Device(3, 1)]

    def whole(*slices):
        needed = dict(zip((*first, *second), slices, strict=True))
        return exchange._whole_rows((4, 8), needed, 1)

    every = slice(None)
    assert not whole((every, left), (every, left), (every, right), (every, right))
    assert whole((every, left), (every, right), (every, left), (every, right))  # in each host
    assert whole((upper, every), (upper, every), (lower, every), (lower, every))
    assert whole((upper, left), (upper, right), (lower, left), (lower, right))
    # Processes of one host take their columns of pages that are read once.
    needed = dict(zip((*first, *second), [(every, left)] * 2 + [(every, right)] * 2, strict=True))
    assert exchange._whole_rows((4, 8), needed, 1, ("host", "host"))
    assert not exchange._whole_rows((4, 8), needed, 1, ("host", "other"))
    # All columns, but of different rows.
    assert not whole((upper, left), (lower, right), (upper, right), (lower, left))


def test_processes_that_open_one_file_have_one_cache(mesh8, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"1")
    linked = tmp_path / "linked"
    linked.hardlink_to(one)
    name = lambda *files: exchange.page_caches(mesh8, files)[0]
    assert name(one) == name(linked) != name(other)
    assert name() == "0"  # of each process its own
    monkeypatch.setattr(exchange, "_host", lambda: "of another host")
    assert name(one).startswith("of another host") and exchange.page_caches(None, [one]) == ()
    with pytest.raises(FileNotFoundError):
        name(tmp_path / "gone")
