"""Pairs of answers: what is one, both in one row, whole or left out."""

import json

import pytest

from jaxdistill.data import pipeline
from jaxdistill.data.records import Rejected, parse
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.models.byte_tokenizer import byte_tokenizer


def turn(role, content):
    return {"role": role, "content": content}


ASKED = [turn("user", "two?")]
YES, NO = [turn("assistant", "yes")], [turn("assistant", "no")]


def write(folder, *records):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def build(folder, path, **options):
    given = {"seq_len": 24, "loss_on": "completion", "cache_dir": folder / "cache"} | options
    return pipeline.build(path, byte_tokenizer(), **given)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": ASKED, "chosen": YES, "rejected": NO},
        {"chosen": ASKED + YES, "rejected": ASKED + NO},
        {"prompt": "two?", "chosen": ASKED + YES, "rejected": ASKED + NO},
    ],
)
def test_a_pair_of_turns_is_two_dialogues(value):
    record = parse(value, "pairs", 3)
    assert record.kind == "dialogue_pairs"
    assert [one.texts for one in record.answers] == [("two?", "yes"), ("two?", "no")]
    assert {one.conversation.prompt for one in record.answers} == {1}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "missing field `rejected`"),
        ({"chosen": "b", "rejected": "c"}, "missing field `prompt`"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "there is nothing to prefer"),
        ({"prompt": "a", "chosen": "b", "rejected": NO}, "must both be texts"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty: field `completion`"),
        ({"chosen": ASKED + YES, "rejected": [turn("user", "?")]}, "share no first turn"),
        ({"prompt": "a?", "chosen": ASKED + YES, "rejected": ASKED + NO}, "is not the last turn"),
        ({"chosen": ASKED, "rejected": ASKED + NO}, "ends where the other goes on"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "input": "d"}, "write it into `prompt`"),
    ],
)
def test_what_is_no_pair_says_why(value, reason):
    rejected = parse(value, "pairs", 7)
    assert isinstance(rejected, Rejected) and reason in rejected.reason


def test_both_answers_stand_in_one_row_chosen_first(tmp_path):
    """Every row is what a person would write down: bytes, and the end behind an answer."""
    texts = [("ab", "cd", "e"), ("f", "gh", "ijklm"), ("no", "p", "qrs")]
    records = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]
    path = write(tmp_path, *records)
    found = build(tmp_path, path)
    assert (found.kind, found.num_documents, found.used) == ("pairs", 6, 3)
    seen = []
    for index in range(len(found)):
        row = found[index]
        last = row["segment_ids"].max()
        assert last % 2 == 0
        for number in range(1, last + 1, 2):
            pair = []
            for segment in (number, number + 1):
                own = row["segment_ids"] == segment
                assert row["positions"][own].tolist() == list(range(own.sum()))
                learned = row["targets"][own & row["mask"]]
                pair.append(byte_tokenizer().decode(learned[:-1].tolist()))
                assert learned[-1] == byte_tokenizer().eos_token_id
            seen.append(tuple(pair))
    assert sorted(seen) == sorted((chosen, rejected) for _, chosen, rejected in texts)


def test_a_pair_that_does_not_fit_is_left_out_whole(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path, good, {"prompt": "a" * 9, "chosen": "b" * 4, "rejected": "c"})
    found = build(tmp_path, path)
    assert (found.used, found.too_long, found.num_documents) == (1, 1, 2)
    with pytest.raises(ConfigError, match="pairs are whole or left out"):
        build(tmp_path, path, long_documents="truncate")
    with pytest.raises(DataError, match="use completion"):
        build(tmp_path, path, loss_on="all")
