"""Answers behind the teacher's prompt: the same tokens on both sides, and what is left out."""

import json

import numpy as np
import pytest

from jaxdistill.data import pipeline, privileged
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.models.byte_tokenizer import byte_tokenizer

TEMPLATE = "Solution: {solution}\n{prompt}"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


def chats():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def completion(prompt="2+2=", answer="4", **fields):
    return {"prompt": prompt, "completion": answer, **fields}


def conversation(*contents, **fields):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return {"messages": turns, **fields}


def build(folder, records, tokenizer=None, length=96, template=TEMPLATE, view=None, **options):
    path = folder / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    tokenizer = tokenizer or byte_tokenizer()
    kwargs = options.get("template_kwargs") or {}
    made = PrivilegedView(tokenizer, length, template, template_kwargs=kwargs, **(view or {}))
    options = {"seq_len": 64, "loss_on": "completion", "max_bad_fraction": 0.0} | options
    return pipeline.build(path, tokenizer, cache_dir=folder / "cache", second=made, **options)


def documents(data):
    """(the student's text, the teacher's, what is aligned, what counts) of every document."""
    decode = byte_tokenizer().decode if data.kind == "completion" else chats().decode
    for index in range(len(data)):
        row = data[index]
        second = row["second"]
        for number in range(1, row["segment_ids"].max() + 1):
            mine, theirs = row["segment_ids"] == number, second["segment_ids"] == number
            groups, others = row["groups"][mine], second["groups"][theirs]
            counted = np.append(False, row["mask"][:-1])[mine]
            aligned = [
                (int(group), int(row["tokens"][mine][groups == group].item()),
                 int(second["tokens"][theirs][others == group].item()))
                for group in groups[groups > 0]
            ]  # fmt: skip
            assert sorted(others[others > 0]) == sorted(groups[groups > 0])
            yield (
                decode(row["tokens"][mine]),
                decode(second["tokens"][theirs]),
                aligned,
                decode(row["tokens"][mine][counted]),
            )


def test_an_answer_is_the_same_tokens_behind_both_prompts(tmp_path):
    records = [
        completion(f"{n}+1=", str(n + 1), solution="it is " * (n % 4 + 1)) for n in range(40)
    ]
    found = {}
    for ours, theirs, aligned, counted in documents(build(tmp_path, records)):
        assert all(mine == other for _, mine, other in aligned)
        assert len(aligned) == len(counted.replace("<end>", "."))
        found[ours] = theirs
    assert found == {
        f"{one['prompt']}{one['completion']}<end>": TEMPLATE.format(**one)
        + one["completion"]
        + "<end>"
        for one in records
    }


def test_braces_of_the_records_and_other_braces_of_the_template_are_text(tmp_path):
    record = completion("{solution} {0}", "x", solution="{prompt}")
    (found,) = documents(build(tmp_path, [record], template="{a b} {} {solution}:{prompt}"))
    assert found[1] == "{a b} {} {prompt}:{solution} {0}x<end>"


def test_of_a_conversation_the_last_answer_counts_behind_the_last_question(tmp_path):
    records = [conversation("hi", "yes", "and <|im_end|>?", "no", solution="say no")]
    data = build(tmp_path, records, chats(), 256, loss_on="assistant", seq_len=200)
    ((ours, theirs, aligned, counted),) = documents(data)
    assert counted == "no<|im_end|>" and all(mine == other for _, mine, other in aligned)
    start = (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\n"
    )
    end = "<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    assert ours.startswith(start + "and <|im_end|>?" + end)
    assert theirs == start + "Solution: say no\nand <|im_end|>?" + end
    inert = chats().convert_tokens_to_ids("<|im_end|>")
    assert (data[0]["second"]["tokens"] == inert).sum() == 4, "what a user writes stays text"


@pytest.mark.parametrize("lengths", [(64, 40), (16, 96)])
def test_what_leaves_no_room_for_the_answer_is_left_out_and_counted(tmp_path, lengths):
    records = [completion(solution="x" * n) for n in (5, 50)] + [completion("2" * 20, solution="y")]
    data = build(tmp_path, records, seq_len=lengths[0], length=lengths[1])
    assert (data.used, data.too_long, data.quarantined) == (2, 1, 0)
    assert all(theirs.endswith(("4<end>", "2<end>")) for _, theirs, _, _ in documents(data))
    assert any("have nothing to learn within seq_len" in one for one in data.notices)


