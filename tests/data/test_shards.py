"""Shards: what is tokenised once, what is tokenised again, and rows that no division changes."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.data import cutting, pipeline, shard_build, shards, tokenising
from jaxdistill.data.routes import TeacherRoutes
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.sources import Source, open_source
from jaxdistill.errors import DataError
from tests.data.test_tokenising import Here


@pytest.fixture
def taken(monkeypatch):
    """Every file is large; which were tokenised, by their texts."""
    seen, take = [], shard_build.ShardBuild.take

    def counted(work, index, batch, made):
        seen.extend(item.texts[0][0] for item in tokenising.good(batch))
        return take(work, index, batch, made)

    monkeypatch.setattr(shards, "_SMALL", 1)
    monkeypatch.setattr(shard_build.ShardBuild, "take", counted)
    return seen


@pytest.fixture
def files(jsonl):
    """Three files, whose texts begin with their letter."""
    return [
        jsonl([{"text": letter * size} for size in (3, 40, 9)], f"{letter}.jsonl")
        for letter in "abc"
    ]


def test_rows_of_another_length_and_one_more_file_tokenise_nothing_again(
    taken, files, tmp_path, byte_tokenizer
):
    def build(sources, tokenizer=byte_tokenizer, **options):
        taken.clear()
        options = {"seq_len": 16, "cache_dir": tmp_path / "cache", **options}
        pipeline.build(sources, tokenizer, **options)
        return "".join(sorted(set(taken)))

    assert build(files[:2]) == "ab"
    for options in ({"seq_len": 8}, {"packing": "none"}, {"long_documents": "reject"},
                    {"name": "eval"}, {"max_bad_fraction": 0.5}):  # fmt: skip
        assert build(files[:2], **options) == ""
    assert build([files[2], *files[:2]]) == "c"
    assert build([files[1], open_source(files[0], weight=3, origin="teacher")]) == ""
    # What decides which tokens there are makes others.
    assert build(files[:1], special_tokens="parse") == "a"
    view = {"second": SecondView(byte_tokenizer, 24)}
    assert build(files[:1], **view) == "a" and build(files[:1], **view) == ""
    assert build(files[:1], seq_len=8, **view) == "a"
    files[0].write_text('{"text": "d"}\n')
    assert build(files) == "d"


def test_a_killed_build_does_no_whole_shard_again(
    taken, files, tmp_path, byte_tokenizer, monkeypatch
):
    build = lambda: pipeline.build(files, byte_tokenizer, seq_len=16, cache_dir=tmp_path / "c")
    take = shard_build.ShardBuild.take

    def stopped(work, index, batch, made):
        if batch[0].texts[0].startswith("c"):
            raise KeyboardInterrupt
        return take(work, index, batch, made)

    monkeypatch.setattr(tokenising, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(shard_build.ShardBuild, "take", stopped)
    with pytest.raises(KeyboardInterrupt):
        build()
    monkeypatch.setattr(shard_build.ShardBuild, "take", take)
    taken.clear()
    build()
    assert set(taken) == {"c"}
    assert sorted(one.name[:6] for one in (tmp_path / "c").iterdir()) == ["tokens"] * 3 + ["train-"]


def test_an_error_removes_what_is_begun_and_keeps_what_is_done(
    taken, files, tmp_path, byte_tokenizer, monkeypatch
):
    class Ahead(Here):  # all is read before the first answer is used
        def answers(self, messages):
            return iter(list(super().answers(messages)))

    monkeypatch.setattr(tokenising, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(tokenising, "Pool", Ahead)
    files[1].write_text('{"text": "b"}\n{\n')
    given = {"seq_len": 16, "cache_dir": tmp_path / "c", "on_bad_record": "fail", "workers": 3}
    with pytest.raises(DataError, match="b.jsonl:2: bad JSON"):
        pipeline.build(files, byte_tokenizer, **given)
    assert [one.name[:7] for one in (tmp_path / "c").iterdir()] == ["tokens-"]


ROUTING = TeacherRoutes(("one", "two"), "two")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"long_documents": "truncate", "packing": "none"},
        {"long_documents": "reject", "seq_len": 9},
        {"routing": ROUTING},
        {"second": True, "seq_len": 24},
    ],
)
def test_rows_are_the_same_however_the_files_are_divided(
    options, tmp_path, jsonl, byte_tokenizer, monkeypatch
):
    rng, sources = np.random.default_rng(0), []
    for number in range(6):
        lines = [{"text": "x" * int(size)} for size in rng.integers(1, 60, 12)]
        lines[3] = {"text": 7}
        lines[5]["teacher"] = "one"
        path = jsonl(lines if number != 2 else [b"{"], f"{number}.jsonl")
        origin = ("data", "teacher", "student")[number % 3]
        sources.append(open_source(path, weight=(1, 0.4, 2.5)[number % 3], origin=origin))
    found = []
    if options.get("second"):
        options = options | {"second": SecondView(byte_tokenizer, 20)}
    for small in (1, shards._SMALL):
        monkeypatch.setattr(shards, "_SMALL", small)
        cache, listed = tmp_path / f"cache-{small}", tmp_path / f"left-{small}.jsonl"
        given = {"seq_len": 16, "cache_dir": cache, "max_bad_fraction": 1.0, **options}
        data = pipeline.build(sources, byte_tokenizer, quarantine_path=listed, **given)
        assert len(list(cache.glob("tokens-*"))) == (6 if small == 1 else 1)
        facts = {
            field.name: getattr(data, field.name)
            for field in dataclasses.fields(data)
            if field.name not in ("folder", "arrays")
        }
        rows = [{name: repr(value) for name, value in row.items()} for row in data]
        records = data.arrays["records"][:].tolist()
        found.append((facts, rows, records, listed.read_text()))
    assert found[0] == found[1]
    assert found[0][0]["quarantined"] == 6 and len(found[0][2]) == 55 - found[0][0]["too_long"]


def sources_of(sizes, hashes):
    """(sources, contents) of files of such sizes."""
    nothing = lambda: iter(())
    made = [Source(str(n), "text", nothing, lambda: "", size=size) for n, size in enumerate(sizes)]
    return made, [{"format": "text", "sha256": f"{number}"} for number in hashes]


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=60, unique=True), st.data())
def test_a_file_that_joins_small_ones_changes_its_shard_and_at_most_the_next(hashes, data):
    place = data.draw(st.integers(0, len(hashes) - 1))
    sizes = [100 + number % 50 for number in hashes]
    groups = []
    for left_out in (None, place):
        kept = [n for n in range(len(hashes)) if n != left_out]
        sources, contents = sources_of([sizes[n] for n in kept], [hashes[n] for n in kept])
        found = list(shards._grouped(sources, contents))
        assert [0, *(end for _, end in found)] == [*(begin for begin, _ in found), len(kept)]
        groups.append({tuple(hashes[kept[n]] for n in range(*one)) for one in found})
    assert len(groups[0] - groups[1]) <= 2 and len(groups[1] - groups[0]) <= 2


def test_large_files_have_shards_of_their_own_and_small_ones_fill_one(monkeypatch):
    monkeypatch.setattr(shards, "_FULL", 50_500)
    many = shards._FULL // 1000 + 10
    odd = [n for n in range(3 * many) if shards._drawn({"sha256": f"{n}"}) % shards._ENDS]
    sources, contents = sources_of([1000] * many, odd[:many])
    first, *rest = shards._grouped(sources, contents)
    assert first == (0, 51) and len(rest) == 1
    sources, contents = sources_of([5, shards._SMALL, None, 5, 5], odd[:5])
    assert list(shards._grouped(sources, contents)) == [(0, 1), (1, 2), (2, 3), (3, 5)]


@given(
    st.lists(st.lists(st.booleans(), min_size=2, max_size=30), min_size=1, max_size=12),
    st.sampled_from(["split", "truncate", "reject"]),
    st.integers(2, 12),
    st.booleans(),
)
def test_documents_are_cut_by_the_definition(masks, policy, seq_len, all_count):
    masks = [[True] * len(mask) for mask in masks] if all_count else masks
    ends = np.cumsum([0, *map(len, masks)])
    loss = np.zeros(0, bool) if all_count else np.concatenate([np.asarray(m) for m in masks])
    found = cutting.cut(ends, loss, policy, seq_len)
    for number, mask in enumerate(masks):
        kept = mask[:seq_len] if policy == "truncate" else mask
        counted = sum(count for place, count in enumerate(kept) if place % seq_len)
        why = cutting.WHOLE
        if policy == "reject" and len(mask) > seq_len:
            why = cutting.LONG
        elif not counted:
            why = cutting.BEHIND if len(kept) < len(mask) and any(mask[1:]) else cutting.NOTHING
        assert (found.kept[number], found.counted[number]) == (len(kept), counted)
        assert found.why[number] == why


def test_long_masks_are_looked_at_in_parts(monkeypatch):
    mask = np.random.default_rng(0).random(1000) < 0.3
    ends = np.sort(np.r_[0, np.random.default_rng(1).choice(np.arange(1, 1000), 40, False), 1000])
    whole = cutting.cut(ends, mask, "split", 7)
    monkeypatch.setattr(cutting, "_AT_ONCE", 50)
    parts = cutting.cut(ends, mask, "split", 7)
    for name in ("kept", "counted", "why"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_a_shard_knows_the_kind_it_holds(taken, files, tmp_path, byte_tokenizer, jsonl):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chat = jsonl([{"messages": turns}], "chat.jsonl")
    given = {"seq_len": 64, "cache_dir": tmp_path / "c"}
    pipeline.build(chat, byte_tokenizer, **given)
    pipeline.build(files, byte_tokenizer, **given)
    with pytest.raises(DataError, match="mixed kinds.*a.jsonl holds 'text'.*chat.jsonl:1 is 'mess"):
        pipeline.build([*files, chat], byte_tokenizer, **given)
    assert json.loads(files[0].read_text().splitlines()[0]) == {"text": "aaa"}
