import copy
import json
import logging
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxdistill.data import pipeline
from jaxdistill.data.sources import open_source
from jaxdistill.errors import ConfigError, DataError, StorageError


@pytest.fixture
def build(tmp_path, byte_tokenizer):
    def make(sources, **options):
        options = {"seq_len": 16, "cache_dir": tmp_path / "cache", **options}
        return pipeline.build(sources, byte_tokenizer, **options)

    return make


def talk(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def is_good(line):
    """The rules for one line of text records, written a second time."""
    try:
        value = json.loads(line.decode("utf-8"))
        text = value["text"] if isinstance(value, dict) else None
        return isinstance(text, str) and bool(text.strip()) and "\0" not in text and bool(
            text.encode("utf-8")
        )  # fmt: skip
    except (ValueError, KeyError, RecursionError):
        return False


LINES = st.one_of(
    st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(st.characters(), max_size=10).map(lambda text: json.dumps({"text": text}).encode()),
    st.sampled_from(
        [
            b"", b" ", b"{", b"[]", b"null", b"[" * 5000, b'{"text": "\\ud800"}', b'{"text": 1}',
            b'{"text": "\\u0000"}', b"\xef\xbb\xbf", b'\xef\xbb\xbf{"text": "a"}', b"\xff\xfe",
            b'{"text": "a"}\r', b"9" * 5000, b'{"text": "<|end|>"}', b'{"text": NaN}',
            b'{"txt": "a"}', b'{"text": "a", "text": ""}', b'{"text": " "}', b'"\\ud800"',
        ]
    ),
    st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"")),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "messages", "a"]), inner, max_size=3),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
)  # fmt: skip


