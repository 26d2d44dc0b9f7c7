"""What is learned of conversations, under templates that treat turns as published families do."""

import pytest

from jaxdistill.data import pipeline
from jaxdistill.data.chat import ChatEncoder
from jaxdistill.data.codec import prepare
from jaxdistill.data.records import parse
from jaxdistill.errors import ConfigError
from tests.data import templates
from tests.data.templates import CHANNELS, DEEPSEEK, GLM, MISTRAL, QWEN3, THINKING, TRIMMING

TOOL = {"type": "function", "function": {"name": "add"}}
FAMILIES = {"qwen3": QWEN3, "thinking": THINKING, "glm": GLM, "deepseek": DEEPSEEK,
            "channels": CHANNELS, "mistral": MISTRAL, "trimming": TRIMMING}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return templates.tokenizer(None)


def user(content, **more):
    return {"role": "user", "content": content, **more}


def bot(content, **more):
    return {"role": "assistant", "content": content, **more}


def thought(text):
    return bot(f"<think>\n{text}\n</think>\n\n{text.upper()}")


def calls(content=None):
    function = {"name": "add", "arguments": '{"a": 1, "b": "x"}'}
    return bot(content, tool_calls=[{"type": "function", "function": function}])


def result(content):
    return {"role": "tool", "content": content}


def encoded(tokenizer, template, messages, loss_on="assistant", kwargs=None, **more):
    """(the runs of tokens that count, the whole text, notices), or the reason."""
    record = parse({"messages": messages, **more}, "messages", 1)
    encoder = ChatEncoder(prepare(tokenizer), template, loss_on, kwargs)
    [document] = encoder.encode([record])
    if isinstance(document, str):
        return document
    runs, last = [], False
    for token, counts in zip(document.ids.tolist(), document.loss.tolist(), strict=True):
        if counts:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = counts
    return (
        [tokenizer.decode(run) for run in runs],
        tokenizer.decode(document.ids),
        list(encoder.tally.of_conversations()),
    )


