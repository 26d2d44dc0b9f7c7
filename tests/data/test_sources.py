import builtins
import bz2
import gzip
import json
import lzma
import tracemalloc

import pytest

from jaxdistill.data import files, parquet, parquet_pages
from jaxdistill.data.records import Record, Rejected
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError


def texts(source):
    return [item.texts[0] for item in source if isinstance(item, Record)]


def rejected(source):
    return [(item.line, item.reason) for item in source if isinstance(item, Rejected)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "bad JSON"),
        (b"[" * 200_000, "bad JSON"),
        (b"1" * 10_000, "bad JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        (b'{"text": "a\x00b"}', "bad JSON"),
        (b'{"text": "a\\u0000b"}', "NUL"),
        (b'{"text": "\\ud83d"}', "lone surrogate"),
        (b'\xef\xbb\xbf{"text": "a"}', "BOM"),
        (b'{"text": "' + b"x" * 10_000_000 + b'"}', "too large: more than 10 MB in one line"),
        (b'"text"', "not an object: got str"),
        (b"null", "not an object: got NoneType"),
    ],
)
def test_a_broken_line_is_rejected_and_its_neighbours_stay(jsonl, line, reason):
    path = jsonl([{"text": "before"}, line, {"text": "after"}])
    source = open_source(path)
    assert texts(source) == ["before", "after"]
    [(number, why)] = rejected(source)
    assert number == 2 and reason in why


def test_a_line_is_measured_without_its_end(jsonl):
    fits = b'{"text": "' + b"x" * (10_000_000 - 12) + b'"}'
    assert len(fits) == 10_000_000
    for end in (b"", b"\r"):
        assert rejected(open_source(jsonl([fits + end, {"text": "a"}]))) == []


def test_bom_crlf_blank_lines_and_a_missing_last_line_end_are_harmless(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \t\n{"text": "b"}')
    source = open_source(path)
    assert [(item.line, item.texts[0]) for item in source] == [(1, "a"), (4, "b")]


def test_reading_twice_gives_the_same(jsonl):
    source = open_source(jsonl([{"text": "a"}, b"{", {"text": "b"}]))
    assert list(source) == list(source)


def test_auto_takes_the_first_kind_and_refuses_a_second_one(jsonl):
    mixed = [{"nothing": 1}, {"text": "a"}, {"prompt": "a", "completion": "b"}]
    path = jsonl(mixed)
    with pytest.raises(DataError, match=r"data.jsonl:3: mixed kinds.*line 2 is 'text'.*format"):
        list(open_source(path))
    named = open_source(path, "text")
    assert texts(named) == ["a"]
    assert [line for line, _ in rejected(named)] == [1, 3]
    assert "expected `text`, `messages`" in rejected(open_source(jsonl([{"nothing": 1}])))[0][1]


def test_a_record_of_two_kinds_asks_for_the_format(jsonl):
    path = jsonl([{"text": "a", "prompt": "b", "completion": "c"}])
    with pytest.raises(DataError, match="fields of text and completion: say which"):
        list(open_source(path))
    assert texts(open_source(path, "completion")) == ["b"]


def test_what_cannot_be_opened_says_why(tmp_path, jsonl):
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        open_source(tmp_path / "nowhere.jsonl")
    for name in ("a.xlsx", "a.parquet.gz", "a"):
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match="cannot be read: use .jsonl"):
            open_source(tmp_path / name)
    with pytest.raises(DataError, match="format 'chat' is unknown"):
        open_source(jsonl([]), "chat")
    with pytest.raises(DataError, match="'plain' is for text files"):
        open_source(jsonl([]), "plain")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="read as plain or paragraphs, got format 'messages'"):
        open_source(tmp_path / "a.txt", "messages")


def test_a_text_file_is_one_document_or_one_of_each_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \nthree\n")
    assert texts(open_source(path)) == ["one\ntwo\n\n \nthree"]
    paragraphs = list(open_source(path, "paragraphs"))
    assert [(item.line, item.texts[0]) for item in paragraphs] == [(1, "one\ntwo"), (5, "three")]
    assert all(item.opens and item.closes for item in paragraphs)