@settings(max_examples=120)
@given(lines=st.lists(LINES, max_size=40))
def test_any_file_is_used_and_quarantined_to_the_last_line(lines, tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    bare = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    records = {n: line for n, line in enumerate(bare, start=1) if line.strip(b" \t\r")}
    good = {number for number, line in records.items() if is_good(line)}
    options = {
        "seq_len": 16,
        "cache_dir": folder,
        "max_bad_fraction": 1.0,
        "quarantine_path": folder / "bad.jsonl",
    }
    source = open_source(path, "text")
    if path.read_bytes().startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        with pytest.raises(DataError, match="written in UTF-(16|32)"):
            pipeline.build(source, byte_tokenizer, **options)
        return
    packed = (b"\x1f\x8b", b"BZh91AY&SY", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
    if path.read_bytes().startswith(packed):
        with pytest.raises(DataError, match="data under another ending"):
            pipeline.build(source, byte_tokenizer, **options)
        return
    if not good:
        with pytest.raises(DataError, match="none of the|is empty"):
            pipeline.build(source, byte_tokenizer, **options)
        return
    dataset = pipeline.build(source, byte_tokenizer, **options)
    assert (dataset.records, dataset.used) == (len(records), len(good))
    left_out = dataset.quarantined + dataset.empty
    assert left_out == len(records) - len(good)
    if left_out:
        bad = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
        assert [entry["line"] for entry in bad] == sorted(set(records) - good)
        assert all(entry["file"] == str(path) and entry["reason"] for entry in bad)


@settings(max_examples=60)
@given(data=st.data())
def test_any_conversations_are_used_or_quarantined(data, tmp_path_factory, byte_tokenizer):
    role = st.sampled_from(["user", "assistant", "system", "tool", "wizard", 3])
    content = st.sampled_from(["a", "", "<|im_end|>", "\ue0001\ue001", None, ["x"], "\0", "b" * 30])
    message = st.fixed_dictionaries({"role": role, "content": content}) | st.just({"role": "user"})
    record = st.fixed_dictionaries({"messages": st.lists(message, max_size=4)})
    records = data.draw(st.lists(record, min_size=1, max_size=20))
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    try:
        dataset = pipeline.build(
            path, byte_tokenizer, seq_len=64, loss_on="assistant", cache_dir=folder,
            max_bad_fraction=1.0,
        )  # fmt: skip
    except DataError as error:
        assert "none of the" in str(error)
    else:
        assert dataset.records == len(records)
        assert dataset.records == dataset.used + dataset.quarantined + dataset.empty
        assert all(row["mask"].any() for row in dataset)


def test_too_many_bad_records_are_an_error_with_reasons(build, jsonl, tmp_path):
    lines = [{"text": "a"}] * 96 + [b"{", {"text": 1}, {"no": 1}, {"text": "\0"}]
    path, bad = jsonl(lines), tmp_path / "bad.jsonl"
    with pytest.raises(DataError) as caught:
        build(path, max_bad_fraction=0.03, quarantine_path=bad)
    message = str(caught.value)
    assert "4 of 100 records (4.00%)" in message and str(bad) in message
    assert f"{path}:97: bad JSON" in message and f"{path}:99: missing field" in message
    assert ":100:" not in message
    assert caught.value.exit_code == 3
    assert len(bad.read_text().splitlines()) == 4
    # Exactly the allowed share passes, also from the cache.
    for _ in range(2):
        assert build(path, max_bad_fraction=0.04).used == 96


def test_reasons_cannot_steer_the_terminal(build, jsonl, tmp_path):
    path = jsonl([{"\x1b[2J\ud800\n" + "x" * 99: 1}])
    with pytest.raises(DataError) as caught:
        build(path, quarantine_path=tmp_path / "bad.jsonl")
    assert str(caught.value).isprintable() and "`\\x1b[2J\\ud800\\nxxx" in str(caught.value)
    assert "x" * 60 not in str(caught.value)


def test_fail_stops_at_the_first_bad_record(build, jsonl):
    path = jsonl([{"text": "a"}] * 9 + [b"{"])
    with pytest.raises(DataError, match=r"data.jsonl:10: bad JSON.*on_bad_record is 'fail'"):
        build(path, on_bad_record="fail", max_bad_fraction=1.0)
    assert build(path, max_bad_fraction=0.5).quarantined == 1
    with pytest.raises(DataError, match="1 of 10 records"):
        build(path, on_bad_record="fail", max_bad_fraction=1.0)
    assert build(jsonl([{"text": "a"}]), on_bad_record="fail").used == 1


def test_nothing_to_learn_from(build, jsonl, tmp_path):
    with pytest.raises(DataError, match="the data set is empty"):
        build(jsonl([]))
    with pytest.raises(DataError, match="the data set is empty"):
        build(jsonl([b"", b" \r"]))
    with pytest.raises(DataError, match="no files are given"):
        build([])
    with pytest.raises(DataError, match="no such file"):
        build([jsonl([{"text": "a"}]), tmp_path / "gone.jsonl"])
    with pytest.raises(DataError, match="none of the 1 records.*no token counts in the loss"):
        build(jsonl([talk(("user", "hi"))]), loss_on="assistant", max_bad_fraction=1.0, seq_len=64)
    long = talk(("user", "x" * 100), ("assistant", "y"))
    with pytest.raises(DataError, match=r"within the first 64 tokens \(seq_len\)"):
        build(jsonl([long]), loss_on="assistant", max_bad_fraction=1.0, seq_len=64)
    with pytest.raises(DataError, match="none of the 2 records"):
        build(jsonl([b"{", b"["]), quarantine_path=tmp_path / "quarantine" / "bad.jsonl")
    assert len((tmp_path / "quarantine" / "bad.jsonl").read_text().splitlines()) == 2
    assert not list((tmp_path / "cache").glob("train-*"))


def test_kinds_do_not_mix_and_fit_the_mask(build, jsonl):
    text, chat = jsonl([{"text": "a"}], "a.jsonl"), jsonl([talk(("assistant", "x"))], "b.jsonl")
    with pytest.raises(DataError, match=r"mixed kinds.*a.jsonl holds 'text'.*b.jsonl.*'messages'"):
        build([text, chat])
    with pytest.raises(DataError, match="'assistant' needs records of kind messages.*use all"):
        build(text, loss_on="assistant")
    with pytest.raises(DataError, match="'completion' needs.*holds 'messages': use all or assist"):
        build(chat, loss_on="completion")


def test_wrong_settings_name_the_field(build, jsonl):
    path = jsonl([{"text": "a"}])
    for field, value in {
        "seq_len": 1,
        "packing": "first",
        "loss_on": "user",
        "long_documents": "drop",
        "turns": "all",
        "special_tokens": "keep",
        "on_bad_record": "skip",
        "max_bad_fraction": 1.5,
    }.items():
        with pytest.raises(ConfigError, match=f"data.{field}: {value!r}"):
            build(path, **{field: value})


def test_long_documents(build, jsonl, caplog):
    lines = [{"prompt": "q", "completion": "a" * 40}, {"prompt": "q", "completion": "b"}]
    path = jsonl(lines)
    with caplog.at_level(logging.WARNING):
        cut = build(path)
    assert (cut.truncated, cut.num_tokens) == (1, 16 + 3)
    assert "1 of 2 documents were longer than seq_len 16" in cut.notices[0]
    assert "1 of 2 documents" in caplog.text
    split = build(path, long_documents="split")
    assert (split.truncated, split.num_tokens, split.notices) == (0, 42 + 3, ())
    refused = build(path, long_documents="reject")
    assert (refused.used, refused.quarantined, refused.too_long) == (1, 0, 1)
    with pytest.raises(DataError, match="too long: 42 tokens, seq_len is 16"):
        build(jsonl(lines[:1], "long.jsonl"), long_documents="reject")
    text = build(jsonl([{"text": "a" * 40}], "t.jsonl"))
    assert (text.truncated, text.num_tokens) == (0, 41)
    assert build(jsonl([{"text": "a" * 15}], "t.jsonl"), long_documents="truncate").truncated == 0


@pytest.fixture
def fingerprints(jsonl, tmp_path, byte_tokenizer):
    def of(data=b'{"text": "abc"}\n{"text": "d"}\n', tokenizer=byte_tokenizer, **options):
        path = tmp_path / f"{random.random()}.jsonl"
        path.write_bytes(data)
        options = {"seq_len": 16, "cache_dir": tmp_path / "cache", **options}
        return pipeline.build(path, tokenizer, **options).fingerprint

    return of


def test_the_fingerprint_sees_every_byte_and_setting(fingerprints, byte_tokenizer, bpe_tokenizer):
    base = fingerprints()
    retold = copy.deepcopy(byte_tokenizer)
    retold.chat_template += "."
    assert base == fingerprints()
    others = [
        fingerprints(b'{"text": "abd"}\n{"text": "d"}\n'),
        fingerprints(b'{"text": "abc"}\n{"text": "d"} \n'),
        fingerprints(b'{"text": "d"}\n{"text": "abc"}\n'),
        fingerprints(tokenizer=bpe_tokenizer),
        fingerprints(tokenizer=retold),
        fingerprints(seq_len=17),
        fingerprints(packing="none"),
        fingerprints(long_documents="truncate"),
        fingerprints(special_tokens="parse"),
    ]
    assert len({base, *others}) == len(others) + 1
    # What does not change the rows does not change the fingerprint.
    same = fingerprints(max_bad_fraction=0.5, name="eval", on_bad_record="fail")
    assert same == base


def test_the_order_of_files_counts(build, jsonl):
    a, b = jsonl([{"text": "a"}], "a.jsonl"), jsonl([{"text": "b"}], "b.jsonl")
    assert build([a, b]).fingerprint != build([b, a]).fingerprint


def test_the_cache_is_reused_and_a_damaged_one_rebuilt(build, jsonl, tmp_path, monkeypatch, caplog):
    path = jsonl([{"text": "abc"}, b"{"])
    first = build(path, max_bad_fraction=0.5)
    rows = [row["tokens"].tolist() for row in first]
    cache = first.folder.parent
    (shard,) = cache.glob("tokens-*")
    files = {name: name.read_bytes() for name in cache.glob("*/*")}
    stamps = {name: name.stat().st_mtime_ns for name in files}
    moved = jsonl([{"text": "abc"}, b"{"], "moved.jsonl")
    again = build(moved, max_bad_fraction=0.5, quarantine_path=tmp_path / "q.jsonl")
    assert again.folder == first.folder and again.notices == ()
    assert stamps == {name: name.stat().st_mtime_ns for name in cache.glob("*/*")}
    # The quarantine names the file as it is called now.
    assert json.loads((tmp_path / "q.jsonl").read_text())["file"] == str(moved)
    for damaged in (shard / "tokens.npy", first.folder / "segments.npy"):
        damaged.write_bytes(files[damaged][:-1] + b"\x07")
        with caplog.at_level(logging.WARNING):
            rebuilt = build(path, max_bad_fraction=0.5)
        assert f"{damaged.name} is changed" in rebuilt.notices[0]
        assert "was built again" in caplog.text
        assert [row["tokens"].tolist() for row in rebuilt] == rows
        assert files == {name: name.read_bytes() for name in cache.glob("*/*")}
    assert {item.name for item in cache.iterdir()} == {shard.name, first.folder.name}


def test_building_twice_gives_the_same_bytes(build, jsonl, tmp_path):
    rng = random.Random(0)
    path = jsonl([{"text": "x" * rng.randint(1, 40)} for _ in range(200)])
    one, two = build(path, cache_dir=tmp_path / "1"), build(path, cache_dir=tmp_path / "2")
    for file in one.folder.iterdir():
        assert file.read_bytes() == (two.folder / file.name).read_bytes()


def test_a_cache_that_cannot_be_written(build, jsonl, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="cache.*cannot be written"):
        build(jsonl([{"text": "a"}]))


def test_many_records_cross_the_batches(build, jsonl, byte_tokenizer):
    texts = [f"record {number}" for number in range(1300)]
    dataset = build(jsonl([{"text": text} for text in texts]), packing="none")
    assert dataset.num_documents == len(dataset) == 1300
    for index in (0, 511, 512, 1299):
        row = dataset[index]
        kept = row["tokens"][row["segment_ids"] > 0]
        assert byte_tokenizer.decode(kept) == f"{texts[index]}<|end|>"


def test_notices(build, jsonl, tmp_path, byte_tokenizer):
    mute = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% generation %}{{ m.content }}"
        "{% endgeneration %}<|im_end|>{% endfor %}"
    )
    path = jsonl([talk(("user", "a"), ("assistant", "b"))])
    dataset = build(path, loss_on="assistant", chat_template=mute, seq_len=64)
    assert "not taught when to stop" in dataset.notices[0]
    assert build(path, loss_on="assistant", seq_len=64).notices == ()


