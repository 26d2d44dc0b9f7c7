"""Which teacher a record is for: rows and batches by teacher, and what is refused, by hand."""

import dataclasses

import numpy as np
import pytest

from jaxdistill.data import batching, pipeline, prompts
from jaxdistill.data.routes import MicroBatchLayout, TeacherRoutes
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError

BOTH = TeacherRoutes(("math", "code"))
LINES = [
    {"text": letter * length, "teacher": "math" if number % 3 else "code"}
    for number, (letter, length) in enumerate(zip("abcdefghijk", [3, 9, 2, 5, 7, 1, 4, 21, 6, 2, 8],
                                                  strict=True))
]  # fmt: skip


@pytest.fixture
def build(jsonl, tmp_path, byte_tokenizer):
    def make(lines, routing=BOTH, **options):
        options = {"seq_len": 8, "cache_dir": tmp_path / "cache", **options}
        source = lines if isinstance(lines, list) and lines and hasattr(lines[0], "read") else None
        return pipeline.build(source or jsonl(lines), byte_tokenizer, routing=routing, **options)

    return make


def letters(row, tokenizer):
    """The letters of a row's documents."""
    held = row["tokens"][row["segment_ids"] > 0].tolist()
    return set(tokenizer.decode(held, skip_special_tokens=True))


def test_a_row_holds_documents_of_one_teacher(build, byte_tokenizer):
    data, plain = build(LINES), build([{"text": one["text"]} for one in LINES], None)
    of = {line["text"][0]: 1 if line["teacher"] == "math" else 2 for line in LINES}
    met = {1: set(), 2: set()}
    for index in range(len(data)):
        row, found = data[index], letters(data[index], byte_tokenizer)
        assert {of[letter] for letter in found} == {int(row["route"])} == {data.route(index)}
        met[int(row["route"])] |= found
    assert met[1] | met[2] == set(of) and not met[1] & met[2]
    assert (data.num_tokens, data.num_loss_tokens) == (plain.num_tokens, plain.num_loss_tokens)
    assert sum(rows for _, rows, _ in data.teachers) == len(data)
    tokens = {name: tokens for name, _, tokens in data.teachers}
    assert tokens["code"] == sum(len(x["text"]) + 1 for x in LINES if x["teacher"] == "code")
    assert sum(tokens.values()) == data.num_tokens
    assert int(data.empty_row()["route"]) == 0


def test_with_one_teacher_named_the_rows_are_those_without_routes(build):
    plain = build([{"text": one["text"]} for one in LINES], None)
    data = build([one | {"teacher": "code"} for one in LINES])
    assert len(data) == len(plain) and data.teachers[0] == ("math", 0, 0)
    for index in range(len(plain)):
        row = data[index]
        assert int(row.pop("route")) == 2
        for name, array in plain[index].items():
            np.testing.assert_array_equal(row[name], array)


def test_the_rows_of_one_teacher(build):
    data = build(LINES)
    for number, (name, rows, tokens) in enumerate(data.teachers, start=1):
        own = data.of_teacher(name)
        assert (len(own), own.num_tokens) == (rows, tokens) and rows
        first = 0 if number == 1 else data.teachers[0][1]
        for index in range(rows):
            np.testing.assert_array_equal(own[index]["tokens"], data[first + index]["tokens"])
            assert own.route(index) == int(own[index]["route"]) == number