@pytest.mark.parametrize("format", ["plain", "paragraphs"])
def test_a_long_text_comes_in_pieces_that_join_to_the_whole(tmp_path, monkeypatch, format):
    monkeypatch.setattr(files, "PIECE_BYTES", 30)
    lines = [f"line {number} of a text" for number in range(20)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines) + "\n\nlast\n")
    pieces = list(open_source(path, format))
    whole = "".join(piece.texts[0] for piece in pieces)
    joint = "" if format == "paragraphs" else "\n\n"
    assert whole == "\n".join(lines) + joint + "last"
    first = pieces if format == "plain" else pieces[:-1]
    assert len(first) > 5
    assert [piece.opens for piece in first] == [True] + [False] * (len(first) - 1)
    assert [piece.closes for piece in first] == [False] * (len(first) - 1) + [True]
    for piece in first:
        assert whole.count(piece.texts[0]) == 1
        if piece.line <= 20:
            assert piece.texts[0].startswith(lines[piece.line - 1])


def test_bad_text_is_rejected_by_piece(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nb\xffd\n\nnul\x00\n\nfine")
    source = open_source(path, "paragraphs")
    assert texts(source) == ["good", "fine"]
    assert rejected(source) == [(3, "invalid UTF-8 at byte 1"), (5, "contains a NUL character")]
    path.write_bytes(b" \n\n")
    assert rejected(open_source(path)) == [(1, "empty: no text")]
    path.write_bytes(b"a\n" + b"x" * 10_000_001 + b"\nb")
    assert texts(open_source(path)) == ["a\nb"]
    assert rejected(open_source(path))[0][0] == 2


def test_parquet_rows_are_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    write = pytest.importorskip("pyarrow.parquet").write_table
    path = tmp_path / "a.parquet"
    turn = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "x"}]
    table = pyarrow.table(
        {"messages": [turn, None, [{"role": "user", "content": None}]], "n": [1] * 3}
    )
    write(table, path)
    source = open_source(path)
    [record] = [item for item in source if isinstance(item, Record)]
    assert (record.texts, record.roles) == (("hi", "x"), ("user", "assistant"))
    assert [line for line, _ in rejected(source)] == [2, 3]
    # A null is a field that is not there.
    columns = {"messages": [turn, None], "text": [None, "b"]}
    write(pyarrow.table(columns), path)
    with pytest.raises(DataError, match="mixed kinds"):
        list(open_source(path))
    bad = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.binary()).view(pyarrow.string())
    write(pyarrow.table({"text": bad}), path)
    assert texts(open_source(path)) == ["a", "c"]
    assert rejected(open_source(path)) == [(2, "invalid UTF-8")]
    with pytest.raises(DataError, match="no columns for messages: found text"):
        list(open_source(path, "messages"))
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(open_source(path))


def test_columns_that_may_have_to_be_refused_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    write = pytest.importorskip("pyarrow.parquet").write_table
    path = tmp_path / "a.parquet"
    table = {"prompt": ["a", "b", "c"], "completion": ["d", "e", "f"], "id": ["0", "1", "2"]}
    more = {"context": ["", "long", ""], "hasLoss": [None, None, False]}
    write(pyarrow.table({**table, **more}), path)
    source = open_source(path)
    good, lost, marked = source
    assert good.texts == ("a", "d") and source.unread >= {"id"}
    assert "write it into `prompt`" in lost.reason and "say `weight` 0 or 1" in marked.reason