def test_real_questions(reference_data, build, tmp_path):
    """GSM8K as prompts and completions: every record is used, every answer counts in full."""
    lines = (reference_data / "gsm8k/test.jsonl").read_bytes().splitlines()
    rows = [json.loads(line) for line in lines]
    path = tmp_path / "gsm8k.jsonl"
    with path.open("w") as file:
        for row in rows:
            pair = {"prompt": row["question"] + "\n", "completion": row["answer"]}
            file.write(json.dumps(pair) + "\n")
    dataset = build(path, seq_len=4096, loss_on="completion")
    assert (dataset.records, dataset.used, dataset.truncated) == (len(rows), len(rows), 0)
    expected = sum(len(row["answer"].encode()) + 1 for row in rows)
    assert dataset.num_loss_tokens == expected
    assert dataset.fill() > 0.98


def test_empty_long_and_marked_records_are_counted_apart_from_broken_ones(build, jsonl, tmp_path):
    chat = lambda size, **more: {
        "messages": [
            {"role": "user", "content": "x" * size},
            {"role": "assistant", "content": "a"},
        ],
        **more,
    }
    lines = [chat(2)] * 6 + [chat(200), {"messages": []}, chat(2, weight=0), chat(2, id=7)]
    options = {"loss_on": "assistant", "seq_len": 64, "on_bad_record": "fail"}
    made = build(jsonl(lines), quarantine_path=tmp_path / "left.jsonl", **options)
    counts = (made.used, made.quarantined, made.empty, made.too_long, made.unlearned)
    assert counts == (7, 0, 1, 1, 1) and made.records == 10
    told = " ".join(made.notices)
    assert "1 of 10 records are empty" in told and "nothing to learn within seq_len" in told
    assert "marked as not learned" in told and "fields that are not read: `id`" in told
    assert len((tmp_path / "left.jsonl").read_text().splitlines()) == 3
    assert build(jsonl(lines), **options).notices == made.notices  # from the cache


RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
def test_text_that_is_rendered_already(build, jsonl, byte_tokenizer, special_tokens):
    path = jsonl([{"text": RENDERED}, {"text": "plain"}])
    made = build(path, seq_len=96, packing="none", special_tokens=special_tokens)
    tokens = made[0]["tokens"][made[0]["segment_ids"] > 0].tolist()
    if special_tokens == "text":
        assert "1 records hold special tokens as text, such as '<|im_start|>'" in made.notices[0]
        assert byte_tokenizer.convert_tokens_to_ids("<|im_start|>") not in tokens
    else:
        # No second end token behind the one that is there.
        assert tokens == byte_tokenizer(RENDERED)["input_ids"] and made.notices == ()
        plain = made[1]["tokens"][made[1]["segment_ids"] > 0].tolist()
        assert byte_tokenizer.decode(plain) == "plain<|end|>"
    pair = {"prompt": RENDERED.removesuffix("yo<|im_end|>\n"), "completion": "yo<|im_end|>\n"}
    made = build(
        jsonl([pair], "p.jsonl"), seq_len=96, loss_on="completion", special_tokens=special_tokens
    )
    learned = made[0]["targets"][made[0]["mask"]].tolist()
    whole = byte_tokenizer("yo<|im_end|>\n")["input_ids"]
    assert (learned == whole) is (special_tokens == "parse")


