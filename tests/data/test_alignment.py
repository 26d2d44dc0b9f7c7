"""Alignment by bytes: hand cases, properties on random text, tokenizers of different kinds."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxdistill.data.alignment import align, numbered, places, shown
from jaxdistill.data.token_bytes import token_bytes
from jaxdistill.errors import MismatchError
from jaxdistill.models.byte_tokenizer import byte_tokenizer

TEXT = [
    "the quick brown fox jumps over the lazy dog " * 4,
    "unbelievable 12 1212 naïve café über 日本語 🦊 \r\n\t",
]


def split(text, *cuts):
    data = text.encode()
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (
            [b"un", b"believ", b"able", b" 12"],
            [b"unbel", b"iev", b"able", b" 1", b"2"],
            [[0, 1, 0, 1], [2, 2, 2, 2], [3, 3, 3, 4]],
        ),
        (split("日a", 3), split("日a", 1, 2), [[0, 1, 0, 2]]),
        ([], [], []),
        ([], [b"a"], []),
        ([b"", b"a", b"b"], [b"a", b"b"], [[1, 1, 0, 0], [2, 2, 1, 1]]),  # BOS on one side
        ([b"a", b"", b"b"], [b"ab"], [[0, 2, 0, 0]]),
        ([b"a", b"bc"], [b"a", b"b"], [[0, 0, 0, 0]]),  # one side was cut: the rest is left out
        ([b"\r", b"\n"], [b"\r\n"], [[0, 1, 0, 0]]),
        (split("e\u0301x", 1, 2), split("e\u0301x", 3), [[0, 2, 0, 1]]),  # half an accent
    ],
)
def test_hand_cases(student, teacher, expected):
    found = align(student, teacher)
    assert found.dtype == np.int32 and found.shape == (len(expected), 4)
    assert found.tolist() == expected


@hypothesis.given(st.binary(max_size=40), st.data())
def test_groups_are_the_smallest_that_spell_the_same(text, data):
    cuts = lambda: sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    sides = []
    for edges in (cuts(), cuts()):
        edges = [0, *edges, len(text)]
        sides.append([text[a:b] for a, b in zip(edges, edges[1:], strict=False)])
    groups = align(*sides)
    ends = [{sum(map(len, side[: i + 1])) for i in range(len(side))} - {0} for side in sides]
    assert len(groups) == len(ends[0] & ends[1])
    spelled = b""
    for a, b, c, d in groups.tolist():
        ours, theirs = b"".join(sides[0][a : b + 1]), b"".join(sides[1][c : d + 1])
        assert ours == theirs != b""
        spelled += ours
    assert spelled == text
    ours, theirs = numbered(groups, *map(len, sides))
    assert ours.max(initial=0) == theirs.max(initial=0) == len(groups)


def fast(core, **special):
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level(size):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet
    )
    core.train_from_iterator(TEXT, trainer)
    return fast(core, bos_token="<s>")


def sentence_piece(size, metaspace):
    """As Llama 2 has it: bytes where a letter is unknown, a space before the text."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=["\u2581"],
        limit_alphabet=40,
    )
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.train_from_iterator(TEXT, trainer)
    described = core.to_str().replace('"special":true', '"special":false')
    core = Tokenizer.from_str(described)
    core.add_special_tokens(["<s>", "<unk>"])
    return fast(core, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "byte-level 300": byte_level(300),
    "byte-level 400": byte_level(400),
    "prepend": sentence_piece(420, metaspace=False),
    "metaspace": sentence_piece(380, metaspace=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@hypothesis.settings(max_examples=40)
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_every_kind_of_tokenizer_spells_any_text_and_meets_the_bytes(name, text):
    hypothesis.assume("\u2581" not in text)  # SentencePiece cannot tell it from a space
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled = token_bytes(tokenizer).spell(ids, text)
    single = [bytes([byte]) for byte in text.encode()]
    groups = align(spelled, single)
    assert len(groups) == sum(1 for piece in spelled if piece)
    assert (groups[:, 0] == groups[:, 1]).all()


def test_a_model_is_read_before_each_token_of_a_group_and_behind_the_last():
    groups = np.asarray([0, 0, 1, 1, 2, 0, 0, 3], np.int32)
    assert places(groups).astype(int).tolist() == [0, 1, 1, 1, 1, 0, 1, 1]
    assert places(np.zeros(0, np.int32)).tolist() == []


def test_special_tokens_have_no_bytes_and_what_changes_a_text_is_refused():
    tokenizer = TOKENIZERS["byte-level 300"]
    ids = [tokenizer.bos_token_id, *tokenizer("the fox", add_special_tokens=False)["input_ids"]]
    assert token_bytes(tokenizer).spell(ids, "the fox")[0] == b""
    lower = byte_level(300)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    ids = lower("The fox", add_special_tokens=False)["input_ids"]
    with pytest.raises(MismatchError, match="from byte 0 on the text has b'The fox'"):
        token_bytes(lower).spell(ids, "The fox")
    words = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(MismatchError, match="WordPiece.*no fixed bytes"):
        token_bytes(fast(words))


def test_groups_are_shown_as_people_read_them():
    student, teacher = [b"un", b"it", b" 12"], [b"unit", b" 1", b"2"]
    assert shown(student, teacher, align(student, teacher)) == ["un|it    unit", "_12    _1|2"]
