import pytest

from jaxdistill.data.records import SHOWN_KINDS, Record, Rejected, kinds_of, parse
from jaxdistill.data.rules import Empty, Unlearned, printable


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_good_records_keep_their_texts_as_they_are():
    assert parse({"text": " a\r\nb "}, "text", 3) == Record("text", (" a\r\nb ",), 3)
    assert parse({"prompt": "", "completion": "x"}, "completion", 1).texts == ("", "x")
    record = parse(turns(("user", "hi"), ("assistant", "yes")), "messages", 2)
    assert (record.texts, record.roles) == (("hi", "yes"), ("user", "assistant"))


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ([1], "text", "not an object: got list"),
        ({"txt": "a"}, "text", "missing field `text`: found `txt`"),
        ({}, "text", "missing field `text`: found no fields"),
        ({"text": 3}, "text", "wrong type: field `text` must be a string, got int"),
        ({"text": None}, "text", "empty"),
        ({"text": " \n"}, "text", "empty"),
        ({"text": "a\0b"}, "text", "NUL"),
        ({"text": "a\ud800"}, "text", "lone surrogate"),
        ({"text": "é" * 5_000_001}, "text", "too large"),
        ({"prompt": "a"}, "completion", "missing field `completion`"),
        ({"prompt": "a", "completion": ""}, "completion", "empty: field `completion`"),
        ({"prompt": "a\0", "completion": "b"}, "completion", "field `prompt` contains a NUL"),
        ({"messages": "hi"}, "messages", "must be a list, got str"),
        ({"messages": []}, "messages", "holds no message"),
        ({"messages": ["hi"]}, "messages", "message 1 must be an object"),
        ({"messages": [{"role": "user"}]}, "messages", "missing field `content` in message 1"),
        (turns(("user", "a"), ("wizard", "b")), "messages", "unknown role 'wizard' in message 2"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages", "unknown role"),
        (
            turns(("user", ["a"])),
            "messages",
            "part 1 of the content of message 1 must be an object",
        ),
        (turns(("assistant", " ")), "messages", "assistant's message 1 has no text"),
        (turns(("user", "a\0")), "messages", "NUL"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages",
            "`tool_calls` of message 1: a call has no name",
        ),
        (
            {**turns(("user", "a")), "tools": [{}]},
            "messages",
            "tool 1 of field `tools` has no name",
        ),
    ],
)
def test_every_rule_rejects_with_its_reason(value, kind, reason):
    rejected = parse(value, kind, 7)
    assert isinstance(rejected, Rejected) and rejected.line == 7
    assert reason in rejected.reason


def test_the_size_limit_counts_bytes_not_characters():
    assert isinstance(parse({"text": "é" * 5_000_000}, "text", 1), Record)
    assert isinstance(parse({"text": "a" * 10_000_000}, "text", 1), Record)
    assert isinstance(parse({"text": "a" * 10_000_001}, "text", 1), Rejected)


def test_a_user_may_say_nothing_but_the_assistant_may_not():
    assert isinstance(parse(turns(("system", ""), ("user", "")), "messages", 1), Record)


def test_kinds_need_all_their_fields():
    assert kinds_of({"prompt": 1}) == []
    assert kinds_of({"prompt": 1, "completion": 2, "text": 3}) == ["text", "completion"]
    assert kinds_of({"instruction": 1, "output": 2, "conversations": 3}) == ["sharegpt", "alpaca"]
    assert SHOWN_KINDS == ("text", "messages", "completion", "sharegpt", "alpaca", "pairs")


def test_nothing_unprintable_is_left():
    assert printable("a\tb\nc\u202e😀\x9b\ud800") == "a\\tb\nc\\u202e😀\\x9b\\ud800"


def chat(*messages, **more):
    return {"messages": [*messages], **more}


def user(content="q", **more):
    return {"role": "user", "content": content, **more}


