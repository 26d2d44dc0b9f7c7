"""Files are hashed once: known by size and times afterwards, and never taken for what they were."""

import hashlib
import json
import os
import time

import pytest

from jaxdistill.data import digests, pipeline

DATA = b'{"text": "a line of text"}\n' * 40


@pytest.fixture
def reads(monkeypatch):
    """Every file counts as large; the names of those that are read."""
    seen, read = [], digests._read
    monkeypatch.setattr(digests, "_WORTH", 1)
    monkeypatch.setattr(digests, "_read", lambda path: seen.append(path.name) or read(path))
    return seen


@pytest.fixture
def settled(monkeypatch):
    """What was written just now lies long ago."""
    monkeypatch.setattr(digests, "_SETTLED", -1.0)


def hashed(path, cache):
    with digests.kept_in(cache):
        return digests.of(path)


def test_a_file_is_read_once_and_again_when_it_may_have_changed(tmp_path, reads, settled):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(DATA)
    right = hashlib.sha256(DATA).hexdigest()
    assert [hashed(path, cache) for _ in range(3)] == [right] * 3 and len(reads) == 1
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    other = DATA.replace(b"line", b"lime")
    path.write_bytes(other)  # of the same size
    os.utime(path, ns=times)  # and with the old time, as `cp -p` and `touch -d` give it
    assert hashed(path, cache) == hashlib.sha256(other).hexdigest() != right
    copy = tmp_path / "b.jsonl"
    copy.write_bytes(DATA)
    os.replace(copy, path)  # another file in its place
    assert hashed(path, cache) == right and len(reads) == 3
    assert hashed(path, tmp_path / "other") == right and len(reads) == 4
    assert digests.of(path) == right and len(reads) == 5  # nobody says where to keep it


def test_what_was_written_just_now_is_not_kept(tmp_path, reads):
    path = tmp_path / "a.jsonl"
    path.write_bytes(DATA)
    assert time.time() - path.stat().st_mtime < digests._SETTLED
    for count in (1, 2):
        hashed(path, tmp_path)
        assert len(reads) == count
    assert not (tmp_path / digests.FILE).exists()


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"%s": 3}', '{"%s": [1, 2]}', "\x00"])
def test_a_damaged_list_is_written_anew(tmp_path, reads, settled, damage):
    path = tmp_path / "a.jsonl"
    path.write_bytes(DATA)
    (tmp_path / digests.FILE).write_text(damage.replace("%s", str(path)))
    for _ in range(2):
        assert hashed(path, tmp_path) == hashlib.sha256(DATA).hexdigest()
    assert len(reads) == 1
    assert list(json.loads((tmp_path / digests.FILE).read_text())) == [str(path)]


def test_a_data_set_is_opened_without_reading_its_sources(tmp_path, byte_tokenizer, reads, settled):
    path = tmp_path / "a.jsonl"
    path.write_bytes(DATA)
    build = lambda **options: pipeline.build(
        path, byte_tokenizer, seq_len=16, cache_dir=tmp_path / "cache", **options
    )
    first = build()
    assert build().fingerprint == first.fingerprint and reads == ["a.jsonl"]
    build(packing="none")
    assert reads == ["a.jsonl"]
    path.write_bytes(DATA + DATA)
    assert build().fingerprint != first.fingerprint and reads == ["a.jsonl"] * 2
