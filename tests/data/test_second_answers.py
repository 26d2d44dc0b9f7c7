"""Answers of the student in the tokens of two models: groups, prompts, ends, what is set aside."""

import copy

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxdistill.data import quarantine
from jaxdistill.data.codec import prepare
from jaxdistill.data.records import Record
from jaxdistill.data.second_answers import AnswerViews
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.token_bytes import token_bytes
from jaxdistill.errors import ConfigError, DataError
from tests.data.test_alignment import TOKENIZERS
from tests.data.test_second_view import CHATML, LLAMA, byte_tokenizer, chat_tokenizers, spelled

ASK = Record("prompt", ("how are you?",), 1, ("user",))


def ending(name):
    """A tokenizer with an end of its own."""
    tokenizer = copy.deepcopy(TOKENIZERS[name])
    tokenizer.eos_token = "<s>"
    return tokenizer


def views(student, teacher, seq_len=400, length=400, template=None, words=None):
    return AnswerViews(
        SecondView(teacher, length), prepare(student), seq_len, template, words or {}
    )


def text_view(student, teacher, prompt, *lengths):
    codec = prepare(student)
    ours = [*codec.prefix, *student(prompt, add_special_tokens=False)["input_ids"]]
    return views(student, teacher, *lengths).of(Record("prompt", (prompt,), 1), ours)


def continued(student, prompt, text):
    """The tokens of a text behind a prompt; none where a token would lie in both."""
    whole = student(prompt + text, add_special_tokens=False)["input_ids"]
    before = student(prompt, add_special_tokens=False)["input_ids"]
    return np.asarray(whole[len(before) :] if whole[: len(before)] == before else [], np.int32)


@pytest.mark.parametrize("student", ["bytes", "byte-level 300", "prepend"])
@pytest.mark.parametrize("teacher", ["byte-level 400", "metaspace", "bytes"])
@hypothesis.settings(max_examples=15)
@hypothesis.given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), data=st.data()
)
def test_any_answer_is_aligned_to_its_last_byte_wherever_it_was_cut(student, teacher, text, data):
    """Or set aside, where what was written so far is no UTF-8."""
    hypothesis.assume("\u2581" not in text and "\0" not in text)
    ours, theirs, prompt = TOKENIZERS[student], TOKENIZERS[teacher], "the quick fox:"
    answer = continued(ours, prompt, text)
    hypothesis.assume(len(answer))
    answer = answer[: data.draw(st.integers(1, len(answer)))]
    view = text_view(ours, theirs, prompt)
    made = view.document(answer, False, len(answer))
    written = b"".join(token_bytes(ours).pieces(answer.tolist()))
    assert (prompt + text).encode().startswith(prompt.encode() + written)
    try:
        decoded = written.decode()
    except UnicodeDecodeError:
        assert quarantine.why(made) == "unaligned" and "no UTF-8" in made
        return
    np.testing.assert_array_equal(made.ids, [*view.ours, *answer])
    assert made.loss.sum() == len(answer)
    groups = spelled(ours, made.ids, made.beside.groups)
    assert groups == spelled(theirs, made.beside.ids, made.beside.other_groups)
    assert b"".join(groups.values()) == written
    # The teacher's tokens are those that its tokenizer makes of prompt and answer.
    alone = theirs(prompt, add_special_tokens=False)["input_ids"]
    whole = theirs(prompt + decoded, add_special_tokens=False)["input_ids"]
    if whole[: len(alone)] == alone:
        assert made.beside.ids.tolist()[-len(whole) :] == whole


def test_the_end_of_an_answer_is_the_teachers_end_of_a_text():
    ours, theirs = TOKENIZERS["bytes"], ending("byte-level 400")
    view = text_view(ours, theirs, "the")
    body = continued(ours, "the", " fox")
    made = view.document(np.append(body, ours.eos_token_id), True, 5)
    assert made.beside.ids[-1] == theirs.eos_token_id
    assert made.beside.other_groups[-1] == made.beside.groups[-1] == made.beside.groups.max()
    cut = view.document(body, False, 4)
    assert theirs.eos_token_id not in cut.beside.ids[1:] and cut.beside.groups[-1] > 0
    nothing = view.document(np.asarray([ours.eos_token_id], np.int32), True, 1)
    assert nothing.beside.groups.tolist() == [0, 0, 0, 1]


def test_only_what_counts_is_in_a_group():
    ours, theirs = TOKENIZERS["bytes"], TOKENIZERS["byte-level 400"]
    answer = continued(ours, "the", " fox jumps")
    few = text_view(ours, theirs, "the").document(answer, False, 6)
    assert b"".join(spelled(ours, few.ids, few.beside.groups).values()) == b" fox"  # whole groups
    assert few.loss.sum() == 6
    assert len(few.ids) == 3 + len(answer)


@pytest.mark.parametrize(
    ("answer", "ended", "why", "words"),
    [
        ("日".encode()[:2], False, "unaligned", "no UTF-8 from byte 0 on"),
        (b"a\0b", False, "unaligned", "NUL"),
        (b"a" * 30, False, "too_long", "rows have"),
        (None, False, "unaligned", "special token '<end>' within its answer"),
    ],
)
def test_what_cannot_be_compared_is_set_aside_with_its_reason(answer, ended, why, words):
    ours, theirs = TOKENIZERS["bytes"], TOKENIZERS["byte-level 400"]
    at = {byte: index for index, byte in token_bytes(ours).table.items()}
    tokens = [at[bytes([byte])] for byte in answer or b"ab"]
    tokens = tokens if answer else [tokens[0], ours.eos_token_id, tokens[1]]
    view = text_view(ours, theirs, "a ", 64, 24)
    reason = view.document(np.asarray(tokens, np.int32), ended, len(tokens))
    assert quarantine.why(reason) == why and words in reason


