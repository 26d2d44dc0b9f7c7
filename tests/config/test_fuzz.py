"""Valid configurations, damaged: the answer is a configuration or errors that have a line."""

import copy
import os
import pathlib
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill import config
from jaxdistill.config import inherit, syntax, workflow
from jaxdistill.errors import ConfigError

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
TEXTS = [inherit.flattened(path) for path in sorted(CONFIGS.glob("*.yaml"))]
TEXTS = [text for text in TEXTS if not workflow.is_workflow(text)]
RESOLVED = [config.dump(config.loads(text)) for text in TEXTS]
TREES = [syntax.parse(text).value for text in TEXTS + RESOLVED]
EXAMPLES = int(os.environ.get("JAXDISTILL_FUZZ_EXAMPLES", "60"))

PLACED = re.compile(r"fuzz\.yaml:(\d+):(\d+): \S")

odd_values = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 2, 1e308, -1e308, float("inf"), float("-inf"), 10**30, 0.5]
        + ["", "kd", "1e-4", "yes", "\0", "\x85", "é", "a" * 5000, "\ud83d", "<number>", "../../x"]
        + [[], {}, [[]], [{}], {"name": "kd"}, {"name": []}, [None], {"": None}, {"<number>": 1}]
        + [{"schedule": "linear", "start": 0, "end": 1}, {"like": "teacher"}, {"random": {}}]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def places(value, path=()):
    """Every path in a tree of mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


@st.composite
def damaged_trees(draw):
    """A valid tree with some of its keys renamed, values replaced, removed, wrapped or added."""
    tree = copy.deepcopy(draw(st.sampled_from(TREES)))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        path = draw(st.sampled_from(found))
        parent = tree
        for part in path[:-1]:
            parent = parent[part]
        key = path[-1]
        action = draw(st.sampled_from(["replace", "remove", "wrap", "nest", "rename", "add"]))
        if action == "replace":
            parent[key] = copy.deepcopy(draw(odd_values))
        elif action == "remove":
            del parent[key]
        elif action == "wrap":
            parent[key] = [parent[key]]
        elif action == "nest":
            parent[key] = {str(key): parent[key]}
        elif isinstance(parent, dict):
            new = draw(st.text(max_size=12) | st.sampled_from([f"{key}s", str(key)[1:], "name"]))
            odd = copy.deepcopy(draw(odd_values))
            parent[new] = parent.pop(key) if action == "rename" else odd
    return tree


@st.composite
def damaged_texts(draw):
    """A valid text with lines repeated, removed, swapped, cut, or with odd pieces put in."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        lines = text.splitlines(keepends=True) or [""]
        line = draw(st.integers(0, len(lines) - 1))
        action = draw(st.sampled_from(["insert", "cut", "repeat", "drop", "swap", "indent"]))
        if action == "insert":
            pieces = ["!!python/name:os.system ", "&a ", "*a", "*", "!x ", "\t", "{", "[", "}", "'"]
            pieces += ['"', ": ", "- ", "? ", "\n", "---\n", "...\n", "%TAG ! x\n", "<<: ", "|\n"]
            pieces += ["\0", "\x1b", "\ud800", "\ufeff", "\u2028", "1e999", "0x1", "#", ","]
            text = text[:at] + draw(st.sampled_from(pieces) | st.text(max_size=6)) + text[at:]
            continue
        if action == "cut":
            text = text[:at]
            continue
        if action == "repeat":
            lines.insert(line, lines[line])
        elif action == "drop":
            del lines[line]
        elif action == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[line], lines[other] = lines[other], lines[line]
        else:
            lines[line] = draw(st.sampled_from([" ", "  ", "\t"])) + lines[line]
        text = "".join(lines)
    return text


def check(text, overrides=()):
    """Loads: the result reads back equal, or every line of the error has its place."""
    try:
        loaded = config.loads(text, "fuzz.yaml", overrides)
    except ConfigError as error:
        count = text.count("\n") + len(re.findall("[\r\x85\u2028\u2029]", text)) + 1
        for line in str(error).split("\n"):
            assert line.isprintable(), line
            if not line.startswith("override "):
                match = PLACED.match(line)
                assert match, line
                assert 1 <= int(match[1]) <= count + 1, line
    else:
        assert config.loads(config.dump(loaded)) == loaded


@settings(max_examples=EXAMPLES)
@given(damaged_trees())
def test_damaged_trees(tree):
    check(syntax.dump(tree))


@settings(max_examples=EXAMPLES)
@given(damaged_texts())
def test_damaged_texts(text):
    check(text)


@settings(max_examples=EXAMPLES // 2)
@given(
    st.sampled_from(["train.steps", "method.alpha", "data.train.0.path", "student", "", "a.b", "."])
    | st.text(max_size=10),
    st.sampled_from(["", "1", "[", "{a: 1}", "!!int 1", "&a [*a]", "'", "null", "1e308", "\0"])
    | st.text(max_size=10),
    st.sampled_from(["=", "", "==", " = "]),
)
def test_odd_overrides(key, value, equals):
    check(TEXTS[0], [key + equals + value])


@settings(max_examples=EXAMPLES // 2)
@given(st.sampled_from(RESOLVED), st.data())
def test_a_renamed_key_is_reported_where_it_stands(text, data):
    lines = text.split("\n")
    keyed = [i for i, line in enumerate(lines) if re.match(r"[ -]*[a-z_]+:", line)]
    i = data.draw(st.sampled_from(keyed))
    start = re.match(r"[ -]*", lines[i]).end()
    lines[i] = f"{lines[i][:start]}zz_{lines[i][start:]}"
    key = lines[i][start:].partition(":")[0]
    try:
        config.loads("\n".join(lines), "fuzz.yaml")
    except ConfigError as error:
        found = [line for line in str(error).split("\n") if f"{key}" in line]
        assert found[0].startswith(f"fuzz.yaml:{i + 1}:{start + 1}: ")
        assert "unknown key" in found[0]
    else:
        raise AssertionError(f"{key} was accepted")