# Two turns; two with thinking in their text; two with thinking beside it.
PLAIN = [user("q"), bot("a"), user("r"), bot('"b"')]
INLINE = [user("q"), thought("a"), user("r"), thought("b")]
BESIDE = [
    user("q"),
    bot("a", reasoning_content="why"),
    user("r"),
    bot("b", reasoning_content="how"),
]
EMPTY = "<think>\n\n</think>\n\n"
EXPECTED = {
    "qwen3": (
        ["a<|im_end|>", EMPTY + '"b"<|im_end|>'],
        ["A<|im_end|>", "<think>\nb\n</think>\n\nB<|im_end|>"],
        ["a<|im_end|>", "<think>\nhow\n</think>\n\nb<|im_end|>"],
    ),
    "thinking": (
        ["a<|im_end|>", '\n</think>\n\n"b"<|im_end|>'],
        ["A<|im_end|>", "b\n</think>\n\nB<|im_end|>"],
        ["a<|im_end|>", "how\n</think>\n\nb<|im_end|>"],
    ),
    # The student learns to stop: the next role's marker counts, and the end token at the end.
    "glm": (
        ["\n<think></think>\na<|user|>", '\n<think></think>\n"b"<eos>'],
        ["\n<think></think>\nA<|user|>", "\n<think>b</think>\nB<eos>"],
        ["\n<think></think>\na<|user|>", "\n<think>how</think>\nb<eos>"],
    ),
    "deepseek": (["a<eos>", '"b"<eos>'], ["\n\nA<eos>", "\n\nB<eos>"], ["a<eos>", "b<eos>"]),
    "channels": (
        ["<|channel|>final<|message|>a<|end|>", '<|channel|>final<|message|>"b"<|return|>'],
        [f"<|channel|>final<|message|><think>\n{x}\n</think>\n\n{x.upper()}{end}"
         for x, end in (("a", "<|end|>"), ("b", "<|return|>"))],
        ["<|channel|>final<|message|>a<|end|>",
         "<|channel|>analysis<|message|>how<|end|><|start|>assistant"
         "<|channel|>final<|message|>b<|return|>"],
    ),
    "mistral": (
        ["a</s>", '"b"</s>'],
        ["<think>\na\n</think>\n\nA</s>", "<think>\nb\n</think>\n\nB</s>"],
        ["a</s>", "b</s>"],
    ),
    "trimming": (
        ["a<|im_end|>", '"b"<|im_end|>'],
        ["<think>\na\n</think>\n\nA<|im_end|>", "<think>\nb\n</think>\n\nB<|im_end|>"],
        ["a<|im_end|>", "b<|im_end|>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_exact_in_the_rendering_of_the_whole(tokenizer, family):
    template = FAMILIES[family]
    for messages, learned in zip((PLAIN, INLINE, BESIDE), EXPECTED[family], strict=True):
        runs, text, _ = encoded(tokenizer, template, messages)
        assert runs == learned
        named = {"qwen3": {}, "channels": {}}.get(family, {})
        if family == "channels" and messages is BESIDE:  # it reads another spelling
            messages = [
                {"thinking" if k == "reasoning_content" else k: v for k, v in one.items()}
                for one in messages
            ]
        assert text.removesuffix("<eos>") == tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **named
        ).removesuffix("<eos>")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_that_is_marked_is_not_learned(tokenizer, family):
    template, learned = FAMILIES[family], EXPECTED[family][0]
    marked = [user("q"), bot("a", weight=0), user("r"), bot('"b"', weight=1)]
    assert encoded(tokenizer, template, marked)[0] == learned[1:]
    others = "".join(encoded(tokenizer, template, marked, "all")[0])
    assert len(others) == len(encoded(tokenizer, template, PLAIN)[1]) - len(learned[0])
    assert others.endswith(learned[1] if not learned[1].endswith("<|im_end|>") else others[-9:])
    assert "remove the mark" in encoded(tokenizer, template, [user("q", train=True), bot("a")])
    refused = encoded(tokenizer, template, [user("q", train=False), bot("a")], "all")
    assert "use loss_on: assistant" in refused
    assert encoded(tokenizer, template, [user("q", train=False), bot("a")])[0]


def test_marks_where_the_template_marks_itself(tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    marked = [user("q"), bot("a", weight=0), user("r"), bot("b")]
    assert encoded(tokenizer, template, marked)[0] == ["b<|im_end|>"]
    joined = (
        "{% generation %}"
        + template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        + "{% endgeneration %}"
    )
    assert "one {% generation %} block holds" in encoded(tokenizer, joined, marked)


TOOLS = [user("q"), calls("so"), result("42"), calls(), result("43"), bot("c"), user("r"), bot("d")]
WORDS = '{"name": "add", "arguments": {"a": 1, "b": "x"}}'
CALLED = f"<tool_call>\n{WORDS}\n</tool_call><|im_end|>"
ARGUMENTS = "<tool_call>add\n<arg>a=1</arg>\n<arg>b=x</arg>\n</tool_call><|observation|>"
BLOCK = '<calls><call>function add\n```json\n{"a": 1, "b": "x"}\n```</call></calls><eos>'


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (QWEN3, [f"so\n{CALLED}", CALLED, "c<|im_end|>", EMPTY + "d<|im_end|>"]),
        (GLM, [f"\n<think></think>\nso\n{ARGUMENTS}", f"\n<think></think>\n{ARGUMENTS}",
               "\n<think></think>\nc<|user|>", "\n<think></think>\nd<eos>"]),
        (DEEPSEEK, [BLOCK, f"<BOT>{BLOCK}", "c<eos>", "d<eos>"]),
    ],
)  # fmt: skip
def test_tool_calls_are_learned_and_results_are_not(tokenizer, template, learned):
    assert encoded(tokenizer, template, TOOLS)[0] == learned


def test_what_the_template_does_not_print_is_refused_or_told(tokenizer):
    assert "does not print 'add'" in encoded(tokenizer, MISTRAL, TOOLS)
    tools = {"tools": [TOOL]}
    assert "field `tools`: the chat template" in encoded(tokenizer, GLM, PLAIN, **tools)
    assert '{"name": "add"}' in encoded(tokenizer, QWEN3, PLAIN, **tools)[1]
    named = [user("q", name="bob"), bot("a")]
    for template in (TRIMMING, QWEN3):
        assert "field `name` of message 1" in encoded(tokenizer, template, named)
    naming = "{% for m in messages %}{{ m.name or m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    assert "bob: q" in encoded(tokenizer, naming, named, "all")[1]
    identified = [*TOOLS[:2], {**result("4"), "tool_call_id": "7", "name": "add"}, bot("c")]
    notices = encoded(tokenizer, QWEN3, identified)[2]
    assert "does not print the fields `name`, `tool_call_id` of tools' messages" in notices[-1]


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_it_says_how_much_the_template_leaves_out(tokenizer, loss_on):
    assert encoded(tokenizer, QWEN3, PLAIN, loss_on)[2] == []
    for messages, told in ((INLINE, "1 of 4 characters (25.00%)"), (BESIDE, "3 of 8 characters")):
        [notice] = encoded(tokenizer, QWEN3, messages, loss_on)[2]
        assert told in notice and "in 1 conversations" in notice and "data.turns: each" in notice


def test_template_arguments(tokenizer):
    off = {"enable_thinking": False}
    for given in ({"kwargs": off}, {"chat_template_kwargs": off}):
        runs, text, _ = encoded(tokenizer, QWEN3, PLAIN, **given)
        assert runs == ["a<|im_end|>", '"b"<|im_end|>'] and EMPTY in text
    assert "knows no `enable_thinking`" in encoded(
        tokenizer, TRIMMING, PLAIN, chat_template_kwargs=off
    )
    with pytest.raises(
        ConfigError, match="template_kwargs.enable_thinkin: the chat template knows"
    ):
        encoded(tokenizer, QWEN3, PLAIN, kwargs={"enable_thinkin": True})


def test_special_tokens_in_every_part_of_a_message_stay_text(tokenizer):
    evil = "<|im_end|>"
    function = {"name": "add", "arguments": {evil: evil, "b": 1}}
    messages = [
        user(f"{evil} q"),
        bot(evil, reasoning_content=f"x{evil}", tool_calls=[{"type": "x", "function": function}]),
        result(evil),
        bot(f"done {evil}"),
    ]
    runs, text, _ = encoded(tokenizer, QWEN3, messages, tools=[{**TOOL, "description": evil}])
    record = parse({"messages": messages, "tools": [TOOL]}, "messages", 1)
    [document] = ChatEncoder(prepare(tokenizer), QWEN3, "assistant").encode([record])
    end = tokenizer.convert_tokens_to_ids(evil)
    assert document.ids.tolist().count(end) == 5 and text.count(evil) == 5 + 8
    assert runs[0].startswith(f"<think>\nx{evil}\n</think>\n\n{evil}\n<tool_call>")
    assert runs[1] == EMPTY + f"done {evil}{evil}"
    escaping = "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}"
    assert "escapes a special token" in encoded(tokenizer, escaping, messages[:1], "all")


def test_every_turn_as_the_last_one(tokenizer, jsonl, tmp_path):
    rows = [{"messages": INLINE}, {"messages": [*BESIDE[:1], bot("x", weight=0), *BESIDE[2:]]}]
    options = {"seq_len": 128, "packing": "none", "cache_dir": tmp_path, "chat_template": QWEN3}
    made = pipeline.build(jsonl(rows), tokenizer, loss_on="assistant", turns="each", **options)
    assert (made.records, made.used, len(made), made.notices) == (2, 2, 3, ())
    learned = [tokenizer.decode(row["targets"][row["mask"]]) for row in made]
    full = "<think>\n{}\n</think>\n\n{}<|im_end|>"
    assert learned == [full.format("a", "A"), full.format("b", "B"), full.format("how", "b")]
    with pytest.raises(ConfigError, match="data.turns: 'each'"):
        pipeline.build(jsonl(rows), tokenizer, turns="each", **options)


@pytest.mark.parametrize("loss_on", ["completion", "assistant", "all"])
def test_conversational_completions(tokenizer, jsonl, tmp_path, loss_on):
    row = {"prompt": [user("q"), bot("x"), user("r")], "completion": [bot("a")]}
    made = pipeline.build(
        jsonl([row]), tokenizer, seq_len=128, loss_on=loss_on, cache_dir=tmp_path,
        chat_template=TRIMMING,
    )  # fmt: skip
    learned = tokenizer.decode(made[0]["targets"][made[0]["mask"]])
    assert made.kind == "dialogue" and learned.endswith("a<|im_end|>")
    if loss_on != "all":
        assert learned == {"completion": "", "assistant": "x<|im_end|>"}[loss_on] + "a<|im_end|>"
