import json
import os

import numpy as np
import pytest

from jaxdistill.data import arrays, store
from jaxdistill.errors import DamagedError, StorageError
from jaxdistill.safe import manifest

ARRAYS = store.TOKENS | store.DOCUMENTS


def fill(folder, value=1):
    for name, (dtype, row_shape) in ARRAYS.items():
        store.write_array(folder, name, (dtype, row_shape), np.full((5, *row_shape), value, dtype))
    (folder / store.QUARANTINE).write_text("")
    store.seal(folder, {"fingerprint": "f", "value": value})


def sealed(tmp_path, value=1):
    folder = tmp_path / "set"
    with store.new_folder(folder, resumes=False) as temporary:
        fill(temporary, value)
    return folder


def test_arrays_grow_and_read_back(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 99, (n, 2)) for n in (3, 0, 100_000, 1)]
    writer = store.ArrayWriter(tmp_path / "a.npy", np.dtype(np.int64), (2,))
    for part in parts:
        writer.append(part)
    writer.finish()
    # NumPy's own reader is the judge.
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.concatenate(parts))


def test_a_sealed_folder_is_whole(tmp_path):
    folder = sealed(tmp_path)
    assert store.problem(folder) is None
    assert manifest.read(folder)["fingerprint"] == "f"
    found = arrays.of_shards([folder])
    assert all(len(array) == 5 for array in found.values())
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in ARRAYS), manifest.NAME])
def test_every_flipped_bit_is_found(tmp_path, name):
    folder = sealed(tmp_path)
    path = folder / name
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(20):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        if name == manifest.NAME and _same_json(content, damaged):
            continue
        assert store.problem(folder) is not None
    path.write_bytes(content)
    assert store.problem(folder) is None


def _same_json(content, damaged):
    """White space of the manifest may change without changing what it says."""
    try:
        return json.loads(content) == json.loads(bytes(damaged))
    except ValueError:
        return False


def test_missing_and_cut_files_are_found(tmp_path):
    folder = sealed(tmp_path)
    tokens = folder / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    assert "tokens.npy is changed" in store.problem(folder)
    tokens.unlink()
    assert "tokens.npy is missing" in store.problem(folder)
    (folder / manifest.NAME).unlink()
    assert "manifest.json: cannot be read" in store.problem(folder)


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), store.new_folder(tmp_path / "set", resumes=True) as temporary:
        fill(temporary)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_is_replaced_and_a_whole_one_stays(tmp_path):
    folder = sealed(tmp_path, value=1)
    sealed(tmp_path, value=2)
    assert manifest.read(folder)["value"] == 1
    (folder / "tokens.npy").write_bytes(b"x")
    sealed(tmp_path, value=3)
    assert store.problem(folder) is None and manifest.read(folder)["value"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_cannot_be_written_names_the_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file.*cannot be written"):
        with store.new_folder(tmp_path / "file" / "set", resumes=True):
            pass


def test_arrays_with_objects_are_refused(tmp_path):
    folder = sealed(tmp_path)
    np.save(folder / "tokens.npy", np.asarray([{}], object), allow_pickle=True)
    with pytest.raises(DamagedError, match="holds object, not int32"):
        arrays.of_shards([folder])


def long(tmp_path, monkeypatch, kept):
    """A set with several blocks in each array, read once."""
    monkeypatch.setattr(arrays, "_KEPT_BLOCKS", kept)
    values = np.random.default_rng(0).integers(0, 99, 3 * store.BLOCK // 4).astype(np.int32)
    folder = tmp_path / "set"
    with store.new_folder(folder, resumes=False) as temporary:
        for name, spec in store.TOKENS.items():
            store.write_array(temporary, name, spec, values)
        store.seal(temporary, {})
    array = arrays.of_shards([folder])["tokens"]
    np.testing.assert_array_equal(array[:], values)
    return folder / "tokens.npy", array, values


def test_slices_are_those_of_numpy(tmp_path, monkeypatch):
    _, array, values = long(tmp_path, monkeypatch, kept=2)
    draw = np.random.default_rng(1)
    edge = store.BLOCK // 4
    cuts = [(0, 0), (5, 2), (edge - 40, edge), (0, len(values)), (len(values) - 1, len(values) + 9)]
    cuts += [tuple(sorted(draw.integers(0, len(values), 2).tolist())) for _ in range(20)]
    for first, last in cuts:
        np.testing.assert_array_equal(array[first:last], values[first:last])


def test_what_changes_after_the_start_is_found_before_it_is_used(tmp_path, monkeypatch):
    path, array, values = long(tmp_path, monkeypatch, kept=1)
    raw = path.read_bytes()
    for place in np.random.default_rng(2).integers(0, len(raw), 12):
        changed = bytearray(raw)
        changed[place] ^= 4
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match="tokens.npy: is changed since it was written"):
            array[:], array[:]
        path.write_bytes(raw)
    np.testing.assert_array_equal(array[:], values)
    os.truncate(path, 100)
    with pytest.raises(DamagedError, match="tokens.npy"):
        array[:]


def test_a_small_set_is_read_once(tmp_path, monkeypatch):
    path, array, values = long(tmp_path, monkeypatch, kept=100)
    os.truncate(path, 100)
    np.testing.assert_array_equal(array[:], values)


@pytest.mark.parametrize("kept", [1, 100])
def test_files_that_are_joined_are_one_array(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(arrays, "_KEPT_FILES", kept)
    draw = np.random.default_rng(0)
    sizes = [3, 0, 3 * store.BLOCK // 2, 1, 0, 40, 0]
    parts = [draw.integers(0, 99, size).astype(np.uint16) for size in sizes]
    folders = []
    for number, part in enumerate(parts):
        folders.append(tmp_path / str(number))
        with store.new_folder(folders[-1], resumes=False) as temporary:
            store.write_array(temporary, "tokens", (np.dtype(np.uint16), ()), part)
            store.write_array(temporary, "loss", store.TOKENS["loss"], np.zeros(0, bool))
            store.seal(temporary, {store.IDS: "uint16"})
    found = arrays.of_shards(folders)
    whole = np.concatenate(parts)
    assert len(found["tokens"]) == len(found["loss"]) == len(whole)
    cuts = [(0, len(whole)), (2, 5), (3, 3), (len(whole) - 41, len(whole) + 7), (5, 2)]
    cuts += [tuple(sorted(draw.integers(0, len(whole), 2).tolist())) for _ in range(20)]
    for first, last in cuts:
        np.testing.assert_array_equal(found["tokens"][first:last], whole[first:last])
        assert found["loss"][first:last].sum() == len(whole[first:last])
    path = folders[2] / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    fresh = arrays.of_shards(folders)["tokens"]
    with pytest.raises(DamagedError, match="tokens.npy: is changed since it was written"):
        fresh[:]