def test_a_context_is_cut_at_its_end_and_told_where_that_is_asked(tmp_path):
    records = [completion(solution="abcdefghij" * n) for n in (1, 5)]
    data = build(tmp_path, records, length=40, view={"long": "cut"})
    found = [theirs for _, theirs, _, _ in documents(data)]
    whole = "Solution: abcdefghij\n2+2=4<end>"
    assert sorted(map(len, found))[0] == len(whole) and whole in found
    (cut,) = [one for one in found if one != whole]
    assert cut.startswith("Solution: abcdefghijabcdefg") and cut.endswith("\n2+2=4<end>")
    assert len(byte_tokenizer()(cut.removesuffix("<end>"))["input_ids"]) + 1 == 40
    assert data.notices == ("the context of 1 of 2 records was cut to leave room for the answer",)
    with pytest.raises(DataError, match="none of the 2 records"):
        build(tmp_path, records, length=12, view={"long": "cut"})


def test_records_without_the_field_are_broken_or_left_out_by_choice(tmp_path):
    records = [
        completion(solution="s"),
        completion("3+3=", "6"),
        completion("1+1=", "2", solution=" "),
    ]
    with pytest.raises(DataError, match=r"2 of 3 records \(66.67%\).*no `solution`, which teacher"):
        build(tmp_path, records)
    data = build(tmp_path, records, view={"without": "mask"})
    assert (data.used, data.without_context) == (1, 2)
    assert any("2 of 3 records hold nothing for the teacher's prompt" in n for n in data.notices)


def test_prompts_that_end_unlike_are_refused_with_their_ends_or_skipped(tmp_path):
    records, template = [completion(solution="s")], "{prompt}\n{solution}"
    with pytest.raises(DataError, match="the student's prompt ends in '=', the teacher's in 's'"):
        build(tmp_path, records, template=template)
    data = build(tmp_path, records, template=template, view={"skip_first": 1})
    ((_, theirs, aligned, counted),) = documents(data)
    assert (theirs, len(aligned), counted) == ("2+2=\ns4<end>", 2, "<end>")
    short = [completion(answer="", solution="s")]
    with pytest.raises(DataError, match="empty"):
        build(tmp_path, short, view={"skip_first": 1})


def test_modes_of_the_chat_template_must_begin_the_answer_alike(tmp_path):
    records, loss = [conversation("hi", "yes", solution="s")], {"loss_on": "assistant"}
    off = {"enable_thinking": False}
    for ours, theirs in ((off, {"enable_thinking": True}), ({}, off)):
        with pytest.raises(
            ConfigError, match="template_kwargs: the student's answers begin behind"
        ):
            build(
                tmp_path,
                records,
                chats(),
                template_kwargs=ours,
                view={"own_kwargs": theirs},
                **loss,
            )
    build(tmp_path, records, chats(), template_kwargs=off, view={"own_kwargs": off}, **loss)
    skips = {"own_kwargs": off, "skip_first": 1}
    one = build(tmp_path, records, chats(), view=skips, **loss)
    other = build(tmp_path, records, chats(), view={"skip_first": 1}, **loss)
    assert one.fingerprint != other.fingerprint


def test_contexts_that_say_no_more_than_the_answer_are_told(tmp_path):
    pairs = [
        ("4", "4"), ("It is 4, then.", " it IS\n4."), ("It is 14.", "4"), ("6", "3+3 is 6"),
        ("a 4", "..."), ("x = -4", "x = 4"),
    ]  # fmt: skip
    records = [completion(f"{n}=", answer, solution=said) for n, (answer, said) in enumerate(pairs)]
    notices = build(tmp_path, records).notices
    assert any("context of 2 of 6 records is the answer, or a part of it" in one for one in notices)


@pytest.mark.parametrize(
    ("records", "options", "error", "words"),
    [
        (
            [{"text": "a b"}],
            {"loss_on": "all"},
            DataError,
            "'text', which has no prompt and answer",
        ),
        (
            [completion()],
            {"loss_on": "all"},
            ConfigError,
            "data.loss_on = all: teacher.self.context",
        ),
        (
            [completion()],
            {"long_documents": "truncate"},
            ConfigError,
            "data.long_documents = trunca",
        ),
        ([conversation("a", "b")], {"turns": "each", "loss_on": "assistant"}, ConfigError, "turns"),
    ],
)
def test_what_has_no_whole_answer_is_refused(tmp_path, records, options, error, words):
    with pytest.raises(error, match=words):
        build(tmp_path, records, chats(), **options)


def test_another_context_is_another_data_set(tmp_path):
    records = [completion(solution="s")]
    one = build(tmp_path, records)
    for options in ({"template": "{solution} {prompt}"}, {"length": 80}, {"view": {"long": "cut"}}):
        assert build(tmp_path, records, **options).fingerprint != one.fingerprint
    assert build(tmp_path, records).fingerprint == one.fingerprint


def test_phrases_are_neighbouring_words_of_the_template():
    template = "Here is a reference solution:\n{solution}\n{prompt} Correctly solve the question."
    assert privileged.phrases(template) == ("reference solution", "correctly solve")
