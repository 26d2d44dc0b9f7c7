import builtins
import tracemalloc

import pytest

from jaxdistill.data import parquet, sources
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
    with pytest.raises(DataError, match="is a folder"):
        open_source(tmp_path)
    for ending, hint in ((".json", "write a JSON list as .jsonl"), (".csv", "use .jsonl")):
        (tmp_path / f"a{ending}").write_text("x")
        with pytest.raises(DataError, match=hint):
            open_source(tmp_path / f"a{ending}")
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
    monkeypatch.setattr(sources, "PIECE_BYTES", 40)
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


def test_a_parquet_file_that_claims_too_much_is_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    write = pytest.importorskip("pyarrow.parquet").write_table
    write(pyarrow.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    for name in ("MAX_VALUES", "MAX_DECODED"):
        with monkeypatch.context() as patch:
            patch.setattr(parquet, name, 50)
            with pytest.raises(DataError, match="row group 0 claims 100 values"):
                list(open_source(tmp_path / "a.parquet"))


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
    assert len(pieces) == 5 and "".join(pieces) == raw.removesuffix("\n")
    path = reference_data / "gsm8k/train.jsonl"
    lines = path.read_bytes().splitlines()
    reasons = rejected(open_source(path))
    assert len(reasons) == len(lines) == 7473
    assert all("found `question`, `answer`" in reason for _, reason in reasons)
