"""Documents in the tokens of two models: groups, cuts, rows, and what cannot be aligned."""

import copy
import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxdistill.data import batching, pipeline
from jaxdistill.data.chat import ChatEncoder
from jaxdistill.data.codec import prepare
from jaxdistill.data.matching import Around, around, bytes_of
from jaxdistill.data.packing import best_fit_both, plan
from jaxdistill.data.second_view import SecondView, second_rows
from jaxdistill.data.tally import Tally
from jaxdistill.data.token_bytes import token_bytes
from jaxdistill.errors import ConfigError, DataError, MismatchError
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from tests.data.test_alignment import TOKENIZERS

WORDS = "the quick brown fox jumps over the lazy dog unbelievable naïve 日本語 🦊".split()


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(count)]


def written(tmp_path, records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def build(tmp_path, records, student, teacher, seq_len=64, length=48, **options):
    return pipeline.build(
        written(tmp_path, records),
        student,
        seq_len=seq_len,
        second=SecondView(teacher, length),
        cache_dir=tmp_path / "cache",
        **{"max_bad_fraction": 1.0} | options,
    )


def spelled(tokenizer, tokens, groups):
    """The bytes of each group of a row."""
    table = token_bytes(tokenizer)
    found = {}
    for token, group in zip(tokens.tolist(), groups.tolist(), strict=True):
        found[group] = found.get(group, b"") + table.pieces([token])[0]
    found.pop(0, None)
    return found


@pytest.mark.parametrize("student", ["bytes", "byte-level 300", "prepend"])
@pytest.mark.parametrize("teacher", ["byte-level 400", "metaspace", "bytes"])
def test_rows_of_both_views_hold_the_same_documents(tmp_path, student, teacher):
    ours, theirs = TOKENIZERS[student], TOKENIZERS[teacher]
    data = build(tmp_path, [{"text": text} for text in texts(30)], ours, theirs)
    assert data.quarantined == 0 and data.too_long == 0 and data.used + data.unaligned == 30
    assert data.unaligned < 4  # texts of one word
    for index in range(len(data)):
        row = data[index]
        second = row["second"]
        mine = spelled(ours, row["tokens"], row["groups"])
        other = spelled(theirs, second["tokens"], second["groups"])
        # Behind the first token of each document; a space before a text belongs to no text.
        assert mine == other and list(mine) == list(range(1, len(mine) + 1))
        assert len(mine) <= 48
        assert set(row["segment_ids"]) - {0} == set(second["segment_ids"]) - {0}
        for number in set(row["segment_ids"]) - {0}:
            here, there = row["segment_ids"] == number, second["segment_ids"] == number
            assert set(row["groups"][here]) - {0} == set(second["groups"][there]) - {0}
            assert row["positions"][here].tolist() == list(range(here.sum()))
            assert second["positions"][there].tolist() == list(range(there.sum()))
    everything = sum(len(spelled(ours, data[i]["tokens"], data[i]["tokens"] * 0 + 1)[1])
                     for i in range(len(data)))  # fmt: skip
    aligned = sum(
        sum(map(len, spelled(ours, data[i]["tokens"], data[i]["groups"]).values()))
        for i in range(len(data))
    )
    assert aligned > 0.85 * everything
    view = second_rows(data)
    row, second = view[0], data[0]["second"]
    np.testing.assert_array_equal(row["tokens"], second["tokens"])
    counted = np.append(second["groups"][1:] > 0, False)
    np.testing.assert_array_equal(row["mask"], counted)
    np.testing.assert_array_equal(row["targets"][counted], second["tokens"][1:][counted[:-1]])


@hypothesis.settings(max_examples=30, suppress_health_check=["function_scoped_fixture"])
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=2, max_size=60))
def test_any_text_is_aligned_to_its_last_byte_or_set_aside(tmp_path_factory, text):
    hypothesis.assume("\u2581" not in text and text.strip() and "\0" not in text)
    folder = tmp_path_factory.mktemp("any")
    data = build(folder, [{"text": text}], TOKENIZERS["bytes"], TOKENIZERS["metaspace"], 512, 512)
    row = data[0]
    groups = spelled(TOKENIZERS["bytes"], row["tokens"], row["groups"])
    whole = text.encode()
    # The first of the teacher's tokens is predicted by nothing, and so are the bytes it spells.
    assert whole.endswith(b"".join(groups.values())) and row["groups"].max() == len(groups)


