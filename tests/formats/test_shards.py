"""Safetensors folders: slices, parts, and every way a folder can lie."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdistill.errors import ModelError
from jaxdistill.formats import shards, slices

WHOLE = (slice(None), slice(None))


def _index(folder, weight_map):
    (folder / shards.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_slices_are_read_in_their_dtype(tmp_path, dtype):
    values = np.arange(24).reshape(6, 4).astype(dtype)
    save_file({"a": values}, tmp_path / shards.SINGLE)
    with shards.Folder(tmp_path) as files:
        part = files.read("a", (slice(2, 5), slice(1, 3)))
        assert files.dtype("a") == np.dtype(dtype) == part.dtype
        np.testing.assert_array_equal(part, values[2:5, 1:3])


def test_parts_hold_at_most_the_limit():
    sizes = {"a": 5, "b": 4, "c": 20, "d": 1, "e": 9}
    assert shards.parts(sizes, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert shards.parts(sizes, 100) == [list(sizes)]


def test_written_parts_are_read_back(tmp_path):
    named = {f"t{i}": np.full((3, 2), i, np.float32) for i in range(5)}
    sizes = {name: value.nbytes for name, value in named.items()}
    shards.write(tmp_path, sizes, iter(named.values()), 50)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert json.loads((tmp_path / shards.INDEX).read_text())["metadata"]["total_size"] == 120
    with shards.Folder(tmp_path) as files:
        for name, value in named.items():
            np.testing.assert_array_equal(files.read(name, WHOLE), value)


BAD_FILES = ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", "x.bin", 3]
BAD_FILES += ["a\\x.safetensors", "a\0.safetensors", "./x.safetensors", "x.safetensors/"]


@pytest.mark.parametrize("file", BAD_FILES)
def test_an_index_may_name_plain_files_only(tmp_path, file):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    save_file({"a": np.ones(2, np.float32)}, tmp_path.parent / "x.safetensors")
    _index(tmp_path, {"a": file})
    with pytest.raises(ModelError, match="must be the plain name of a .safetensors file inside"):
        shards.Folder(tmp_path)


def test_a_missing_part_is_named(tmp_path):
    _index(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(ModelError, match=r"gone.safetensors: missing, but model.safetensors.index"):
        shards.Folder(tmp_path)


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "y.safetensors")
    _index(tmp_path, {"a": "y.safetensors", "b": "y.safetensors"})
    with pytest.raises(ModelError, match="places a in y.safetensors, where it is not"):
        shards.Folder(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff", "[" * 100_000])
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / shards.INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match="index.json: (is not JSON|must hold a JSON object)"):
        shards.Folder(tmp_path)


def test_an_index_without_a_map_is_named(tmp_path):
    _index(tmp_path, [])
    with pytest.raises(ModelError, match="weight_map: must map"):
        shards.Folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelError, match=f"pickled .{name}.*save_pretrained"):
        shards.Folder(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(ModelError, match="found no weights"):
        shards.Folder(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(ModelError, match="found consolidated.safetensors, which no index names"):
        shards.Folder(tmp_path)


def test_a_header_that_claims_too_much_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / shards.SINGLE
    for start, claim in ((struct.pack("<Q", 1 << 40), 1 << 40), (struct.pack("<Q", 500), 500)):
        path.write_bytes(start + b"{}" * 20)
        with pytest.raises(ModelError, match=f"its header claims {claim} bytes"):
            shards.Folder(tmp_path)
    path.write_bytes(b"short")
    with pytest.raises(ModelError, match="its header claims -1 bytes"):
        shards.Folder(tmp_path)


def test_every_damaged_file_is_a_model_error(tmp_path):
    """Truncated or overwritten anywhere: an error that names the file, or the values of before."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / shards.SINGLE
    save_file({"a": values, "b": values}, path)
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(200):
        data = bytearray(sound)
        if trial % 2:
            data = data[: rng.integers(0, len(data))]
        else:
            for place in rng.integers(0, 8 + 120, 3):
                data[place] = rng.integers(0, 256)
        path.write_bytes(bytes(data))
        try:
            with shards.Folder(tmp_path) as files:
                for name in files.entries:
                    files.read(name, (slice(None),) * len(files.entries[name].shape))
        except ModelError as error:
            assert str(path) in str(error)


def test_quantised_tensors_are_named(tmp_path):
    save_file({"a": np.ones(2, np.int8)}, tmp_path / shards.SINGLE)
    with pytest.raises(ModelError, match="tensor a has dtype I8; supported: F64, F32, F16, BF16"):
        shards.Folder(tmp_path)


def test_parts_of_rows_are_a_view_and_no_copy_of_the_tensor(tmp_path):
    values = np.arange(64 * 96, dtype=np.float32).reshape(64, 96).astype(ml_dtypes.bfloat16)
    save_file({"a": np.ones(3, np.float16), "b": values}, tmp_path / shards.SINGLE)
    with shards.Folder(tmp_path) as folder:
        part = folder.read("b", (slice(8, 16), slice(32, 64)))
        assert part.base is not None and not part.flags.owndata  # a view of the mapped file
        np.testing.assert_array_equal(part, values[8:16, 32:64])
        np.testing.assert_array_equal(folder.read("a", (slice(1, 3),)), np.ones(2, np.float16))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_what_lies_together_is_read_to_the_byte(tmp_path, monkeypatch, dtype):
    values = np.random.default_rng(0).integers(0, 256, (64, 96, 4), np.uint8).view(dtype)
    values = values.reshape(64, -1)
    save_file({"a": np.ones(3, np.float16), "b": values}, tmp_path / shards.SINGLE)
    original, read = os.preadv, []

    def few(number, buffers, place):  # as a disk may give them
        read.append(original(number, [buffers[0][:1000]], place))
        return read[-1]

    monkeypatch.setattr(shards.os, "preadv", few)
    with shards.Folder(tmp_path) as folder:
        for index in (np.s_[8:16, :], np.s_[63:, :], np.s_[5:6, 8:20], np.s_[:, :]):
            read.clear()
            part = folder.read("b", index)
            assert part.tobytes() == values[index].tobytes()
            assert sum(read) == values[index].nbytes
        os.truncate(tmp_path / shards.SINGLE, (tmp_path / shards.SINGLE).stat().st_size - 8)
        with pytest.raises(ModelError, match="it ends within b"):
            folder.read("b", np.s_[60:, :])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_tiles_of_turned_kernels_are_filled_to_the_bit(dtype):
    values = np.random.default_rng(0).standard_normal((300, 520)).astype(ml_dtypes.bfloat16)
    place = np.empty((520, 300), dtype)
    slices.fill(place, values.T)
    np.testing.assert_array_equal(place, values.astype(dtype).T)
