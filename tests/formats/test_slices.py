"""Who has columns of the same rows shares their reading; what lies between is not read."""

import numpy as np
import pytest

from jaxdistill.formats import slices
from jaxdistill.formats.tensor_names import Part, TensorName

WHOLE = np.random.default_rng(0).integers(0, 2**16, (2, 24, 40)).astype(np.uint16)


class _Files:
    """Two tensors [24, 40]; keeps every index that is read."""

    threads = True

    def __init__(self):
        self.read_of = []

    def read(self, name, index, memory=None):
        self.read_of.append(tuple((one.start, one.stop) for one in index))
        found = WHOLE[int(name)][index]
        if memory is None or found.nbytes > memory.nbytes:
            return found
        values = memory[: found.nbytes].view(found.dtype).reshape(found.shape)
        values[...] = found
        return values

    def dtype(self, name):
        return WHOLE.dtype


@pytest.mark.parametrize("transposed", [True, False])
def test_columns_side_by_side_are_read_together_and_gaps_are_left_out(transposed):
    files = _Files()
    ours = WHOLE.swapaxes(1, 2) if transposed else WHOLE
    columns = [slice(30, 40), slice(0, 10), slice(10, 20)]
    wanted = [
        (slice(0, 2), own, slice(4, 20)) if transposed else (slice(0, 2), slice(4, 20), own)
        for own in columns
    ]
    name = TensorName("{}", transposed=transposed)
    blocks = slices.read(name, None, wanted, files, WHOLE.dtype, slices.Buffers())
    for block, spans in zip(blocks, wanted, strict=True):
        np.testing.assert_array_equal(block, ours[spans])
    together, alone = ((4, 20), (0, 20)), ((4, 20), (30, 40))
    assert sorted(files.read_of) == [together, together, alone, alone]


def test_runs_of_a_fused_tensor_are_read_each_for_all_who_share_it():
    files = _Files()
    part = Part(start=4, block=4, stride=8, total=24)  # outputs 4..8, 12..16, 20..24
    wanted = [(slice(0, 1), own, slice(0, 12)) for own in (slice(0, 20), slice(20, 40))]
    name = TensorName("{}", transposed=True)
    blocks = slices.read(name, part, wanted, files, WHOLE.dtype, slices.Buffers())
    for block, spans in zip(blocks, wanted, strict=True):
        rows = [*range(4, 8), *range(12, 16), *range(20, 24)]
        np.testing.assert_array_equal(block[0], WHOLE[0].T[spans[1]][:, rows])
    assert sorted(files.read_of) == [((start, start + 4), (0, 40)) for start in (4, 12, 20)]


def test_slices_of_other_rows_are_read_apart():
    files = _Files()
    wanted = [(slice(0, 1), slice(0, 40), rows) for rows in (slice(0, 12), slice(12, 24))]
    slices.read(TensorName("{}", True), None, wanted, files, WHOLE.dtype, slices.Buffers())
    assert sorted(files.read_of) == [((0, 12), (0, 40)), ((12, 24), (0, 40))]
