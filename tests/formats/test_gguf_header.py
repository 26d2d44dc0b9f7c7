"""The header parser against the gguf package's reader, and against damaged files."""

import numpy as np
import pytest

from jaxdistill.errors import ModelError
from jaxdistill.formats.gguf_header import read_header
from tests.models import gguf_files, oracle

gguf = pytest.importorskip("gguf", reason="needs the package gguf (the extra quickstart)")

EXTRA = {
    "add_bool": ("x.bool", True),
    "add_int8": ("x.int8", -3),
    "add_uint16": ("x.uint16", 65535),
    "add_int64": ("x.int64", -(1 << 40)),
    "add_float64": ("x.float64", 0.1),
    "add_array": ("x.floats", [0.5, 1.25]),
}


@pytest.fixture
def path(tmp_path):
    return gguf_files.write(tmp_path / "model.gguf", oracle.CASES["smollm2"], extra=EXTRA)


def test_header_equals_that_of_the_gguf_package(path):
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items()}
    assert ours.metadata == {k: v for k, v in fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata["x.bool"] is True and ours.metadata["x.int64"] == -(1 << 40)
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        place = ours.tensors[tensor.name]
        assert place.shape == tuple(tensor.shape[::-1]) and place.kind == tensor.tensor_type.name
        assert place.start == tensor.data_offset
        assert place.row_bytes * int(np.prod(place.shape[:-1])) == tensor.n_bytes


def test_every_damaged_header_is_a_model_error_or_read(path):
    """Cut anywhere or overwritten anywhere: an error that names the file, never another one."""
    sound = path.read_bytes()
    weights = oracle.tensors(oracle.CASES["smollm2"]).values()
    header = len(sound) - sum(values.nbytes for values in weights)
    rng = np.random.default_rng(0)
    for trial in range(300):
        data = bytearray(sound)
        if trial % 2:
            data = data[: rng.integers(0, header)]
        else:
            for place in rng.integers(0, header, 4):
                data[place] = rng.integers(0, 256)
        path.write_bytes(bytes(data))
        try:
            read_header(path)
        except ModelError as error:
            assert str(path) in str(error)
            assert "GGUF" in str(error)
        else:
            assert trial % 2 == 0


def test_lengths_beyond_the_file_are_refused(path):
    data = bytearray(path.read_bytes())
    data[24:32] = (1 << 60).to_bytes(8, "little")  # of the first key
    path.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="reach past the end of the file"):
        read_header(path)
