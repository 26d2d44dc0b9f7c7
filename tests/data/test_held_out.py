import gzip
import itertools
import json
import re
import unicodedata

import numpy as np
import pytest

from jaxdistill.data import files, held_out, pipeline, stretches
from jaxdistill.data.record_hash import fingerprint_of
from jaxdistill.data.records import Record
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError


@pytest.fixture
def build(tmp_path, byte_tokenizer):
    return lambda sources, name, **more: pipeline.build(
        sources, byte_tokenizer, seq_len=16, cache_dir=tmp_path / "cache", name=name, **more
    )


def texts(source):
    return [item.texts[0] for item in source if isinstance(item, Record)]


def rows(first, last):
    return [{"text": f"record {number}"} for number in range(first, last)]


def test_a_share_is_held_out_by_what_the_records_say(jsonl, build):
    first = open_source(jsonl(rows(0, 1000), "a.jsonl"))
    [train], [held] = held_out.split([first], 0.1)
    assert sorted(texts(train) + texts(held)) == sorted(texts(first))
    assert 70 <= len(texts(held)) <= 130  # 100 on average, three standard deviations
    # Other files beside it, another order, another shape of the file: the same records.
    more = open_source(jsonl(rows(1000, 1500)[::-1], "b.jsonl"))
    again = open_source(jsonl(rows(0, 1000)[::-1], "c.jsonl"))
    _, later = held_out.split([more, again], 0.1)
    assert set(texts(later[1])) == set(texts(held))
    assert len({train.digest(), held.digest(), first.digest()}) == 3
    made = build(train, "train"), build(held, "eval")
    held_out.check(*made)
    assert made[0].used + made[1].used == 1000


def test_broken_records_are_counted_once_and_files_of_a_folder_are_parted(jsonl, tmp_path):
    (tmp_path / "d").mkdir()
    jsonl([*rows(0, 60), b"{"], "d/a.jsonl")
    jsonl(rows(60, 100), "d/b.jsonl")
    [train], [held] = held_out.split([open_source(tmp_path / "d")], 0.3)
    assert len(list(train)) + len(list(held)) == 101
    assert all(isinstance(item, Record) for item in held)
    assert len(held.parts) == 2 and sum(map(texts, held.parts), []) == texts(held)


def test_a_share_that_holds_out_nothing_is_refused(jsonl):
    source = open_source(jsonl(rows(0, 20)))
    with pytest.raises(DataError, match="fraction: 1e-06 holds out none of the 20 records: raise"):
        held_out.split([source], 1e-6)
    with pytest.raises(DataError, match="holds out all of the 20 records: lower it"):
        held_out.split([source], 0.999999)


def test_copies_of_the_training_data_are_no_held_out_data(jsonl, build, tmp_path, caplog):
    train = build(jsonl(rows(0, 40)), "train")
    packed = tmp_path / "copy.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "data.jsonl").read_bytes()))
    for path in (
        packed,
        jsonl(rows(0, 40)[::-1], "turned.jsonl"),
        jsonl(rows(30, 60), "part.jsonl"),
    ):
        with pytest.raises(
            DataError, match="records are in data.train too.*must not be trained on"
        ):
            held_out.check(train, build(path, "eval"))
    listed = tmp_path / "copy.json"
    listed.write_text(json.dumps(rows(0, 40)))
    with pytest.raises(DataError, match="40 of 40 records"):
        held_out.check(train, build(listed, "eval"))
    held_out.check(train, build(jsonl(rows(38, 60), "few.jsonl"), "eval"))
    assert "2 of 22 records are in data.train too" in caplog.text
    caplog.clear()
    held_out.check(train, build(jsonl(rows(40, 60), "other.jsonl"), "eval"))
    assert not caplog.text


