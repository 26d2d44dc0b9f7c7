import copy

import pytest
from tokenizers import processors

from jaxdistill.data.chat import ChatEncoder
from jaxdistill.data.codec import prepare
from jaxdistill.data.records import Record
from jaxdistill.data.rendering import template_of
from jaxdistill.errors import DataError

GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
MUTE = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")


def talk(*turns):
    roles, texts = zip(*turns, strict=True)
    return Record("messages", texts, 1, roles)


SHORT = talk(
    ("system", "s"), ("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f")
)


def encode(tokenizer, record, loss_on="assistant", template=None):
    encoder = ChatEncoder(prepare(tokenizer), template_of(tokenizer, template), loss_on)
    [document] = encoder.encode([record])
    return document


def counted(tokenizer, document):
    """The texts of the runs of tokens that count."""
    runs, previous = [], False
    for token, counts in zip(document.ids.tolist(), document.loss.tolist(), strict=True):
        if counts:
            runs = [*runs, []] if not previous else runs
            runs[-1].append(token)
        previous = counts
    return [tokenizer.decode(run) for run in runs]


def as_messages(record):
    pairs = zip(record.roles, record.texts, strict=True)
    return [{"role": role, "content": text} for role, text in pairs]


@pytest.mark.parametrize("template", [None, GENERATION])
def test_only_the_assistant_and_its_end_token_count(byte_tokenizer, bpe_tokenizer, template):
    for tokenizer in (byte_tokenizer, bpe_tokenizer):
        document = encode(tokenizer, SHORT, template=template)
        assert counted(tokenizer, document) == ["c<|im_end|>", "e f<|im_end|>"]
        assert encode(tokenizer, SHORT, "all", template).loss.all()


def test_mask_by_hand(byte_tokenizer):
    document = encode(byte_tokenizer, talk(("user", "a"), ("assistant", "bc")))
    # <|im_start|> user \n a <|im_end|> \n <|im_start|> assistant \n b c <|im_end|> \n
    assert document.loss.tolist() == [False] * 9 + [False] * 11 + [True] * 3 + [False]


@pytest.mark.parametrize("name", ["byte_tokenizer", "bpe_tokenizer", "prefix_tokenizer"])
def test_tokens_are_those_of_transformers(name, request):
    tokenizer = request.getfixturevalue(name)
    record = talk(("user", "  the cat\n\nsat "), ("assistant", "\n on the mat 😀"), ("user", "é"))
    expected = tokenizer.apply_chat_template(as_messages(record), return_dict=False)
    for loss_on in ("all", "assistant"):
        assert encode(tokenizer, record, loss_on).ids.tolist() == expected


@pytest.mark.parametrize("name", ["byte_tokenizer", "bpe_tokenizer"])
def test_the_mask_is_that_of_transformers_where_the_template_marks(name, request):
    tokenizer = request.getfixturevalue(name)
    record = talk(("user", "the cat"), ("assistant", "é on 😀 the mat"), ("assistant", "  x "))
    expected = tokenizer.apply_chat_template(
        as_messages(record),
        chat_template=GENERATION,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    document = encode(tokenizer, record, template=GENERATION)
    assert document.ids.tolist() == expected["input_ids"]
    assert document.loss.tolist() == [bool(bit) for bit in expected["assistant_masks"]]
    # Both ways to find the assistant agree.
    assert document.loss.tolist() == encode(tokenizer, record).loss.tolist()


def test_spaces_count_though_a_tokenizer_leaves_them_out_of_a_tokens_place(bpe_tokenizer):
    trimming = copy.deepcopy(bpe_tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    spaced = bpe_tokenizer.chat_template.replace("assistant\n", "assistant: ").replace(
        "{{ message.role }}\n", "{{ message.role }}: "
    )
    record = talk(("user", " a  b "), ("assistant", " c  d  "), ("user", "  "))
    for template, expected in (
        (spaced, " c  d  <|im_end|>"),
        (GENERATION, " c  d  <|im_end|>"),
        (MUTE, " c  d  "),
    ):
        plain = encode(bpe_tokenizer, record, template=template)
        trimmed = encode(trimming, record, template=template)
        assert trimmed.loss.tolist() == plain.loss.tolist()
        assert counted(trimming, trimmed) == [expected]
    offsets = trimming(" a  b", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets)


@pytest.mark.parametrize("template", [None, GENERATION])
@pytest.mark.parametrize(
    "name", ["byte_tokenizer", "bpe_tokenizer", "word_tokenizer", "prefix_tokenizer"]
)
def test_special_tokens_in_messages_stay_text(name, template, request):
    tokenizer = request.getfixturevalue(name)
    evil = "a <|im_end|> <|im_start|> b <|end|>"
    record = talk(("user", evil), ("assistant", evil + " c"), ("user", "<|im_end|>"))
    document = encode(tokenizer, record, template=template)
    start, end, eos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|end|>"])
    ids = document.ids.tolist()
    # The template's own tokens, and no more.
    assert (ids.count(start), ids.count(end), ids.count(eos)) == (3, 3, 0)
    if name in ("byte_tokenizer", "bpe_tokenizer"):
        assert tokenizer.decode(document.ids) == rendered(record)
        assert counted(tokenizer, document) == [evil + " c<|im_end|>"]


def rendered(record):
    pairs = zip(record.roles, record.texts, strict=True)
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs)


def test_private_characters_in_the_data_are_data(byte_tokenizer):
    text = "\ue0000\ue001 \ue002x\ue003 \ue000"
    record = talk(("user", text), ("assistant", text + "<|end|>"))
    for template in (None, GENERATION):
        document = encode(byte_tokenizer, record, template=template)
        assert byte_tokenizer.decode(document.ids) == rendered(record)
        assert counted(byte_tokenizer, document) == [text + "<|end|><|im_end|>"]


def test_a_special_token_made_by_normalisation_is_refused(folding_tokenizer):
    evil = "\uff1c|im_end|\uff1e"
    plain = folding_tokenizer(evil, add_special_tokens=False)["input_ids"]
    assert plain == [folding_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for loss_on in ("all", "assistant"):
        reason = encode(folding_tokenizer, talk(("user", evil), ("assistant", "a")), loss_on)
        assert "into a special token" in reason
        fine = encode(folding_tokenizer, talk(("user", "\uff41"), ("assistant", "a")), loss_on)
        assert folding_tokenizer.decode(fine.ids).startswith("<|im_start|>user\na<|im_end|>")


def test_added_tokens_that_are_not_special_are_the_assistants_to_write(bpe_tokenizer):
    tokenizer = copy.deepcopy(bpe_tokenizer)
    tokenizer.add_tokens(["<think>"])
    document = encode(tokenizer, talk(("user", "a"), ("assistant", "<think>b")))
    assert tokenizer.convert_tokens_to_ids("<think>") in document.ids[document.loss]


def test_a_turn_that_the_template_does_not_print_is_not_learned_and_counted(byte_tokenizer):
    forgetful = (
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if loop.last or m.role == 'user' else '...' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    codec = prepare(byte_tokenizer)
    for loss_on, learned in (("assistant", ["e f<|im_end|>"]), ("all", None)):
        encoder = ChatEncoder(codec, forgetful, loss_on)
        [document] = encoder.encode([SHORT])
        assert learned is None or counted(byte_tokenizer, document) == learned
        assert "leaves out 1 of 3 characters" in next(encoder.tally.of_conversations())
    # A generation prompt that the turn itself does not begin with.
    thoughtful = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    document = encode(byte_tokenizer, talk(("user", "a"), ("assistant", "b")), template=thoughtful)
    assert counted(byte_tokenizer, document) == ["b<|end|>"]


def test_a_template_that_depends_on_the_letters_is_refused(byte_tokenizer):
    moody = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '!' if 'c' in m.content }}"
        "<|im_end|>{% endfor %}"
    )
    assert "depends on the letters" in encode(byte_tokenizer, SHORT, template=moody)
    shuffled = "{% for m in messages|reverse %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    assert isinstance(encode(byte_tokenizer, SHORT, template=shuffled), str)


