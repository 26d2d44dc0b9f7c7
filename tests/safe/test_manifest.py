"""Manifests: facts and checksums of a folder, block by block, alone and shared by processes."""

import json
import zlib

import numpy as np
import pytest

from jaxdistill.errors import DamagedError
from jaxdistill.safe import manifest


def test_a_manifest_tells_facts_and_every_kind_of_damage(tmp_path):
    (tmp_path / "a").write_bytes(b"0" * 100)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"1")
    manifest.seal(tmp_path, {"fact": [1, None, "x"]})
    content = manifest.verify(tmp_path)
    assert content["fact"] == [1, None, "x"] and sorted(content["files"]) == ["a", "b/c"]
    for change, words in (
        (lambda: (tmp_path / "a").write_bytes(b"0" * 99 + b"1"), "a is changed"),
        (lambda: (tmp_path / "a").write_bytes(b"0" * 99), "a is changed .*: 99 bytes, not 100"),
        (lambda: (tmp_path / "a").unlink(), "a is missing"),
        (lambda: ((tmp_path / "a").write_bytes(b"0" * 100), (tmp_path / "d").touch()), "d is new"),
    ):
        change()
        with pytest.raises(DamagedError, match=words):
            manifest.verify(tmp_path)


def test_every_single_bit_of_a_manifest_is_guarded(tmp_path):
    (tmp_path / "a").write_bytes(b"0")
    manifest.seal(tmp_path, {"step": 7})
    file = tmp_path / manifest.NAME
    whole = file.read_bytes()
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        # A bit that only moves white space leaves the content as it was, and is no damage.
        try:
            content = manifest.verify(tmp_path)
        except DamagedError:
            continue
        assert content == json.loads(whole)["content"]
        assert damaged.split() == whole.split() or damaged[place // 8 : place // 8 + 1].isspace()


def _filled(folder, sizes):
    content = {f"{n}": np.random.default_rng(n).bytes(size) for n, size in enumerate(sizes)}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return content


def test_every_block_has_the_standard_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK", 1000)
    monkeypatch.setattr(manifest, "_PIECE", 300)  # no divisor of a block
    content = _filled(tmp_path, (0, 1, 999, 1000, 1001, 3456))
    manifest.seal(tmp_path, {})
    for name, data in content.items():
        sums = [zlib.crc32(data[start : start + 1000]) for start in range(0, len(data), 1000)]
        assert manifest.read(tmp_path)["files"][name] == {"bytes": len(data), "crc32": sums}


@pytest.mark.parametrize("parts", [1, 2, 3, 20])
def test_one_process_of_all_finds_a_flipped_bit_and_names_its_block(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(manifest, "BLOCK", 1000)
    content = _filled(tmp_path, (0, 2500, 1000, 10))
    manifest.seal(tmp_path, {})
    monkeypatch.undo()  # the manifest tells how large its blocks are
    for name, data in content.items():
        for start in range(0, len(data), 1000):
            place = min(start + 777, len(data) - 1)
            damaged = bytearray(data)
            damaged[place] ^= 1 << start % 8
            (tmp_path / name).write_bytes(damaged)
            found = []
            for part in range(parts):
                try:
                    manifest.verify(tmp_path, part, parts)
                except DamagedError as error:
                    found.append(str(error))
            end = min(start + 1000, len(data))
            (text,) = found
            assert text.endswith(f"{name} is changed since it was saved, in bytes {start} to {end}")
        (tmp_path / name).write_bytes(data)
    assert manifest.verify(tmp_path)["files"].keys() == content.keys()


def test_a_read_that_fails_once_is_no_damage(tmp_path, monkeypatch):
    _filled(tmp_path, (10,))
    manifest.seal(tmp_path, {})
    monkeypatch.setattr(manifest, "_WAITS", (0.0, 0.0))
    sums, failures = manifest._sums, [OSError(5, "Input/output error")] * 2

    def read(*given):
        if failures:
            raise failures.pop()
        return sums(*given)

    monkeypatch.setattr(manifest, "_sums", read)
    assert manifest.verify(tmp_path)["files"]["0"]["bytes"] == 10
    failures += [OSError(5, "Input/output error")] * 3
    with pytest.raises(DamagedError, match="cannot be read: .*Input/output error"):
        manifest.verify(tmp_path)


def test_a_manifest_from_before_blocks_is_still_good(tmp_path):
    content = _filled(tmp_path, (0, 5000))
    files = {name: {"bytes": len(d), "crc32": zlib.crc32(d)} for name, d in content.items()}
    inner = {"step": 3, "files": files}
    text = json.dumps(inner, sort_keys=True).encode()
    (tmp_path / manifest.NAME).write_text(json.dumps({"crc32": zlib.crc32(text), "content": inner}))
    assert manifest.verify(tmp_path) == inner
    (tmp_path / "1").write_bytes(b"x" + content["1"][1:])
    with pytest.raises(DamagedError, match="1 is changed"):
        manifest.verify(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"crc32": 1}'])
def test_another_file_by_that_name_is_no_manifest(tmp_path, text):
    (tmp_path / manifest.NAME).write_text(text)
    with pytest.raises(DamagedError, match=r"manifest.json: is damaged: it"):
        manifest.read(tmp_path)