def test_a_prompt_that_the_teacher_cannot_have_is_left_out():
    ours, theirs = TOKENIZERS["bytes"], TOKENIZERS["byte-level 400"]
    reason = text_view(ours, theirs, "é" * 60, 400, 40)
    assert quarantine.why(reason) == "too_long" and "rows of 40" in reason
    from tokenizers import normalizers

    from tests.data.test_alignment import byte_level

    lower = byte_level(300)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "the teacher's tokens do not spell" in text_view(ours, lower, "The fox")
    assert "the student's tokens do not spell" in text_view(lower, ours, "The fox")


@pytest.mark.parametrize("text", ["Fine, 日本 ", "\n\nFine", "<|eot|> is text"])
def test_conversations_are_rendered_by_each_models_own_template(text):
    """Against transformers: the teacher reads what its template makes of the whole conversation."""
    ours, theirs = chat_tokenizers()
    theirs.chat_template = LLAMA.replace(" | trim", "")
    made = views(ours, theirs)
    prompt = ours.apply_chat_template(
        [{"role": "user", "content": "how are you?"}], add_generation_prompt=True
    )["input_ids"]
    view = made.of(ASK, prompt)
    body = ours(text, add_special_tokens=False)["input_ids"]
    end = ours.convert_tokens_to_ids("<|im_end|>")
    document = view.document(np.asarray([*body, end], np.int32), True, len(body) + 1)
    turns = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": text}]
    if "<|" not in text:  # transformers takes it for the token
        whole = theirs.apply_chat_template(turns)["input_ids"]
        assert document.beside.ids.tolist() == whole
    stop = theirs.convert_tokens_to_ids("<|eot|>")
    assert (document.beside.ids == stop).sum() == 2  # the user's, and the answer's
    groups = spelled(ours, document.ids, document.beside.groups)
    assert b"".join(groups.values()) == text.encode()
    assert document.beside.groups[-1] == document.beside.other_groups[-1] == len(groups)
    # An answer that goes on with the assistant's last turn.
    begun = Record("prompt", ("how?", "So "), 1, ("user", "assistant"))
    view = made.of(begun, [*prompt, *ours("So ", add_special_tokens=False)["input_ids"]])
    more = view.document(np.asarray(body, np.int32), False, len(body))
    assert theirs.decode(more.beside.ids.tolist()).endswith("So " + text)


PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["prepend", "metaspace"])
def test_spaces_that_a_template_puts_around_answers_are_not_of_them(side, name):
    """As Llama 2 has it: to one model an answer has a space at either end, and not to the other."""
    spaced, other = ending(name), byte_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    spaced.chat_template, other.chat_template = PLAIN, CHATML
    ours, theirs = (spaced, other) if side == "student" else (other, spaced)
    prompt = ours.apply_chat_template(
        [{"role": "user", "content": "how are you?"}], add_generation_prompt=True
    )["input_ids"]
    view = views(ours, theirs).of(ASK, prompt)
    letters = ["\u2581"] * (side == "student") + ["f", "o", "x"]
    body = ours.convert_tokens_to_ids(letters)
    made = view.document(np.asarray(body, np.int32), False, len(body))
    read = theirs.decode(made.beside.ids[made.beside.other_groups > 0].tolist())
    if side == "student":
        assert read == "fox"
    else:
        spaces = token_bytes(theirs).pieces(made.beside.ids.tolist())
        assert b"".join(spaces).endswith(b"[/INST] fox")
    assert made.beside.groups[-1] == made.beside.other_groups[-1] > 0
    tail = ours.convert_tokens_to_ids(["\u2581"] * (side == "student"))
    end = ours.convert_tokens_to_ids("<|im_end|>") if ours is other else ours.eos_token_id
    whole = view.document(np.asarray([*body, *tail, end], np.int32), True, 9).beside
    assert whole.groups[-1] == whole.other_groups[-1] == whole.groups.max() > 0
    if side == "student":
        assert whole.groups.max() == 4
        assert theirs.decode(whole.ids.tolist()).endswith("\nfox<|im_end|>")
    else:
        last = theirs.convert_ids_to_tokens(whole.ids.tolist())[-2:]
        assert last[0].endswith("\u2581") and last[1] == "<s>"
    if side == "student":  # behind words of its own a space is the answer's
        begun = Record("prompt", ("how?", "So"), 1, ("user", "assistant"))
        turns = [
            {"role": "user", "content": "how?"},
            {"role": "assistant", "content": "So"},
        ]
        ids = ours.apply_chat_template(turns)["input_ids"][:-1]
        more = views(ours, theirs).of(begun, ids).document(np.asarray(body, np.int32), False, 4)
        assert theirs.decode(more.beside.ids.tolist()).endswith("So fox")


def test_each_template_is_given_the_words_that_it_knows():
    ours, theirs = chat_tokenizers()
    told = "{% if enable_thinking is defined %}<t>{{ enable_thinking }}</t>{% endif %}"
    theirs.chat_template = LLAMA + told
    prompt = ours.apply_chat_template(
        [{"role": "user", "content": "how are you?"}], add_generation_prompt=True
    )["input_ids"]
    view = views(ours, theirs, words={"enable_thinking": False}).of(ASK, prompt)
    assert theirs.decode(view.theirs).endswith("<t>False</t>")
    with pytest.raises(ConfigError, match=r"template_kwargs\.thinking: the chat template knows no"):
        views(ours, theirs, words={"thinking": False}).of(ASK, prompt)
    theirs.chat_template = None
    with pytest.raises(DataError, match="the teacher's tokenizer has no chat template"):
        views(ours, theirs).of(ASK, prompt)