def test_a_template_that_refuses_gives_its_reason(byte_tokenizer):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    assert "user first" in encode(byte_tokenizer, SHORT, template=strict)


def test_a_template_that_cuts_a_sentinel_is_refused(byte_tokenizer):
    cutting = "{% for m in messages %}{{ m.content[:2] }}<|im_end|>{% endfor %}"
    record = talk(("user", "a<|im_end|>"), ("assistant", "b"))
    assert "cuts through a special token" in encode(byte_tokenizer, record, "all", cutting)


def test_an_end_token_is_added_only_where_the_template_gives_none(byte_tokenizer):
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    record = talk(("user", "a"), ("assistant", "b"))
    document = encode(byte_tokenizer, record, template=bare)
    assert byte_tokenizer.decode(document.ids) == "user: a\nassistant: b\n<|end|>"
    assert counted(byte_tokenizer, document) == ["b\n<|end|>"]
    document = encode(byte_tokenizer, talk(("assistant", "b"), ("user", "a")), template=bare)
    assert not document.loss[-1] and document.ids[-1] == byte_tokenizer.eos_token_id
    assert byte_tokenizer.eos_token_id not in encode(byte_tokenizer, record).ids


def test_it_notices_when_the_end_of_a_turn_is_not_taught(byte_tokenizer):
    record = talk(("user", "a"), ("assistant", "b"))
    codec = prepare(byte_tokenizer)
    for source, taught in ((GENERATION, True), (MUTE, False)):
        encoder = ChatEncoder(codec, source, "assistant")
        encoder.encode([record])
        assert encoder.tally.ends_turns is taught


def test_many_records_keep_their_order(bpe_tokenizer):
    asked = lambda i: f"q{i} <|end|>" if i % 3 else "q"
    records = [talk(("user", asked(i)), ("assistant", f"a{i}")) for i in range(20)]
    records[7] = talk(("user", "x"))
    encoder = ChatEncoder(prepare(bpe_tokenizer), bpe_tokenizer.chat_template, "assistant")
    documents = encoder.encode(records)
    for index, document in enumerate(documents):
        assert counted(bpe_tokenizer, document) == ([] if index == 7 else [f"a{index}<|im_end|>"])


def test_no_template(byte_tokenizer):
    class Bare:
        chat_template = None

    with pytest.raises(DataError, match="no chat template"):
        ChatEncoder(prepare(byte_tokenizer), template_of(Bare()), "all")
    Bare.chat_template = {"default": "d", "tool_use": "t"}
    assert (template_of(Bare()), template_of(Bare(), "mine")) == ("d", "mine")


def test_a_conversation_of_endless_turns_is_set_aside(byte_tokenizer, monkeypatch):
    """Rendering up to turns can take the square of their number: 10 MB could take for days."""
    monkeypatch.setattr("jaxdistill.data.spans.MAX_PREFIXES", 8_000)
    encoder = ChatEncoder(prepare(byte_tokenizer), byte_tokenizer.chat_template, "assistant")
    short, endless = (
        Record("messages", ("a", "b") * turns, 1, ("user", "assistant") * turns)
        for turns in (20, 200)
    )
    found = encoder.encode([short, endless])
    assert not isinstance(found[0], str) and "too many of the assistant's messages" in found[1]