def bot(content="a", **more):
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("fields", "mark"),
    [({"weight": 0}, False), ({"weight": 1}, True), ({"weight": 1.0}, True),
     ({"train": False}, False), ({"training": True}, True), ({"trainable": False}, False),
     ({"loss": False}, False), ({"loss_mask": 0}, False), ({"masked": True}, False),
     ({"masked": 0}, True), ({"weight": None}, None), ({"weight": 0, "masked": True}, False)],
)  # fmt: skip
def test_marks_of_turns_and_records_in_all_spellings(fields, mark):
    record = parse(chat(user(), bot(**fields), user(), bot()), "messages", 1)
    assert (record.conversation.marks[1] if mark is not None else record.conversation) is mark
    # The same mark on the record takes all of it.
    for value, kind in (({"text": "a"}, "text"), (chat(user(), bot()), "messages")):
        found = parse({**value, **fields}, kind, 1)
        assert isinstance(found, Rejected) is (mark is False)
        assert mark is not False or isinstance(found.reason, Unlearned)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (chat(user(), bot(weight=0.5)), "field `weight` of message 2 is '0.5': use true, false"),
        (chat(user(), bot(train="no")), "field `train` of message 2 is 'no'"),
        (chat(user(), bot(loss_mask=[0, 1])), "field `loss_mask` of message 2"),
        (chat(user(), bot(weight=1, masked=True)), "`weight` and `masked` of message 2 contradict"),
        (chat(user(), bot(), loss=2.31), "field `loss` of the record is '2.31'"),
        (chat(user(), bot(), functions=[{"name": "f"}]), "`functions` of the record is not"),
        (chat(user(), bot(function_call={"name": "f"})), "write it as `tool_calls`"),
        (chat(user(), bot(train_on_turn=False)), "message 2 is not supported: say `masked`"),
        (chat(user(), bot(is_masked=True)), "`is_masked` of message 2 is not supported"),
        (chat(user(), bot(), weights=[0, 1]), "write `weight` 0 or 1 for each message"),
        (chat(user(), bot(), images=["a.png"]), "`images` of the record is not supported"),
        (chat(user(), bot(), chat_template_kwargs={"messages": 1}), "must not set `messages`"),
        (chat(user([{"type": "image_url"}]), bot()), "is of type 'image_url': only texts are read"),
        (chat(user(reasoning_content="x"), bot()), "only the assistant thinks"),
        (chat(user(), bot(thinking="x", reasoning="y")), "hold different texts"),
        (chat(user(), bot(tool_calls=[{"name": "f", "arguments": "["}])), "are no JSON object"),
        (chat(user(), bot(), system="s", tools={}), "must be a list of objects"),
        (chat({"role": "system", "content": "a"}, user(), bot(), system="b"), "leave one of them"),
        (chat({"role": "tool", "name": "t"}), "missing field `content`"),
    ],
)  # fmt: skip
def test_what_changes_the_meaning_and_is_not_read_is_refused(value, reason):
    assert reason in parse(value, "messages", 1).reason


@pytest.mark.parametrize(
    ("kind", "field", "remedy"),
    [("completion", "input", "write it into `prompt`"), ("completion", "suffix", "into `prompt`"),
     ("completion", "context", "write it into `prompt`"), ("alpaca", "context", "as `input`"),
     ("completion", "history", "into `prompt`"), ("completion", "system_prompt", "into `prompt`"),
     ("alpaca_prompt", "history", "use `format: alpaca`"),
     ("alpaca_prompt", "system", "use `format: alpaca`")],
)  # fmt: skip
def test_what_the_student_would_not_be_shown_is_refused(kind, field, remedy):
    names = ("prompt", "completion") if kind == "completion" else ("instruction", "output")
    value = dict.fromkeys(names, "a")
    assert not isinstance(parse({**value, field: ""}, kind, 1), Rejected)
    reason = parse({**value, field: "b"}, kind, 1).reason
    assert f"`{field}` of the record" in reason and remedy in reason


UNREAD_MARKS = (
    ("loss_scale", 0.5), ("hasLoss", False), ("skip_loss", "true"), ("loss-mask", [0, 1]),
    ("completion_mask", [1, 1]), ("train_on_inputs", False), ("shouldTrain", 0), ("trained", "no"),
    ("is_trainable", True), ("learnable", 1), ("Weight", 0), ("token_weights", [0.1, 1]),
    ("sample_weight", 3), ("freeze", True), ("ignore", 1),
)  # fmt: skip
NO_MARKS = (
    ("train_step", 1), ("training_set", 0), ("loss_fn", "mse"), ("weight_kg", 70),
    ("learning", "a"), ("skipper", 1), ("mask_token", "x"), ("id", 0), ("score", 1),
    ("is_correct", True), ("trained", None), ("loss_scale", ""), ("label", 1),
)  # fmt: skip


@pytest.mark.parametrize(("name", "value"), UNREAD_MARKS)
def test_marks_under_other_names_are_refused(name, value):
    for record, kind, where in (
        (chat(user(), bot(**{name: value})), "messages", "message 2"),
        (chat(user(), bot(), **{name: value}), "messages", "the record"),
        ({"text": "a", name: value}, "text", "the record"),
        ({"prompt": "a", "completion": "b", name: value}, "completion", "the record"),
    ):
        reason = parse(record, kind, 1).reason
        assert f"field `{name}` of {where} is not supported: say `weight` 0 or 1" in reason


