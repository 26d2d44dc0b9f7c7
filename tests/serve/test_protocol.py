"""What is asked for: fields by their meaning, null as absent, all others refused by name."""

import typing

import pytest

from jaxdistill.data.conversations import ROLES
from jaxdistill.data.prompting import Prompter
from jaxdistill.errors import DataError
from jaxdistill.serve import protocol
from jaxdistill.serve.protocol import BadRequest, ChatBody, CompletionBody
from tests.serve.clients import post

TURN = {"role": "user", "content": "x"}


def _read(chat, change):
    own = {"messages": [TURN]} if chat else {"prompt": "x"}
    return protocol.read(ChatBody if chat else CompletionBody, own | change)


@pytest.mark.parametrize(
    ("chat", "change", "words"),
    [
        (False, {"n": 0}, "n: 0 must be greater than or equal to 1"),
        (False, {"n": 257}, "n: 257 must be less than or equal to 256"),
        (False, {"n": True}, "n: True must be a valid integer"),
        (False, {"n": 200, "prompt": ["a", "b"]}, "prompt: 2 prompts times n = 200"),
        (False, {"prompt": ""}, "prompt: '' "),
        (False, {"prompt": []}, "prompt: a list of 0 "),
        (False, {"prompt": None}, "prompt: is missing"),
        # The form is that of the first item: what is wrong is told of it alone.
        (False, {"prompt": ["a", ""]}, "^prompt.1: '' string should have at least 1 character$"),
        (False, {"prompt": [1, "a"]}, "^prompt.1: 'a' must be a valid integer$"),
        (False, {"prompt": [True]}, "^prompt.0: True must be a valid integer$"),
        (False, {"prompt": [[1], "a"]}, "^prompt.1: 'a' must be a valid list$"),
        (False, {"prompt": [[1], []]}, "^prompt.1: a list of 0 "),
        (False, {"stop": ["a", None]}, "^stop.1: None must be a valid string$"),
        (False, {"store": True}, "store: is not supported by this server: leave it out"),
        (False, {"\x1b[2J": 1}, r"\x1b[2J: is not supported"),
        (False, {"temperature": -1}, "temperature: -1 must be greater"),
        (False, {"temperature": float("inf")}, "temperature: inf must be"),
        (False, {"temperature": 10**400}, "temperature: "),
        (False, {"seed": -1}, "seed: -1 must be greater"),
        (False, {"stop": ["a"] * 17}, "stop: "),
        (False, {"stop": {"a": 1}}, "stop: "),
        (False, {"stop": "a" * 300}, "stop: "),
        (False, {"stop": ""}, "stop: "),
        (False, {"logprobs": 21}, "logprobs: 21 must be"),
        (False, {"logprobs": True}, "logprobs: True must be"),
        (False, {"logit_bias": {"x": 1.0}}, "logit_bias: 'x' must be the id of a token"),
        (False, {"logit_bias": {"007": 1.0}}, "logit_bias: '007' must be the id of a token"),
        (False, {"logit_bias": {"\u0661": 1.0}}, "must be the id of a token"),
        (False, {"logit_bias": {"1\n": 1.0}}, "must be the id of a token"),
        (False, {"logit_bias": {"1": 101}}, "logit_bias.1: 101 must be"),
        (False, {"stream": True, "logprobs": 1}, "logprobs: do not come in a stream"),
        (False, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs: do not come"),
        (False, {"stream_options": {"include_usage": True}}, "stream_options: have a meaning"),
        (False, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x: is not supported"),
        (False, {"temprature": 0.2}, "temprature: is not supported by this server: did you mean"),
        (False, {"messages": [TURN]}, "messages: is not supported"),
        (False, {"echo": True}, "echo: True must be False"),
        (False, {"best_of": 2}, "best_of: 2 must be 1"),
        (False, {"suffix": "x"}, "suffix: is not supported"),
        (False, {"max_completion_tokens": 5}, "max_completion_tokens: is not supported"),
        (True, {"messages": []}, "messages: a list of 0 "),
        (True, {"messages": [{"content": "x"}]}, "messages.0.role: is missing"),
        (True, {"messages": [TURN | {"name": "me"}]}, "messages.0.name: is not supported"),
        (
            True,
            {"messages": [TURN | {"content": [{"type": "image_url"}]}]},
            "^messages.0.content.0.type: 'image_url' must be 'text'; messages.0.content.0.text",
        ),
        (True, {"messages": [{"role": "user"}]}, "^messages.0.content: is missing$"),
        (True, {"messages": [TURN | {"content": None}]}, "^messages.0.content: is missing$"),
        (True, {"messages": [TURN | {"role": "wizard"}]}, "messages.0.role: 'wizard' must be 'sys"),
        (True, {"messages": [TURN] * 2049}, "messages: a list of 2049 list should have at most 2"),
        (
            True,
            {"messages": [TURN | {"content": [{"type": "text", "text": "x", "cache": 1}]}]},
            "messages.0.content.0.cache: is not supported",
        ),
        (True, {"messages": [TURN | {"tool_calls": [{}]}]}, "messages.0.tool_calls: is not supp"),
        (True, {"response_format": {"type": "json_object"}}, "response_format.type: 'json_object'"),
        (True, {"tools": [{"type": "function"}]}, "tools: a list of 1 "),
        (True, {"tool_choice": "auto"}, "tool_choice: is not supported"),
        (True, {"top_logprobs": 3}, "top_logprobs: needs logprobs: true"),
        (True, {"prompt_logprobs": 3}, "prompt_logprobs: is not supported"),
    ],
)
def test_what_is_not_served_is_refused_by_name(chat, change, words):
    with pytest.raises(BadRequest) as caught:
        _read(chat, change)
    said, whole = f"^{caught.value}$", words[:1] == "^"
    assert (said.startswith(words) if whole else words in said) and len(said) < 500


def test_roles_are_those_of_records():
    assert typing.get_args(protocol.Turn.model_fields["role"].annotation) == ROLES


def test_null_is_absent_and_neutral_values_are_taken():
    body = _read(True, {"max_completion_tokens": None, "max_tokens": 6, "logprobs": None})
    assert body.limit == 6 and body.alternatives is None
    assert _read(True, {"max_completion_tokens": 4, "max_tokens": 6}).limit == 4
    given = {name: None for name in CompletionBody.model_fields if name != "prompt"}
    assert _read(False, given) == _read(False, {})
    _read(False, {"echo": False, "best_of": 1, "user": "me", "top_k": -1, "stream_options": None})
    _read(True, {"tools": [], "response_format": {"type": "text"}})
    # What OpenAI's client sends back of an answer of its own.
    said = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None,
            "annotations": []}  # fmt: skip
    body = _read(True, {"messages": [TURN, said, {"role": "user", "content": [
        {"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}]})  # fmt: skip
    assert [turn.text for turn in body.messages] == ["x", "a", "bc"]
    part = {"type": "text", "text": "b", "annotations": None, "cache_control": None}
    body = _read(True, {"messages": [TURN | {"content": [part]}]})
    assert [turn.text for turn in body.messages] == ["b"]
    _read(True, {"response_format": {"type": "text", "json_schema": None}})
    assert _read(False, {"logit_bias": {"5": None, "0": 1}}).biases == {0: 1.0}
    assert _read(False, {"logit_bias": None}).biases == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 4000}, "prompt has 1 tokens, which with max_tokens = 4000 do not fit the"),
        ({"prompt": "a" * 5000}, "do not fit the"),
        ({"prompt": ["a", "b" * 5000]}, "prompt.1 has 5000 tokens"),
        ({"prompt": ["x", [1]]}, "prompt"),
        ({"prompt": [257]}, "each from 0 to 256"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": "\0"}, "NUL"),
        ({"prompt": "a<end>b"}, "holds the special token '<end>'"),
        ({"stop_token_ids": [300]}, "stop_token_ids: [300] must be tokens from 0 to 256"),
        ({"logit_bias": {"300": 1}}, "logit_bias: [300] must be tokens from 0 to 256"),
        ({"prompt_logprobs": 300}, "prompt_logprobs: 300 must be from 0 to 257"),
        ({"n": 256, "logprobs": 20}, "logprobs: "),
        ({"prompt": [5] * 100, "n": 50, "prompt_logprobs": 200}, "prompt_logprobs: 5000 tokens"),
    ],
)
def test_what_the_model_cannot_do_is_told(port, change, words):
    body = {"prompt": "x", "max_tokens": None if "n" in change else 4} | change
    code, reply = post(port, "/v1/completions", body)
    assert code == 400 and words in reply["error"]["message"]
    assert reply["error"]["type"] == "invalid_request_error"
    assert not reply["error"]["message"].startswith("generate")


def test_special_tokens_are_what_the_server_was_told(served, talker, monkeypatch):
    end = talker.tokenizer.eos_token_id
    ids = lambda: list(served.read({"prompt": "a<end>b"}, chat=False).requests[0].tokens)
    with pytest.raises(DataError, match="--special-tokens parse"):
        ids()
    monkeypatch.setattr(served, "_special_tokens", "parse")
    assert ids().count(end) == 1 and len(ids()) == 3
    monkeypatch.setattr(served, "_special_tokens", "text")
    assert end not in ids() and talker.tokenizer.decode(ids()) == "a<end>b"


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}>{{ mood }}{% endif %}"
)


def test_a_conversation_is_rendered_continued_and_keeps_text_text(served, talker, monkeypatch):
    monkeypatch.setattr(talker.tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setattr(served, "_prompter", Prompter(talker.tokenizer))
    read = lambda **body: served.read(body, chat=True).requests[0].tokens
    shown = lambda **body: talker.tokenizer.decode(read(**body))
    turn = {"role": "user", "content": "a<end>b"}
    tokens = read(messages=[turn])
    assert tokens.count(talker.tokenizer.eos_token_id) == 1  # the template's own
    assert talker.tokenizer.decode(tokens) == "user:a<end>b<end>>"
    assert shown(messages=[TURN], chat_template_kwargs={"mood": "well"}) == "user:x<end>>well"
    unknown = ("mod", 1), ("a" * 99, 1)
    for name, value in (("mood", "<end>"), ("eos_token", "x"), ("messages", []), *unknown):
        with pytest.raises(DataError, match="^(field .)?chat_template_kwargs"):
            read(messages=[TURN], chat_template_kwargs={name: value})
    said = {"role": "assistant", "content": "So<end> "}
    tokens = read(messages=[TURN, said])
    assert talker.tokenizer.decode(tokens) == "user:x<end>assistant:So<end> "
    assert tokens.count(talker.tokenizer.eos_token_id) == 1
    nothing = {"role": "assistant", "content": None}
    assert shown(messages=[TURN, nothing]) == shown(messages=[TURN])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"stop": ["a", None]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temprature": 1}, "temprature"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"prompt": "a" * 5000}, "prompt"),
    ],
)
def test_an_error_names_its_field_for_programs_too(port, change, param):
    code, reply = post(port, "/v1/completions", {"prompt": "x"} | change)
    assert code == 400 and reply["error"]["param"] == param
