"""Model folders that we write carry checksums: every changed bit is found when they are read."""

import json
import os

import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.errors import DamagedError
from jaxdistill.formats import new_folder, sums
from jaxdistill.models import DecoderConfig
from jaxdistill.safe import manifest

SMALL = DecoderConfig(
    family="llama",
    vocab_size=16,
    embed=8,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=4,
    mlp=8,
    max_positions=32,
)


@pytest.fixture(scope="module")
def model():
    return models.random(SMALL)


def test_every_flipped_bit_of_a_written_folder_is_found(model, tmp_path):
    folder = models.save(model, tmp_path / "model", notes={"pruning.json": "{}"})
    assert models.load(folder).config == model.config
    draw = np.random.default_rng(0)
    names = ["model.safetensors", "config.json", "generation_config.json", "pruning.json"]
    for name in (*names * 2, sums.FILE):
        path = folder / name
        raw = path.read_bytes()
        changed = bytearray(raw)
        changed[draw.integers(len(raw))] ^= 1 << draw.integers(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match=f"remove {sums.FILE}"):
            models.load(folder)
        if name != "model.safetensors":
            with pytest.raises(DamagedError):
                models.spec(folder)
        path.write_bytes(raw)
    (folder / "README.md").write_text("added later")
    models.load(folder)
    (folder / "generation_config.json").unlink()
    with pytest.raises(DamagedError, match="generation_config.json is missing"):
        models.spec(folder)
    (folder / sums.FILE).unlink()  # changed on purpose
    models.load(folder)


def test_all_files_have_the_mode_of_new_files(model, tmp_path):
    folder = models.save(model, tmp_path / "model")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_a_renewed_folder_is_replaced_only_by_another(tmp_path):
    place = tmp_path / "student"

    def write(text):
        with new_folder.renewed(place) as inside:
            (inside / "config.json").write_text(text)
        return (place / "config.json").read_text(), (place / "config.json").stat().st_ino

    first = write("one")
    assert write("one") == first
    (place / "config.json").write_text("eno")
    again = write("one")
    assert again[0] == "one" and again[1] != first[1]
    assert write("two")[0] == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    sums.check(place, weights=True)


def test_a_folder_with_a_note_appears_in_one_move(model, tmp_path, monkeypatch):
    place, seen, rename = tmp_path / "model", [], os.rename

    def watched(source, target):
        rename(source, target)
        if target == place:  # a process killed here has left this
            seen.append({path.name for path in place.iterdir()})

    monkeypatch.setattr(os, "rename", watched)
    models.save(model, place, notes={"pruning.json": json.dumps({})})
    assert seen == [{path.name for path in place.iterdir()}]
    assert {"pruning.json", sums.FILE, "config.json", "model.safetensors"} <= seen[0]
    assert "pruning.json" in manifest.read(place, sums.FILE)["files"]

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sums, "seal", fail)
    with pytest.raises(ValueError, match="nothing was left there"):
        models.save(model, tmp_path / "other", notes={"pruning.json": json.dumps({})})
    assert list(tmp_path.iterdir()) == [place]