@pytest.mark.parametrize(("name", "value"), NO_MARKS)
def test_facts_about_a_record_are_listed(name, value):
    for record, kind, listed in (
        (chat(user(), bot(**{name: value})), "messages", f"messages.{name}"),
        ({"text": "a", name: value}, "text", name),
        ({"prompt": "a", "completion": "b", name: value}, "completion", name),
    ):
        assert isinstance(parse(record, kind, 1, unread := set()), Record)
        assert unread == {listed}


@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        (chat(user(), bot(thinking_blocks=[{"text": "x"}])), "write it as `reasoning_content`"),
        (chat(user(), bot(tool_call={"name": "f"})), "write it as `tool_calls`"),
        (chat(user(tool_results=["4"]), bot()), "write each as a message of the role `tool`"),
        (chat(user(image_urls=["a.png"]), bot()), "only text is read"),
        (chat(user(), bot(), system_prompt="s"), "write it as `system`"),
        (chat(user(), bot(), context="c"), "write it into the messages"),
        (chat(user(), bot(), enable_thinking=False), "write it into `chat_template_kwargs`"),
        (chat(user(), bot(), rejected_response="b"), "as `chosen` and `rejected`"),
        (chat(user(), bot(), label=False), "keep the records whose answer is wanted"),
    ],
)
def test_text_and_verdicts_under_names_of_other_tools_are_refused(record, remedy):
    assert remedy in parse(record, "messages", 1).reason


def test_what_a_chat_holds_today():
    record = parse(
        chat(
            user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], name="bob"),
            bot(None, tool_calls=[CALL], reasoning_content="why"),
            {"role": "tool", "content": "42", "tool_call_id": "x"},
            bot("c", weight=0),
            bot("d"),
            system="s",
            tools='[{"function": {"name": "add"}}]',
            chat_template_kwargs={"enable_thinking": False},
            id=7,
        ),
        "messages",
        1,
        unread := set(),
    )
    assert record.texts == ("s", "ab", "", "42", "c", "d") and unread == {"id"}
    more = record.conversation
    assert more.fields[1] == {"name": "bob"} and more.fields[3] == {"tool_call_id": "x"}
    made = more.fields[2]
    assert made["content"] is None and made["reasoning_content"] == "why"
    assert made["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert more.marks == (None, None, None, None, False, None)
    assert more.tools == ({"function": {"name": "add"}},)
    assert more.variables == {"enable_thinking": False}


def test_empty_and_unlearned_records_are_no_broken_ones():
    for value, kind in (
        ({"text": ""}, "text"),
        ({"text": None}, "text"),
        ({"prompt": "a", "completion": " "}, "completion"),
        ({"messages": []}, "messages"),
        (chat(user(), bot(" ")), "messages"),
        ({"instruction": "a", "output": ""}, "alpaca"),
    ):
        assert isinstance(parse(value, kind, 1).reason, Empty)
    assert isinstance(parse({}, "text", 1, table=True).reason, Empty)
    assert not isinstance(parse({}, "text", 1).reason, Empty)
    assert isinstance(parse(chat(user(), bot(weight=0)), "messages", 1).reason, Unlearned)
    assert isinstance(parse(chat(user(), bot(" ", weight=0), bot()), "messages", 1), Record)


def test_a_prompt_and_a_completion_of_turns():
    record = parse({"prompt": [user(), bot("x"), user()], "completion": [bot()]}, "completion", 1)
    assert record.kind == "dialogue" and record.conversation.prompt == 3
    assert record.texts == ("q", "x", "q", "a")
    mixed = parse({"prompt": "q", "completion": [bot()]}, "completion", 1)
    assert "field `prompt` must be a list" in mixed.reason


def test_sharegpt_and_alpaca_are_converted():
    said = lambda who, text, **more: {"from": who, "value": text, **more}
    turns = [said("human", "q"), said("gpt", "a", weight=0), said("human", "r"), said("gpt", "b")]
    record = parse({"conversations": turns, "system": "s"}, "sharegpt", 1)
    assert (record.kind, record.texts) == ("messages", ("s", "q", "a", "r", "b"))
    assert record.roles == ("system", "user", "assistant", "user", "assistant")
    assert record.conversation.marks[2] is False
    assert (
        "unknown speaker 'wizard'"
        in parse({"conversations": [said("wizard", "q")]}, "sharegpt", 1).reason
    )
    row = {"instruction": "i", "input": "n", "output": "o", "history": [["p", "r"]]}
    assert parse(row, "alpaca", 1).texts == ("p", "r", "i\n\nn", "o")
    assert parse({"instruction": "i", "output": "o"}, "alpaca", 1).texts == ("i", "o")
    prompt, completion = parse({**row, "history": None}, "alpaca_prompt", 1).texts
    assert completion == "o" and prompt.endswith(
        "### Instruction:\ni\n\n### Input:\nn\n\n### Response:\n"
    )
    assert ", paired with an input that provides further context" in prompt