def test_equal_tokenizers_give_groups_of_one_token(tmp_path):
    one = TOKENIZERS["byte-level 300"]
    data = build(tmp_path, [{"text": text} for text in texts(5)], one, one, 64, 64)
    row = data[0]
    np.testing.assert_array_equal(row["tokens"], row["second"]["tokens"])
    np.testing.assert_array_equal(row["groups"], row["second"]["groups"])
    counted = row["groups"][row["groups"] > 0]
    np.testing.assert_array_equal(counted, np.arange(1, len(counted) + 1))


def test_ends_of_texts_are_aligned_by_their_role(tmp_path):
    teacher = byte_tokenizer()
    teacher.eos_token = "<|stop|>"
    teacher.add_special_tokens({"eos_token": "<|stop|>"})
    data = build(tmp_path, [{"text": "ab"}, {"text": "abc"}], byte_tokenizer(), teacher)
    row = data[0]
    own = byte_tokenizer().eos_token_id
    ends = row["groups"][row["tokens"] == own]
    theirs = row["second"]["groups"][row["second"]["tokens"] == teacher.eos_token_id]
    assert ends.tolist()[:2] == theirs.tolist()[:2] == [2, 5]


@pytest.mark.parametrize("lengths", [(64, 16), (40, 64)])
def test_long_texts_are_cut_where_both_sides_have_room(tmp_path, lengths):
    ours, theirs = TOKENIZERS["bytes"], TOKENIZERS["byte-level 400"]
    text = " ".join(texts(8))
    data = build(tmp_path, [{"text": text}], ours, theirs, *lengths)
    rows = [data[i] for i in range(len(data))]
    assert data.num_documents > 3 and data.truncated == 0
    table = token_bytes(ours)
    joined = b"".join(table.pieces(data.arrays["tokens"][:].tolist()))
    assert joined == text.encode()
    other = token_bytes(theirs)
    second = b"".join(other.pieces(data.arrays["second_tokens"][:].tolist()))
    assert second == text.encode()
    assert all((row["groups"] > 0).any() for row in rows)


