import datetime
import re
import resource

import pytest

from jaxdistill.data import chat_render, chat_template
from jaxdistill.data.chat_render import GENERATION_ENDS
from jaxdistill.data.chat_template import ChatTemplate, RenderError
from jaxdistill.errors import ModelError

TALK = [
    {"role": "system", "content": " be kind "},
    {"role": "user", "content": "hi\n"},
    {"role": "assistant", "content": "<b>'héllo'</b>"},
    {"role": "user", "content": "bye"},
]
# What published templates do, in small: trimming, control of white space, loops with break,
# namespaces, filters, refusals, the special tokens' names.
TEMPLATES = {
    "header": "{{- bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' "
    "+ m['content'] | trim + '<|im_end|>' }}{% endfor %}\n{%- if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n\n' }}{%- endif %}",
    "blocks": "  {% if messages[0].role == 'system' %}\n    {% set rest = messages[1:] %}\n"
    "[{{ messages[0].content | trim }}]\n  {% else %}{% set rest = messages %}{% endif %}\n"
    "{% for m in rest %}\n  {{ loop.index }} {{ m.role | upper }}: {{ m.content }}{{ eos_token }}\n"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.content %}{% if ns.n > 2 %}{% break %}{% endif %}"
    "{{ m.content | tojson }};{% endfor %}{{ ns.n }}{{ ns.last }}",
    "json": "{{ messages[2] | tojson(indent=2) }}{{ dict(a=1) | tojson }}{{ tools is none }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\n"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_it_renders_what_transformers_renders(name, prompt, prefix_tokenizer):
    template = ChatTemplate(TEMPLATES[name], prefix_tokenizer.special_tokens_map)
    text, _ = template.spans(template.render(TALK, add_generation_prompt=prompt))
    assert text == prefix_tokenizer.apply_chat_template(
        TALK,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=prompt,
    )
    assert text


def test_generation_marks_become_spans():
    block = "{% generation -%} {{ m.content }} {% endgeneration %}"
    source = f"{{%- for m in messages -%}}x{block}{{% endfor %}}"
    template = ChatTemplate(source, {})
    assert template.marks_generation
    text, spans = template.spans(template.render([{"content": "ab"}, {"content": "c"}]))
    assert text == "xab xc "
    assert [text[start:end] for start, end in spans] == ["ab ", "c "]
    assert not ChatTemplate("{{ generation }}", {}).marks_generation
    assert template.spans(f"a{GENERATION_ENDS}b") == ("a" + GENERATION_ENDS + "b", [])


def test_the_date_never_changes():
    text = ChatTemplate("{{ strftime_now('%d %B %Y') }}", {}).render([])
    assert text == "26 July 2024"
    assert datetime.datetime.now() > chat_render.DATE


def test_messages_cannot_be_changed_and_python_cannot_be_reached():
    for source in (
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__.__class__ }}",
    ):
        template = ChatTemplate(source, {})
        messages = [{"role": "user", "content": "a"}]
        # The sandbox refuses, or shows nothing in place of what must not be seen.
        try:
            assert template.render(messages) == ""
        except RenderError as error:
            assert any(word in str(error) for word in ("Security", "Undefined"))
        assert messages == [{"role": "user", "content": "a"}]


def test_refusals_carry_the_templates_words():
    with pytest.raises(RenderError, match="TemplateError: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render([])
    with pytest.raises(RenderError, match="UndefinedError"):
        ChatTemplate("{{ messages[0].role }}", {}).render([])


def test_a_syntax_error_names_the_line():
    with pytest.raises(ModelError, match="chat template: line 2"):
        ChatTemplate("a\n{% for %}", {})


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}X{% endfor %}{% endfor %}"
BOMBS = [
    ENDLESS.replace("X", ""),
    "{% macro f() %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'a' * 10 ** 10 }}",
    "{% set n = 10 ** 10 %}{{ 'a' * n }}",
    "{{ '%09999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'a'.ljust(9999999999) }}",
    "{{ 'a' | center(9999999999) }}",
    "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{{ messages | tojson(indent=9999999999) }}",
    "{{ lipsum(n=99999) }}" * 9,
    "{{ range(10 ** 12) | list }}",
    "(" * 100_000,
    "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "{{ " + "-" * 5_000 + "1 }}",
]


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_a_template_cannot_take_all_time_or_memory(source, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    monkeypatch.setattr(chat_template, "MEMORY", 1 << 28)
    monkeypatch.setattr(chat_render, "MAX_RENDERED", 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "a"}])
        assert len(text) <= 1_000_000
    except (RenderError, ModelError) as error:
        assert str(error).startswith("chat template: ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB, ours


def test_a_template_that_prints_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_render, "MAX_RENDERED", 100_000)
    with pytest.raises(RenderError, match="did not end") as caught:
        ChatTemplate(ENDLESS, {}).render([])
    assert 100_000 < int(re.search(r"printed (\d+)", str(caught.value))[1]) < 101_000


def test_a_template_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.1)
    template = ChatTemplate(BOMBS[0], {})
    for _ in range(chat_template.MAX_TIMEOUTS - 1):
        with pytest.raises(RenderError, match="did not end within 0.1 s"):
            template.render([])
    with pytest.raises(ModelError, match="3 times: give another one"):
        template.render([])


def test_only_texts_of_a_bounded_size_are_templates():
    for source in ("a" * 1_000_001, 3):
        with pytest.raises(ModelError, match="must be a text of at most 1000000"):
            ChatTemplate(source, {})
