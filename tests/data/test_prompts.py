"""Prompts that are answered: what of a record is asked, what is kept beside, what is left out."""

import json

import pytest

from jaxdistill.data import prompts
from jaxdistill.data.prompting import Prompter
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError, ModelError

ASK, TELL = {"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}


def read(tokenizer, *paths, longest=200, **options):
    sources = [open_source(path, "prompts") for path in paths]
    return prompts.read(sources, tokenizer, longest=longest, **options)


def test_a_prompt_is_a_text_or_messages_without_the_last_answer(byte_tokenizer, jsonl):
    path = jsonl(
        [
            {"prompt": "how?", "answer": "7", "solution": "3 + 4", "completion": "so"},
            {"messages": [ASK, TELL], "teacher": "math"},
            {"messages": [ASK, TELL, ASK]},
            {"prompt": [ASK], "system": "be brief"},
            {"messages": [ASK, TELL, ASK, TELL, TELL]},
        ]
    )
    found = read(byte_tokenizer, path)
    prompter = Prompter(byte_tokenizer)
    expected = [
        prompter.text("how?"),
        prompter.turns([ASK]),
        prompter.turns([ASK, TELL, ASK]),
        prompter.turns([{"role": "system", "content": "be brief"}, ASK]),
        prompter.turns([ASK, TELL, ASK]),
    ]
    assert [prompt.tokens.tolist() for prompt in found.prompts] == expected
    assert [dict(prompt.notes) for prompt in found.prompts] == [
        {"answer": "7", "solution": "3 + 4", "completion": "so"},
        {"teacher": "math", "completion": TELL["content"]},
        {},
        {},
        {},
    ]
    assert (len(found), found.records, found.left_out) == (5, 5, [])


def test_what_cannot_be_asked_is_left_out_counted_and_listed(byte_tokenizer, jsonl, tmp_path):
    path = jsonl(
        [
            {"prompt": "fits"},
            {"prompt": "much too long"},
            {"prompt": " "},
            {"messages": [TELL]},
            {"prompt": "a", "weight": 0},
            {"text": "no prompt"},
            {"prompt": "a", "messages": [ASK]},
            {"prompt": "a", "context": "of it"},
        ]
    )
    found = read(byte_tokenizer, path, longest=4, max_bad_fraction=0.5)
    assert found.counts == {"too_long": 1, "empty": 2, "unlearned": 1, "quarantined": 3}
    assert (len(found), found.records) == (1, 8)
    found.write_left_out(tmp_path / "left.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "left.jsonl").read_text().splitlines()]
    assert [one["line"] for one in listed] == [2, 3, 4, 5, 6, 7, 8]
    reasons = " | ".join(one["reason"] for one in listed)
    for words in (
        "13 tokens, and 4 leave room",
        "found `text`",
        "found both",
        "write it into `prompt`",
    ):
        assert words in reasons
    with pytest.raises(DataError, match=r"3 of 8 records \(37\.50%\) cannot be used"):
        read(byte_tokenizer, path, longest=4)
    with pytest.raises(DataError, match=r"data\.jsonl:6: .*on_bad_record is 'fail'"):
        read(byte_tokenizer, path, longest=4, on_bad_record="fail")
    with pytest.raises(DataError, match="none of the 8 records can be asked"):
        read(byte_tokenizer, path, longest=1, max_bad_fraction=1.0)


def test_messages_need_a_chat_template(byte_tokenizer, jsonl, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="no chat template: give data.chat_template"):
        read(byte_tokenizer, jsonl([{"messages": [ASK]}]))


def test_every_epoch_asks_each_prompt_once_in_an_order_of_its_own(byte_tokenizer, jsonl):
    found = read(byte_tokenizer, jsonl([{"prompt": f"{number:02d}"} for number in range(12)]))
    asked = lambda seed, places: [bytes(found.at(i, seed).tokens.tolist()) for i in places]
    first, second = asked(3, range(12)), asked(3, range(12, 24))
    assert sorted(first) == sorted(second) and len(set(first)) == 12
    assert first != second and first != asked(4, range(12))
    assert asked(3, [23, 5]) == [second[11], first[5]]


def test_the_fingerprint_knows_what_decides(byte_tokenizer, bpe_tokenizer, jsonl):
    one, other = jsonl([{"prompt": "a"}], "one.jsonl"), jsonl([{"prompt": "b"}], "two.jsonl")
    prints = {
        read(tokenizer, path, longest=longest, **options).fingerprint
        for tokenizer, path, longest, options in (
            (byte_tokenizer, one, 9, {}),
            (byte_tokenizer, other, 9, {}),
            (bpe_tokenizer, one, 9, {}),
            (byte_tokenizer, one, 8, {}),
            (byte_tokenizer, one, 9, {"special_tokens": "parse"}),
        )
    }
    assert len(prints) == 5
    assert read(byte_tokenizer, one, longest=9).fingerprint in prints
