import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill import config
from jaxdistill.config import keys, synonyms
from jaxdistill.errors import ConfigError
from jaxdistill.methods import METHODS


def test_every_key_is_documented():
    assert len(keys.all_keys()) > 90
    for path in keys.all_keys():
        for text in config.explain(".".join(path)).split("\n\n"):
            words = text.partition(":")[2].split()
            assert len(words) >= 3, text


@pytest.mark.parametrize("name", ["uld", "gold", "alm"])
def test_the_name_of_a_method_explains_it_and_its_options(name):
    text = config.explain(name)
    assert text.startswith(f"method: {{name: {name}}}: {name.upper()}, for a teacher of any")
    assert "\n  alpha: " in text and "\n  teacher_seq_len: " in text
    assert "\n\n" not in text  # no other method
    both = config.explain("cross-tokenizer")
    assert both.startswith("cross-tokenizer is method.teacher_seq_len here\n\nmethod.teacher_seq_")


def test_explain_tells_description_type_range_and_default():
    text = config.explain("optimizer.lr")
    assert text.startswith("optimizer.lr: number above 0, at most 10, default 0.0001")
    assert "learning rate" in text
    assert "forward_kl | reverse_kl" in config.explain("method.divergence")
    assert "default 1000" not in config.explain("train.steps")
    assert "at least 1" in config.explain("train.steps")


def test_explain_of_sections_lists_their_keys():
    for name in config.Config.model_fields:
        assert f"  {name}: " in config.explain("")
    method = config.explain("method")
    assert "Knowledge distillation" in method
    assert "Supervised fine-tuning" in method
    assert len(method.splitlines()) == len(METHODS) + 2  # a line on each, not all of their keys
    assert "temperature: " in config.explain("method.kd")
    assert "temperature: " not in config.explain("method.sft")
    assert "  steps: whole number at least 1, at most 1000000000 (required)" in config.explain(
        "train"
    )


def test_explain_reaches_into_lists_and_alternatives():
    assert config.explain("data.train.0.path") == config.explain("data.eval.path").replace(
        "eval.path", "train.0.path"
    )
    assert "first step" in config.explain("method.alpha.start")


@pytest.mark.parametrize(
    ("key", "meant"),
    [("trian", "train"), ("train.stesp", "steps"), ("method.tempreture", "temperature")],
)
def test_explain_of_an_unknown_key_suggests(key, meant):
    with pytest.raises(ConfigError, match=f'did you mean "{meant}"'):
        config.explain(key)


def test_explain_of_nonsense_suggests_nothing():
    with pytest.raises(ConfigError, match="no such key$"):
        config.explain("qqqqqqqq")


def test_of_two_equally_near_names_the_one_not_yet_given_is_meant():
    assert keys.nearest("ab", ("aa", "bb"), {"aa": 1}) == "bb"
    assert keys.nearest("ab", ("aa", "bb"), {"bb": 1}) == "aa"


def test_a_key_of_another_section_is_found():
    assert keys.suggest((), "clip_norm") == 'did you mean "optimizer.clip_norm"?'
    assert keys.suggest(("train",), "lr") == 'did you mean "optimizer.lr"?'


def test_a_key_of_another_method_is_told_with_its_method():
    hint = keys.suggest(("method",), "temperatur", {"name": "sft"})
    assert hint == 'did you mean "temperature" of kd, reverse_kd, jsd and others?'
    assert keys.suggest(("method",), "temperatur", {"name": "kd"}) == 'did you mean "temperature"?'


def test_values_of_a_key_are_its_words():
    assert keys.values(("data", "loss_on")) == ("all", "completion", "assistant")
    assert {"kd", "grpo", "sft"} <= set(keys.values(("method", "name")))
    assert keys.values(("optimizer", "offload")) == ("true", "false")
    assert keys.values(("train", "steps")) == () == keys.values(("run", "dir"))


def typos(word, rng):
    """All deletions and swaps of neighbours, and some substitutions and insertions."""
    letters = "abcdefghijklmnopqrstuvwxyz_"
    result = {word[:i] + word[i + 1 :] for i in range(len(word))}
    result |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    for i in range(len(word) + 1):
        letter = rng.choice(letters)
        result.add(word[:i] + letter + word[i:])
        result.add(word[:i] + letter + word[i + 1 :])
    return sorted(result - {word, ""})


def test_one_edit_typos_of_every_key_are_understood():
    rng = random.Random(0)
    cases = [(path, typo) for path in keys.all_keys() for typo in typos(path[-1], rng)]
    right, wrong = 0, []
    for path, typo in rng.sample(cases, 1000):
        hint = keys.suggest(path[:-1], typo, {"name": "kd"} if path[0] == "method" else {})
        if hint.startswith(f'did you mean "{path[-1]}"'):
            right += 1
        else:
            wrong.append((".".join(path), typo, hint))
    assert right / 1000 >= 0.95, wrong


def reference_distance(left, right):
    """Optimal string alignment, by its recursive definition."""
    if not left or not right:
        return len(left) + len(right)
    best = min(
        reference_distance(left[1:], right) + 1,
        reference_distance(left, right[1:]) + 1,
        reference_distance(left[1:], right[1:]) + (left[0] != right[0]),
    )
    if len(left) > 1 and len(right) > 1 and left[:2] == right[1::-1]:
        best = min(best, reference_distance(left[2:], right[2:]) + 1)
    return best


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_distance_is_that_of_its_definition(left, right):
    assert keys._edits(left, right) == reference_distance(left, right)


def test_names_of_other_tools_lead_to_what_is_here():
    for word, key in synonyms.SYNONYMS.items():
        assert key in {".".join(path) for path in keys.all_keys()}, word
        assert config.explain(word).startswith(f"{word} is {key} here")
    for word, ours in synonyms.OTHER_METHODS.items():
        name = re.match(r"\w+", ours)[0]
        assert word not in METHODS and name in METHODS
        if word not in synonyms.SYNONYMS:
            assert config.explain(word).startswith(f"{word} is method.name: {name}")
            assert config.explain(name) in config.explain(word)
        else:
            assert f"method.name: {ours}" in config.explain(word).splitlines()[0]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("logging.wandb=true", "{project: ...}"),
        ("logging={mlflow: yes}", "{experiment: ...}"),
        ("checkpoint.keep=2", "{latest: ...}"),
    ],
)
def test_a_section_that_is_none_is_told_how_one_is_written(value, written):
    with pytest.raises(ConfigError) as raised:
        config.loads("{}", overrides=[value])
    assert f"must be a section of keys, such as {written}" in str(raised.value)