@pytest.mark.parametrize("nested", [False, True])
def test_a_small_parquet_file_stays_small(tmp_path, nested):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    write = pytest.importorskip("pyarrow.parquet").write_table
    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64), ["ab " * 333_333])
    if nested:
        roles = pyarrow.array(["user", "assistant"] * 32)
        turns = pyarrow.StructArray.from_arrays([roles, long], ["role", "content"])
        offsets = [*range(0, 41, 2), 64, None, 64]  # rows of 2 MB, one of 24 MB, one that is null
        table = {"messages": pyarrow.ListArray.from_arrays(offsets, turns)}
    else:
        table = {"text": long}
    path = tmp_path / "a.parquet"
    write(pyarrow.table(table), path, compression="zstd")
    assert path.stat().st_size < 3000
    tracemalloc.start()
    count = sum(isinstance(item, Record) for item in open_source(path))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == (20 if nested else 64) and most < 50_000_000
    if nested:
        assert rejected(open_source(path))[0] == (21, "too large: more than 10 MB in one row")


def test_a_parquet_file_that_holds_too_much_is_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    write = pytest.importorskip("pyarrow.parquet").write_table
    write(pyarrow.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    for name, most in (("MAX_VALUES", 50), ("MAX_DECODED", 50), ("MAX_PAGE", 5)):
        with monkeypatch.context() as patch:
            patch.setattr(parquet, name, most)
            with pytest.raises(DataError, match="row group 0 holds 101 values"):
                list(open_source(tmp_path / "a.parquet"))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["zstd", "gzip", "snappy"])
def test_pages_are_measured_before_they_are_unpacked(tmp_path, version, compression):
    """A page of 108 MB in some kilobytes is refused; sizes are those that pyarrow wrote."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    writer = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    options = {
        "compression": compression,
        "use_dictionary": False,
        "data_page_version": version,
        "data_page_size": 1 << 30,
        "write_statistics": version == "1.0",
    }
    texts = ["ab " * 3000] * 300
    writer.write_table(pyarrow.table({"text": texts}), path, **options)
    chunk = writer.ParquetFile(path).metadata.row_group(0).column(0)
    found = list(
        parquet_pages.pages(path, parquet_pages.start_of(chunk), chunk.total_compressed_size)
    )
    assert sum(page.values for page in found) == 300
    plain = sum(len(text) + 4 for text in texts)
    assert plain <= sum(page.size for page in found) <= plain + 100
    assert len(list(open_source(path))) == 300
    writer.write_table(pyarrow.table({"text": texts * 40}), path, **options)
    if compression == "snappy":  # packs to a twentieth at best
        assert sum(1 for _ in open_source(path)) == 12_000
        return
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(DataError, match="a page of 10804.* bytes was packed into"):
        list(open_source(path))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_page_that_claims_to_be_small_is_not_believed(tmp_path):
    """What its header says counts, not what the end of the file says of all of them."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    writer = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    writer.write_table(pyarrow.table({"text": ["a"] * 10}), path)
    data = path.read_bytes()
    # A dictionary page of 2^31 - 1 bytes, packed into one, with one value; no header at all.
    huge = b"\x15\x04\x15\xfe\xff\xff\xff\x0f\x15\x02\x4c\x15\x02\x15\x00\x00\x00"
    for start in (huge, b"\xff" * 40):
        path.write_bytes(data[:4] + start + data[4 + len(start) :])
        with pytest.raises(DataError, match="header of a page|bytes was packed into"):
            list(open_source(path))
    with pytest.raises(ValueError, match="nested too deeply|is damaged"):
        path.write_bytes(b"\x1c" * 1000)
        list(parquet_pages.pages(path, 0, 1000))