CHATS = [(f"Frage {n}: Größe?", f"Wert {n} — ﬁx\n  x = {n}\n") for n in range(20)]
COPIES = {
    "trailing blanks": [{"prompt": q + " ", "completion": a + " \n\n"} for q, a in CHATS],
    "line ends": [{"prompt": q, "completion": a.replace("\n", "\r\n")} for q, a in CHATS],
    "marks of byte order": [{"prompt": "\ufeff" + q, "completion": a} for q, a in CHATS],
    "tabs and wide blanks": [
        {"prompt": q.replace(" ", "\u00a0"), "completion": a.replace("  ", "\t")} for q, a in CHATS
    ],
    "forms of characters": [
        {name: unicodedata.normalize("NFD", text).replace("ﬁ", "fi") for name, text in one.items()}
        for one in ({"prompt": q, "completion": a} for q, a in CHATS)
    ],
    "order and other fields": [{"id": a, "completion": a, "prompt": q} for q, a in CHATS],
    "chats": [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in CHATS
    ],
    "chats of parts": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": q}]},
                {"role": "assistant", "content": a, "weight": 1, "name": ""},
            ]
        }
        for q, a in CHATS
    ],
    "ShareGPT": [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a in CHATS
    ],
    "Alpaca": [{"instruction": q, "input": "", "output": a} for q, a in CHATS],
    "conversational prompts": [
        {
            "prompt": [{"role": "user", "content": q}],
            "completion": [{"role": "assistant", "content": a}],
        }
        for q, a in CHATS
    ],
    "texts": [{"text": q + a} for q, a in CHATS],
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_known_however_it_is_written(name, jsonl):
    fingerprints = lambda rows, file: [
        fingerprint_of(one) for one in open_source(jsonl(rows, file))
    ]
    original = fingerprints([{"prompt": q, "completion": a} for q, a in CHATS], "a.jsonl")
    assert len(set(original)) == 20
    assert fingerprints(COPIES[name], "b.jsonl") == original


def test_records_that_say_other_things_are_no_copies(jsonl):
    turn = lambda role, content, **more: {"role": role, "content": content, **more}
    call = lambda n: {"type": "function", "function": {"name": "f", "arguments": {"n": n}}}
    asked = turn("user", "how much?")
    records = [
        [asked, turn("assistant", "one")],
        [asked, turn("assistant", "two")],
        [asked, turn("assistant", "one", reasoning_content="because")],
        [asked, turn("assistant", "one", tool_calls=[call(1)])],
        [asked, turn("assistant", "one", tool_calls=[call(2)])],
        [turn("system", "be brief"), asked, turn("assistant", "one")],
    ]
    source = open_source(jsonl([{"messages": one} for one in records]))
    assert len({fingerprint_of(one) for one in source}) == len(records)


def test_the_refusal_says_what_does_not_count(jsonl, build):
    train = build(jsonl(rows(0, 40)), "train")
    blanks = [{"text": one["text"] + " "} for one in rows(0, 40)]
    with pytest.raises(DataError, match="40 of 40 .*blanks, line ends and the shape of a record"):
        held_out.check(train, build(jsonl(blanks, "b.jsonl"), "eval"))


def test_a_copy_of_a_long_text_is_known_by_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 200)
    lines = [f"line {n} of a long text" for n in range(100)]
    found = []
    for ends, more in (("\n", ""), ("\r\n", ""), (" \t\n", ""), ("\n", "\ufeff"), ("\n\n\n", "\n")):
        path = tmp_path / f"{len(found)}.txt"
        path.write_bytes((more + ends.join(lines)).encode())
        found.append([fingerprint_of(one) for one in open_source(path)])
    assert len(found[0]) > 5 and found.count(found[0]) == len(found)


def _told(seed, lines=12):
    """A text of its own: lines of words that no other seed has in this order."""
    rng = np.random.default_rng(seed)
    words = lambda: " ".join("".join(rng.choice(list("abcdefgh"), 5)) for _ in range(30))
    return "\n".join(words() for _ in range(lines))