def test_the_record_decides_then_its_file_then_the_default(jsonl, byte_tokenizer, build):
    path = jsonl([{"text": "aa"}, {"text": "bb", "teacher": "code"}])
    of = lambda routing, **given: {
        name: tokens
        for name, _, tokens in build([open_source(path, **given)], routing, seq_len=64).teachers
    }
    assert of(BOTH, teacher="math") == {"math": 3, "code": 3}
    assert of(BOTH, teacher="code") == {"math": 0, "code": 6}
    assert of(TeacherRoutes(("math", "code"), "math")) == {"math": 3, "code": 3}
    assert of(TeacherRoutes(("code", "math"), "math")) == {"math": 3, "code": 3}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (LINES + [{"text": "z", "teacher": "maths"}], r":12: names the teacher 'maths', and there "
         r"are math, code: did you mean 'math'"),
        (LINES + [{"text": "z"}], r":12: names no teacher, and there are 2 \(math, code\): give "
         r"the record a field `teacher`"),
        ([{"text": "z", "teacher": ["math"]}], "names the teacher \"\\['math'\\]\""),
        ([{"text": "z", "teacher": ""}], ":1: names no teacher"),
    ],
)  # fmt: skip
def test_a_record_for_no_teacher_is_refused_with_its_place(build, lines, message):
    with pytest.raises(DataError, match=message):
        build(lines)


def test_a_teacher_is_no_matter_where_there_are_not_several(build):
    data = build(LINES, None)
    assert "route" not in data[0] and not data.teachers
    assert data.notices == ("fields that are not read: `teacher`",)


def test_every_record_of_any_kind_may_name_its_teacher(build, byte_tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for record in (
        {"messages": chat},
        {"prompt": "a", "completion": "b"},
        {"prompt": chat[:1], "completion": chat[1:]},
        {"instruction": "a", "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ):
        data = build([record | {"teacher": "code"}], seq_len=64)
        assert [rows for _, rows, _ in data.teachers] == [0, 1]


def test_the_names_and_the_default_are_part_of_the_data(build):
    prints = [
        build(LINES, routing).fingerprint
        for routing in (
            None,
            BOTH,
            TeacherRoutes(("code", "math")),
            dataclasses.replace(BOTH, default="math"),
        )
    ]
    assert len(set(prints)) == 4


def test_batches_hold_the_same_rows_of_the_stream_each_part_of_one_teacher(build):
    data, layout = build(LINES), MicroBatchLayout(2, 2)
    plain = list(zip(range(5), batching.batches(data, batch_size=4, seed=3), strict=False))
    routed = list(zip(range(5), batching.batches(data, batch_size=4, seed=3, layout=layout),
                      strict=False))  # fmt: skip
    for (_, (span, batch)), (_, (other, split)) in zip(plain, routed, strict=True):
        assert span == other and split.tokens.shape == (6, 8)
        named = lambda batch: sorted(
            row.tobytes() for row, mask in zip(batch.tokens, batch.segment_ids, strict=True)
            if mask.any()
        )  # fmt: skip
        assert named(batch) == named(split)
        for part in range(3):
            own = split.route[part::3]
            assert len(set(own[own > 0].tolist())) <= 1
            assert not split.segment_ids[part::3][own == 0].any()
    start = routed[2][1][0].first_row
    again = next(batching.batches(data, batch_size=4, seed=3, start=start, layout=layout))
    assert again[0] == routed[2][1][0]
    halves = [
        next(batching.batches(data, batch_size=4, seed=3, start=start, layout=layout, rows=rows))[1]
        for rows in (range(3), range(3, 6))
    ]
    for name in ("tokens", "mask", "route"):
        whole = getattr(routed[2][1][1], name)
        np.testing.assert_array_equal(getattr(again[1], name), whole)
        both = np.concatenate([getattr(half, name) for half in halves])
        np.testing.assert_array_equal(both, whole)


def test_prompts_know_their_teacher(jsonl, byte_tokenizer):
    path = jsonl([{"prompt": "a", "teacher": "code"}, {"prompt": "b"}])
    source = open_source(path, "prompts", teacher="math")
    asked = prompts.read([source], byte_tokenizer, longest=8, routing=BOTH)
    assert [one.notes["teacher"] for one in asked.prompts] == ["code", "math"]
    assert asked.fingerprint != prompts.read([source], byte_tokenizer, longest=8).fingerprint
    with pytest.raises(DataError, match=":2: names no teacher"):
        prompts.read([open_source(path, "prompts")], byte_tokenizer, longest=8, routing=BOTH)
