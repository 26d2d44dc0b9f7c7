import pytest

from jaxdistill.data.records import KINDS, Record, Rejected, kinds_of, parse, printable


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
        ({"text": None}, "text", "got NoneType"),
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
        (turns(("user", ["a"])), "messages", "content of message 1 must be a string"),
        (turns(("assistant", " ")), "messages", "assistant's message 1 has no text"),
        (turns(("user", "a\0")), "messages", "NUL"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages",
            "`tool_calls` in message 1",
        ),
        ({**turns(("user", "a")), "tools": [{}]}, "messages", "`tools` is not supported"),
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
    assert list(KINDS) == ["text", "messages", "completion"]


def test_nothing_unprintable_is_left():
    assert printable("a\tb\nc\u202e😀\x9b\ud800") == "a\\tb\nc\\u202e😀\\x9b\\ud800"
