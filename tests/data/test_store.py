import json

import numpy as np
import pytest

from jaxdistill.data import store
from jaxdistill.errors import StorageError
from jaxdistill.safe import manifest


def fill(folder, value=1):
    for name, dtype in store.ARRAYS.items():
        writer = store.ArrayWriter(folder / f"{name}.npy", dtype)
        writer.append(np.full(5, value, dtype))
        writer.finish()
    (folder / store.QUARANTINE).write_text("")
    store.seal(folder, {"fingerprint": "f", "value": value})


def sealed(tmp_path, value=1):
    folder = tmp_path / "set"
    with store.new_folder(folder) as temporary:
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
    arrays = store.read_arrays(folder)
    assert all(isinstance(array, np.memmap) and len(array) == 5 for array in arrays.values())
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in store.ARRAYS), manifest.NAME])
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
    with pytest.raises(RuntimeError), store.new_folder(tmp_path / "set") as temporary:
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
        with store.new_folder(tmp_path / "file" / "set"):
            pass


def test_arrays_with_objects_are_refused(tmp_path):
    folder = sealed(tmp_path)
    np.save(folder / "tokens.npy", np.asarray([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle|Object|object"):
        store.read_arrays(folder)