def test_too_long_and_giant_groups_are_left_out_and_counted(tmp_path):
    ours, theirs = TOKENIZERS["bytes"], TOKENIZERS["byte-level 400"]
    long = [{"text": " ".join(texts(8))}, {"text": "the fox"}]
    data = build(tmp_path, long, ours, theirs, long_documents="reject")
    assert (data.too_long, data.used) == (1, 1)
    data = build(tmp_path, long, ours, theirs, long_documents="truncate")
    assert (data.truncated, data.used, data.num_documents) == (1, 2, 2)
    # One token of the teacher spells what does not fit into a row of the student's.
    word = "jumps"
    assert len(theirs(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    records = [{"text": f"a {word} on"}, {"text": "a b"}, {"text": "a"}]
    data = build(tmp_path, records, ours, theirs, 5, 10)
    assert (data.too_long, data.used, data.unaligned) == (1, 1, 1)
    assert any("both tokenizers end together" in notice for notice in data.notices)


def test_what_cannot_be_aligned_is_set_aside_with_its_first_difference(tmp_path):
    from tokenizers import normalizers

    from tests.data.test_alignment import byte_level

    lower = byte_level(300)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    records = [{"text": "the fox"}, {"text": "a Fox of the dog"}]
    path = tmp_path / "left_out.jsonl"
    data = build(tmp_path, records, byte_tokenizer(), lower, quarantine_path=path)
    assert (data.used, data.quarantined) == (1, 1)
    line = json.loads(path.read_text())
    assert line["line"] == 2
    assert "the teacher's tokens do not spell their text: from byte 2 on" in line["reason"]
    with pytest.raises(DataError, match="none of the 1 records"):
        build(tmp_path, records[1:], byte_tokenizer(), lower)
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(MismatchError, match="teacher: .*no fixed bytes"):
        other = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
        build(tmp_path, records, byte_tokenizer(), other)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)


def chat_tokenizers():
    ours, theirs = byte_tokenizer(), byte_tokenizer()
    ours.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    names = ["<|head|>", "<|/head|>", "<|eot|>"]
    theirs.add_special_tokens({"additional_special_tokens": names})
    ours.chat_template, theirs.chat_template = CHATML, LLAMA
    return ours, theirs


def conversation(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


@pytest.mark.parametrize("turns", ["whole", "each"])
def test_answers_are_aligned_and_prompts_are_each_models_own(tmp_path, turns):
    ours, theirs = chat_tokenizers()
    records = [conversation("hi", "yes, you", "and?", "no"), conversation("what", "it is")]
    data = build(tmp_path, records, ours, theirs, 256, 256, loss_on="assistant", turns=turns)
    found = []
    for index in range(len(data)):
        row = data[index]
        mine = spelled(ours, row["tokens"], row["groups"])
        assert mine == spelled(theirs, row["second"]["tokens"], row["second"]["groups"])
        found.append(b"".join(mine.values()))
        ends = {ours.convert_tokens_to_ids("<|im_end|>"): row["tokens"]}
        for token, tokens in ends.items():
            learned = np.append(False, row["mask"][:-1])
            assert (row["groups"][(tokens == token) & learned] > 0).all()
        closing = row["second"]["tokens"] == theirs.convert_tokens_to_ids("<|eot|>")
        assert (row["second"]["groups"][closing] > 0).sum() == len(
            row["groups"][(row["tokens"] == ours.convert_tokens_to_ids("<|im_end|>"))
                          & (row["groups"] > 0)]
        )  # fmt: skip
    assert sorted(b"".join(found)) == sorted(b"yes, younoit is")


def test_templates_that_print_other_answers_set_the_record_aside(tmp_path):
    ours, theirs = chat_tokenizers()
    path = tmp_path / "left_out.jsonl"
    records = [conversation("hi", "yes"), conversation("hi", "yes \n")]
    data = build(
        tmp_path, records, ours, theirs, loss_on="assistant", quarantine_path=path, length=64
    )
    assert (data.used, data.quarantined) == (1, 1)
    told = "the two templates print other answers: from byte 3 on the student's has b'yes"
    assert told in path.read_text()
    theirs.chat_template = None
    with pytest.raises(DataError, match="the teacher's tokenizer has no chat template"):
        build(tmp_path, records, ours, theirs, loss_on="assistant")
    ours, theirs = chat_tokenizers()
    with pytest.raises(ConfigError, match=r"data\.loss_on = all: each model renders"):
        build(tmp_path, records, ours, theirs)


PLAIN = (  # as Llama 2 has it
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["prepend", "metaspace", "byte-level 400"])
def test_white_space_that_a_template_puts_around_answers_is_compared_with_nothing(
    tmp_path, side, name
):
    """And what is counted for notices does not know how that was found."""
    spaced, other = copy.deepcopy(TOKENIZERS[name]), chat_tokenizers()[0]
    spaced.add_special_tokens({"eos_token": "</s>"})
    spaced.chat_template = PLAIN
    ours, theirs = (spaced, other) if side == "student" else (other, spaced)
    # No token spells Z and more: one that did would be compared with nothing.
    records = [conversation("hi", "the fox\n jumpsZ", "and?", "nZ"), conversation("a", "unZ")]
    data = build(tmp_path, records, ours, theirs, 256, 256, loss_on="assistant")
    assert data.quarantined == 0 and data.used == 2 and not data.notices
    found, plain = [], other.convert_tokens_to_ids("<|im_end|>")
    for row in map(data.__getitem__, range(len(data))):
        views = (row["tokens"], row["groups"]), (row["second"]["tokens"], row["second"]["groups"])
        (tokens, groups), (others, their_groups) = views if ours is other else views[::-1]
        # In the other's tokens nothing is added to the answers.
        found += spelled(other, tokens, groups).values()
        assert set(groups) == set(their_groups)
        ends = (others == spaced.eos_token_id) & (their_groups > 0)
        assert ends.sum() == ((tokens == plain) & (groups > 0)).sum() > 0
    assert sorted(b"".join(found)) == sorted(b"the fox\n jumpsZnZunZ")


def test_what_a_template_puts_around_answers_is_found_without_counting_it():
    tokenizer, tally = chat_tokenizers()[0], Tally(said=7, ends_turns=False)
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "<t>\n{{ m.content }}\t")
    codec = prepare(tokenizer)
    encoder = ChatEncoder(codec, tokenizer.chat_template, "assistant", {}, tally)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    table = bytes_of("student", codec)
    assert around(encoder, table) == Around(b"<t>\n", b"\t", end)
    assert (encoder.tally.said, encoder.tally.ends_turns) == (7, False)
    tokenizer.chat_template = CHATML.replace("m.content", "m.content | upper")
    encoder = ChatEncoder(codec, tokenizer.chat_template, "assistant")
    assert around(encoder, table) == "chat template: does not print an answer of one letter"


def test_what_a_record_gives_templates_goes_to_those_that_know_it(tmp_path):
    ours, theirs = chat_tokenizers()
    theirs.chat_template = "{% if mode is defined %}{{ mode }}{% endif %}" + LLAMA
    records = [conversation("hi", "yes") | {"chat_template_kwargs": {"mode": "brief"}}]
    data = build(tmp_path, records, ours, theirs, 256, 256, loss_on="assistant")
    assert "brief" in theirs.decode(data[0]["second"]["tokens"])
    records[0]["chat_template_kwargs"] = {"mood": "brief"}
    with pytest.raises(DataError, match="the chat template knows no `mood`"):
        build(tmp_path, records, ours, theirs, 256, 256, loss_on="assistant")


def test_each_template_is_given_the_words_that_it_knows(tmp_path):
    ours, theirs = chat_tokenizers()
    theirs.chat_template = "{% if mode is defined %}{{ mode }}{% endif %}" + LLAMA
    records, words = [conversation("hi", "yes")], {"mode": "brief"}
    data = build(
        tmp_path, records, ours, theirs, 256, 256, loss_on="assistant", template_kwargs=words
    )
    tokens, second = data[0]["tokens"], data[0]["second"]["tokens"]
    assert "brief" in theirs.decode(second) and "brief" not in ours.decode(tokens)
    with pytest.raises(
        ConfigError, match=r"template_kwargs\.mood: the chat template knows no such"
    ):
        build(tmp_path, records, ours, theirs, loss_on="assistant", template_kwargs={"mood": 1})


def test_completions_are_aligned_and_their_prompts_are_not_learned(tmp_path):
    ours, theirs = TOKENIZERS["bytes"], TOKENIZERS["byte-level 400"]
    records = [{"prompt": "the quick", "completion": " fox jumps"}]
    data = build(tmp_path, records, ours, theirs, loss_on="completion")
    row = data[0]
    groups = spelled(ours, row["tokens"], row["groups"])
    assert b"".join(groups.values()) == b" fox jumps"


def test_another_teacher_is_another_data_set_and_without_one_nothing_changes(tmp_path):
    records = [{"text": text} for text in texts(4)]
    ours = TOKENIZERS["bytes"]
    one = build(tmp_path, records, ours, TOKENIZERS["byte-level 300"])
    prints = {one.fingerprint}
    prints.add(build(tmp_path, records, ours, TOKENIZERS["byte-level 400"]).fingerprint)
    prints.add(build(tmp_path, records, ours, TOKENIZERS["byte-level 300"], length=47).fingerprint)
    path = written(tmp_path, records)
    alone = pipeline.build(path, ours, seq_len=64, cache_dir=tmp_path / "cache")
    prints.add(alone.fingerprint)
    assert len(prints) == 4 and "groups" not in alone[0] and alone.second is None
    batch = next(batching.batches(one, batch_size=2, seed=0, threads=0))[1]
    assert batch.groups.shape == (2, 64) and batch.second["groups"].shape == (2, 48)
    assert dataclasses.replace(batch).second is not None


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=80)
)
def test_packing_keeps_within_both_lengths(lengths):
    sizes = np.asarray(lengths)
    rows = best_fit_both(sizes, (20, 30))
    for view, capacity in enumerate((20, 30)):
        assert (np.bincount(rows, weights=sizes[:, view]) <= capacity).all()
    first = [rows.tolist().index(row) for row in range(rows.max() + 1)]
    assert first == sorted(first)
    starts = np.cumsum(np.concatenate([[[0, 0]], sizes]), axis=0)[:-1]
    pieces = np.stack([starts[:, 0], sizes[:, 0], starts[:, 1], sizes[:, 1]], axis=1)
    segments, edges = plan(pieces, [20, 30], "best_fit")
    assert sorted(map(tuple, segments.tolist())) == sorted(map(tuple, pieces.tolist()))
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        assert (segments[a:b, [1, 3]].sum(0) <= (20, 30)).all()


def test_packing_both_by_hand_takes_the_row_with_the_least_room():
    pieces = np.asarray([[6, 1], [1, 6], [4, 4], [4, 8], [9, 2]])
    assert best_fit_both(pieces, (10, 10)).tolist() == [0, 1, 2, 0, 1]