FRAME = "This text is free to use by everybody, for whatever purpose. "
CUT_ANEW = {
    "in two": lambda texts: [part for t in texts for part in (t[: len(t) // 2], t[len(t) // 2 :])],
    "joined": lambda texts: ["\n".join(texts)],
    "by lines, with other blanks": lambda texts: [
        "  ".join(line.split()) for text in texts for line in text.splitlines()
    ],
}


@pytest.fixture
def told(jsonl, build):
    def make(texts, name):
        return build(open_source(jsonl([{"text": t} for t in texts], f"{name}.jsonl")), name)

    return make


@pytest.mark.parametrize("how", CUT_ANEW)
def test_a_copy_in_other_records_is_a_copy(how, told, byte_tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(stretches, "_BLOCK", 1000)  # the training data is read in several
    texts = [_told(seed) for seed in range(4)]
    train, copy = told(texts, "train"), told(CUT_ANEW[how](texts[1:3]), "eval")
    held_out.check(train, copy)
    with pytest.raises(DataError, match=r"data.eval: (9\d|100)% of its text is in data.train"):
        held_out.check_stretches(train, copy, byte_tokenizer)
    held_out.check_stretches(train, copy, byte_tokenizer, refuses=False)
    assert "cut into other records" in caplog.text


def test_short_answers_of_one_task_are_no_copies(jsonl, build, byte_tokenizer, caplog, monkeypatch):
    """One behind the other they are the same thirty-two tokens in any data of the task."""

    monkeypatch.setattr(stretches, "BYTES", 32)
    drawn = np.random.default_rng(0).integers(0, 2, 1100)

    def made(name, first, count):
        rows = [
            {"prompt": f"{n}: ", "completion": ["no.", "yes."][drawn[n]]}
            for n in range(first, first + count)
        ]
        return build(open_source(jsonl(rows, f"{name}.jsonl")), name, loss_on="completion")

    train, other = made("train", 0, 1000), made("eval", 1000, 100)
    held_out.check_stretches(train, other, byte_tokenizer)
    assert not caplog.records


@pytest.mark.parametrize("most", [2**17, 2**8])
def test_a_quarter_of_a_text_is_told_and_a_frame_is_not(
    most, told, byte_tokenizer, monkeypatch, caplog
):
    monkeypatch.setattr(stretches, "_SAMPLED", most)
    train = told([FRAME + _told(seed) for seed in range(3)], "train")
    other = told([FRAME + _told(seed) for seed in range(3, 6)], "eval")
    held_out.check_stretches(train, other, byte_tokenizer)
    assert not caplog.records
    mixed = told([_told(0), *(_told(seed) for seed in range(7, 10))], "eval")
    held_out.check_stretches(train, mixed, byte_tokenizer)
    [record] = caplog.records
    share = int(re.search(r"data.eval: (\d+)%", record.getMessage())[1])
    assert 20 <= share <= 30


def test_questions_that_are_held_out_are_not_asked(jsonl, caplog):
    number = itertools.count()
    opened = lambda rows, format="auto": open_source(jsonl(rows, f"{next(number)}.jsonl"), format)
    turn = lambda role, content: {"role": role, "content": content}
    held = [
        [{"prompt": f"what is {n}? ", "completion": "x"} for n in range(20)],
        [{"messages": [turn("user", f"what is {n}?"), turn("assistant", "x")]} for n in range(20)],
    ]
    asked = lambda last: opened([{"prompt": f"what is {n}?\n"} for n in range(last)], "prompts")
    for rows in held:
        with pytest.raises(DataError, match="20 of 20 questions are in data.prompts too"):
            held_out.check_prompts([asked(20)], [opened(rows)])
        held_out.check_prompts([asked(1)], [opened(rows)])
        assert "1 of 20 questions are in data.prompts too" in caplog.text
        caplog.clear()
    held_out.check_prompts([asked(20)], [opened([{"text": f"what is {n}?"} for n in range(20)])])
    assert not caplog.text
