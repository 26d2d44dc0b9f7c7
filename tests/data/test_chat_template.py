import datetime
import re
import time

import pytest

from jaxdistill.data import chat_template
from jaxdistill.data.chat_template import GENERATION_ENDS, ChatTemplate, RenderError
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
    assert datetime.datetime.now() > chat_template.DATE


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


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    endless = (
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}"
    )
    for characters, seconds in ((100_000, 60.0), (100_000_000, 0.2)):
        monkeypatch.setattr(chat_template, "MAX_RENDERED", characters)
        monkeypatch.setattr(chat_template, "MAX_SECONDS", seconds)
        begin = time.monotonic()
        with pytest.raises(RenderError, match="did not end") as caught:
            ChatTemplate(endless, {}).render([])
        printed = int(re.search(r"printed (\d+)", str(caught.value))[1])
        # Each limit stops it by itself.
        if characters == 100_000:
            assert 100_000 < printed < 101_000
        else:
            assert printed < 100_000_000 and time.monotonic() - begin < 10