def test_settings_that_a_kind_cannot_have(build, jsonl):
    chat, text = jsonl([talk(("assistant", "x"))], "c.jsonl"), jsonl([{"text": "a"}])
    with pytest.raises(ConfigError, match="special_tokens: 'parse' is for text"):
        build(chat, special_tokens="parse")
    for field, value in (("chat_template", "x"), ("template_kwargs", {"a": 1})):
        with pytest.raises(ConfigError, match=f"data.{field}: has no effect on 'text'"):
            build(text, **{field: value})


@pytest.mark.parametrize(("weight", "copies"), [(1.0, 5), (2.0, 10), (2.5, 12), (0.5, 2), (0.1, 0)])
def test_the_weight_of_a_source_is_how_often_its_records_are_read(build, jsonl, weight, copies):
    ours = jsonl([{"text": f"a{number}"} for number in range(5)], "a.jsonl")
    sources = [open_source(ours, weight=weight), jsonl([{"text": "b"}], "b.jsonl")]
    made = build(sources, packing="none")
    assert (made.used, made.num_documents) == (6, copies + 1)
    with pytest.raises(DataError, match="weight 0.0: must be above 0"):
        open_source(ours, weight=0.0)


def test_the_files_of_a_folder_are_named_one_by_one(build, jsonl, tmp_path):
    (tmp_path / "d").mkdir()
    jsonl([{"text": "a"}], "d/a.jsonl")
    jsonl([b"{"], "d/b.jsonl")
    with pytest.raises(DataError, match=r"d/b.jsonl:1: bad JSON"):
        build(tmp_path / "d")
    jsonl([talk(("assistant", "x"))], "d/b.jsonl")
    with pytest.raises(DataError, match="mixed kinds.*a.jsonl holds 'text'.*b.jsonl:1 is 'messag"):
        build(tmp_path / "d")


def words(count):
    """A tokenizer of so many words, the last of which ends texts."""
    vocab = {f"w{i}": i for i in range(count)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"w{count - 1}")


@pytest.mark.parametrize("count", [1 << 16, (1 << 16) + 1])
def test_ids_take_16_bits_where_all_of_them_fit(tmp_path, jsonl, count):
    path = jsonl([{"text": f"w5 w{count - 2}"}])
    data = pipeline.build(path, words(count), seq_len=4, cache_dir=tmp_path / "cache")
    assert data[0]["tokens"][:3].tolist() == [5, count - 2, count - 1]
    assert data[0]["tokens"].dtype == np.int32
    bits = {2: np.uint16, 4: np.int32}[2 if count <= 1 << 16 else 4]
    (shard,) = data.folder.parent.glob("tokens-*")
    assert np.load(shard / "tokens.npy").dtype == bits


def test_no_mask_of_ones_is_kept(build, jsonl, tmp_path):
    pair = {"prompt": "ab", "completion": "cd"}
    for records, options, count in (
        ([{"text": "abcd"}], {}, 0),
        ([pair], {}, 0),
        ([pair], {"loss_on": "completion"}, 5),
        ([talk(("user", "a"), ("assistant", "b"))], {"seq_len": 64}, None),
    ):
        cache = tmp_path / f"cache-{len(options)}-{count}-{len(records[0])}"
        data = build(jsonl(records), cache_dir=cache, **options)
        (shard,) = cache.glob("tokens-*")
        kept = len(np.load(shard / "loss.npy"))
        assert kept == (data.num_tokens if count is None else count)
        row = data[0]
        counted = 4 if count == 0 else int(row["mask"].sum())
        assert row["mask"].sum() == counted == data.num_loss_tokens
        assert not row["mask"][data.num_tokens - 1 :].any()
