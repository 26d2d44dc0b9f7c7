"""Which tokens two vocabularies share, on made tokenizers."""

import dataclasses
import pathlib

import numpy as np
import pytest

from jaxdistill.data import coverage, vocabularies
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.vocabularies import Pair, compare, described


def made(*words, added=(), kind="ByteLevel"):
    table = {word: index for index, word in enumerate(words)}
    names = [{"id": len(words) + i, "content": name} for i, name in enumerate(added) if name]
    return described({"model": {"vocab": table}, "added_tokens": names, "decoder": {"type": kind}})


def facts(pair: Pair):
    return pair.kind, pair.in_place, pair.columns, (pair.unreadable, pair.misplaced)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((made("a", "b"), made("a", "b")), None, ("same", True, None, ((), ()))),
        # A control token more: of the teacher, which is left out; of ours, which is masked.
        ((made("a"), made("a", added=["<x>"])), None, ("shared", True, None, ((), ()))),
        ((made("a", added=["<x>"]), made("a")), None, ("shared", False, (0,), ((1,), ()))),
        # Renamed: both read the row by its id, neither says it.
        (
            (made("a", added=["<x>"]), made("a", added=["<y>"])),
            None,
            ("shared", False, (0,), ((), ())),
        ),
        ((made("a", "b"), made("b", "a")), None, ("shared", False, None, ((), (0, 1)))),
        ((made("a", "b"), made("a", "b", "c")), None, ("shared", True, None, ((), ()))),
        ((made("a", "b"), made("a", "c")), None, ("different", False, (0,), ((1,), (1,)))),
        # The rows of the embedding end before the tokenizer's ids.
        ((made("a", "b"), made("a", "b")), 1, ("shared", False, (0,), ((1,), (1,)))),
    ],
)
def test_kinds_of_pairs(ours, theirs, expected):
    assert facts(compare(*ours, theirs)) == expected


def test_bytes_and_not_spellings_are_compared():
    """The space of byte-level BPE is that of SentencePiece; a byte is no token of its letter."""
    ours, theirs = made("Ġa", "Ã"), made("\u2581a", "<0x41>", "A", kind="Metaspace")
    pair = compare(ours, theirs)
    assert pair.ids == (0, -1) and pair.theirs.ordinary == (1, 2)
    assert compare(made("A", "<0x41>", kind="Metaspace"), theirs).ids == (2, 1)


def test_words_by_place_and_ids_that_mean_nothing():
    unigram = {"model": {"vocab": [["a", 0.0], ["b", 0.0]]}, "decoder": None}
    gap = described(unigram | {"added_tokens": [{"id": 4, "content": "<x>"}]})
    assert gap.size == 5 and compare(gap, gap).ids == (0, 1, 2, 3, 4)
    names = [{"id": 2, "content": "<y>"}, {"id": 4, "content": "<x>"}]
    # Row 2 is a token of the other alone, and masked; row 3, empty in both, is not.
    assert compare(gap, described(unigram | {"added_tokens": names})).columns == (0, 1, 3, 4)


def test_a_pair_says_what_is_masked():
    pair = compare(made("a", "b", added=["<x>"]), made("b", "a", "c"))
    assert str(pair) == (
        "shared: 2 of 3 tokens are shared, 2 of them under another id; the tokenizer's alone, "
        "masked: 0 ordinary and 1 control tokens; the model's alone, masked: 1 ordinary and 0 "
        "control tokens"
    )


def test_coverage_counts_what_a_model_cannot_read():
    named = {"name": "", "folder": pathlib.Path(), "fingerprint": "", "kind": "text"}
    counts = {f.name: 5 for f in dataclasses.fields(Dataset) if f.type in (int, "int")}
    # The last two are in no row, 1 and 2 twice.
    arrays = {
        "tokens": np.array([0, 1, 2, 1, 0], np.int32),
        "segments": np.array([[0, 3], [1, 2]]),
    }
    tokens = {"arrays": arrays}
    dataset = Dataset(**named, **counts, **tokens)
    ours = made("a", "b", added=["<x>"])
    pair = compare(ours, made("a"))
    data = {"train": dataset, "eval": dataset}
    found = list(coverage.errors("teacher", pair, ours, pair.unreadable, data, "Do this."))
    assert len(found) == 2
    assert str(found[0]).startswith(
        "teacher: 4 of 5 tokens of data.train (80.00%) are none of its vocabulary: 1 'b', 2 '<x>'. "
        "The vocabularies are shared: 1 of 3"
    )
    assert str(found[0]).endswith("Do this.")
    assert not list(coverage.errors("teacher", pair, ours, (), data, ""))


def test_a_tokenizer_and_its_file_are_one_vocabulary(byte_tokenizer, word_tokenizer):
    for tokenizer in (byte_tokenizer, word_tokenizer):
        found = vocabularies.vocabulary(tokenizer)
        assert found.size == max(tokenizer.get_vocab().values()) + 1
        assert compare(found, found).kind == "same"