def test_values_that_begin_as_the_one_before_are_made_a_few_at_a_time(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    writer = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = ["ab " * 333_333] * 64
    writer.write_table(
        pyarrow.table({"text": texts}),
        path,
        use_dictionary=False,
        compression="none",
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )
    assert path.stat().st_size < 1_500_000
    before = pyarrow.total_allocated_bytes()
    most, count = 0, 0
    for _ in open_source(path):
        most, count = max(most, pyarrow.total_allocated_bytes() - before), count + 1
    assert count == 64 and most < 100_000_000


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    original = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'jaxdistill\[parquet\]'"):
        list(open_source(tmp_path / "a.parquet"))


def test_the_digest_is_of_the_content_alone(jsonl):
    first = open_source(jsonl([{"text": "a"}], "a.jsonl"))
    same = open_source(jsonl([{"text": "a"}], "b.jsonl"))
    other = open_source(jsonl([{"text": "b"}], "c.jsonl"))
    assert first.digest() == same.digest() != other.digest()


def test_real_files(reference_data):
    pieces = texts(open_source(reference_data / "tinyshakespeare/input.txt"))
    raw = (reference_data / "tinyshakespeare/input.txt").read_text("utf-8")
    assert len(pieces) == 4 and "".join(pieces) == raw.removesuffix("\n")
    path = reference_data / "gsm8k/train.jsonl"
    lines = path.read_bytes().splitlines()
    reasons = rejected(open_source(path))
    assert len(reasons) == len(lines) == 7473
    assert all("found `question`, `answer`" in reason for _, reason in reasons)


LINES = b'{"text": "a b"}\n{"text": "c"}\n'
PACKED = {"jsonl": lambda data: data, "jsonl.gz": gzip.compress, "jsonl.bz2": bz2.compress,
          "ndjson.xz": lzma.compress}  # fmt: skip


@pytest.mark.parametrize("ending", PACKED)
def test_compressed_lines(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(PACKED[ending](LINES))
    assert texts(open_source(path)) == ["a b", "c"]
    if ending != "jsonl":
        for broken in (path.read_bytes()[:-5], b"nonsense"):
            path.write_bytes(broken)
            with pytest.raises(DataError, match="compression is damaged"):
                list(open_source(path))


@pytest.mark.parametrize("ending", sorted(set(PACKED) - {"jsonl"}))
def test_compressed_lines_under_another_name(tmp_path, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes(PACKED[ending](LINES))
    with pytest.raises(DataError, match=f"call it a.jsonl.{ending.split('.')[-1]}"):
        list(open_source(path))


def test_zstandard_and_compressed_text(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(pyarrow.compress(LINES, codec="zstd", asbytes=True))
    assert texts(open_source(path)) == ["a b", "c"]
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="compression is damaged"):
        list(open_source(path))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo"))
    assert texts(open_source(tmp_path / "a.txt.gz", "paragraphs")) == ["one", "two"]
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'jaxdistill\[parquet\]', or compress"):
        list(open_source(path))


def test_a_list_in_json_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 7)
    path = tmp_path / "a.json"
    rows = [{"text": f"é \\ ] [ {number}" * number} for number in range(1, 30)]
    for indent in (None, 2):
        path.write_text(" " + json.dumps(rows, indent=indent, ensure_ascii=indent is None) + "\n")
        source = open_source(path)
        assert texts(source) == [row["text"] for row in rows]
    assert [item.line for item in source][-1] == 29
    path.write_bytes(LINES)  # lines under another name
    assert texts(open_source(path)) == ["a b", "c"]
    path.write_text("[]")
    assert list(open_source(path)) == []
    for behind in ('[{"text": "b"}]', "\n\n" * 9 + "x"):
        path.write_text('[{"text": "a"}]\n' + behind)
        with pytest.raises(DataError, match="more stands behind the list of 1 records"):
            list(open_source(path))
    for broken, words in (
        ('[{"text": "a"}, {"te', "bad JSON behind record 1"),
        ('[{"text": "a"}', "behind record 1: the list is not closed"),
        ('{\n "data": [1]\n}', "one JSON object over several lines"),
        ("[" * 200_000, "nested too deeply"),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=words):
            list(open_source(path))
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="invalid UTF-8"):
        list(open_source(path))


def test_tables_of_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,id\r\n"a ""b\nx",1\r\nc,2\nz\n,3\n\xff,4\n')
    source = open_source(path)
    assert texts(source) == ['a "b\nx', "c"] and source.unread == {"id"}
    assert rejected(source) == [
        (5, "has 1 cells, but the first row names 2 fields"),
        (6, "empty: field `text` has no text"),
        (7, "invalid UTF-8"),
    ]
    other = tmp_path / "a.tsv"
    other.write_text('messages\tweight\n"[{""role"": ""assistant"", ""content"": ""hi""}]"\t1\n')
    assert texts(open_source(other)) == ["hi"]
    turns = lambda role: f'"[{{""role"": ""{role}"", ""content"": ""hi""}}]"'
    other.write_text(f"prompt\tcompletion\n{turns('user')}\t{turns('assistant')}\nq\t[1]\n")
    dialogue, plain = open_source(other)
    assert (dialogue.roles, dialogue.texts) == (("user", "assistant"), ("hi", "hi"))
    assert plain.texts == ("q", "[1]")  # an answer may be JSON
    for broken in ("text,text\na,b\n", "", 'text\n"a\n'):
        path.write_text(broken)
        with pytest.raises(DataError, match="must name the fields, each once|not a readable table"):
            list(open_source(path))


def test_folders_and_patterns(tmp_path):
    for name, content in {
        "d/b.jsonl": '{"text": "b"}', "d/sub/a.csv": "text\na\n", "d/README.md": "words",
        "d/LICENSE.txt": "words", "d/x.bin": "x", "d/.hidden/c.jsonl": '{"text": "no"}',
        "e/a.txt": "one", "e/b.md": "two", "mixed/a.txt": "x", "mixed/b.jsonl": "{}",
        "none/x.bin": "x", "model/config.json": "{}",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = open_source(tmp_path / "d")
    assert texts(found) == ["b", "a"] and len(found.parts) == 2
    assert "3 files in it are not read: LICENSE.txt, README.md, x.bin" in found.notes[0]
    assert texts(open_source(tmp_path / "e")) == ["one", "two"]
    assert texts(open_source(f"{tmp_path}/**/*.csv")) == ["a"]
    for name, words in {
        "mixed": "files of text .a.txt. and of records .b.jsonl.: name the ones to read",
        "none": "folder without files that can be read",
        "model": "is a folder of a model",
        "*.nothing": "no file matches",
    }.items():
        with pytest.raises(DataError, match=words):
            open_source(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json"])
def test_other_encodings_are_called_by_their_name(tmp_path, encoding, name):
    path = tmp_path / name
    path.write_bytes(('{"text": "hello"}\n' * 2).encode(encoding))
    with pytest.raises(DataError, match=rf"written in {encoding[:6].upper()}, not in UTF-8: iconv"):
        list(open_source(path))


def test_data_sets_of_the_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")
    made = datasets.Dataset.from_dict({"text": ["a", None, "c"], "id": [1, 2, 3]})
    made.save_to_disk(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path}/saved")
    assert texts(source) == ["a", "c"] and source.unread == {"id"}
    assert rejected(source) == [(2, "empty: field `text` is null")]
    split = datasets.DatasetDict({"train": made, "test": made.select([0])})
    split.save_to_disk(tmp_path / "parts")
    part = open_source(f"hf:{tmp_path}/parts?split=test", "text")
    assert texts(part) == ["a"] and part.digest() != source.digest()
    (tmp_path / "files").mkdir()
    (tmp_path / "files/train.jsonl").write_bytes(LINES)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert texts(open_source(f"hf:{tmp_path}/files")) == ["a b", "c"]
    with pytest.raises(DataError, match="cannot be read as a data set"):
        list(open_source(f"hf:{tmp_path}/parts?split=none"))


def test_a_name_on_the_hub_needs_leave_and_its_options_are_known(tmp_path):
    with pytest.raises(DataError, match="security.allow_network: true"):
        open_source("hf:org/name")
    with pytest.raises(DataError, match="write it as hf:NAME"):
        open_source(f"hf:{tmp_path}?spilt=train")
    with pytest.raises(DataError, match="'plain' is for text files"):
        open_source(f"hf:{tmp_path}", "plain")
