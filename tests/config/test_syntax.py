import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.config import syntax


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("false", False),
        ("True", "True"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("~", None),
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.25", -0.25),
        ("10", 10),
        ("-3", -3),
        ("+3", 3),
        ("017", "017"),
        ("0x1F", "0x1F"),
        ("0o17", "0o17"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2026-01-31", "2026-01-31"),
        ("=", "="),
        (".inf", math.inf),
        ("'1'", "1"),
        ('"true"', "true"),
    ],
)
def test_scalars(text, value):
    document = syntax.parse(f"key: {text}")
    assert document.faults == []
    assert document.value == {"key": value}
    assert type(document.value["key"]) is type(value)


def test_marks_are_places_of_keys_and_items():
    document = syntax.parse("a:\n  bee: [1, 22]\n\nc: {d: 4}\n")
    assert document.marks[("a",)] == (1, 1)
    assert document.marks[("a", "bee")] == (2, 3)
    assert document.marks[("a", "bee", 1)] == (2, 12)
    assert document.marks[("c", "d")] == (4, 5)


def faults(text):
    return [(fault.line, fault.column, fault.message) for fault in syntax.parse(text).faults]


def test_duplicate_keys_are_all_reported_with_their_first_line():
    assert faults("lr: 1\na: {b: 1, b: 2}\nlr: 2\n") == [
        (2, 11, 'duplicate key "b" (first on line 2)'),
        (3, 1, 'duplicate key "lr" (first on line 1)'),
    ]


def bomb(levels):
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("!!python/object/apply:os.system ['touch x']", (1, 1), "tags"),
        ("a: !!int 3", (1, 4), "tags"),
        ("a: !env HOME", (1, 4), "tags"),
        ("a: ! x", (1, 4), "tags"),
        ("a: &a [*a]", (1, 4), "endless"),
        (bomb(5), None, "aliases make this too large"),
        (bomb(40), None, "more than 100 aliases"),
        ("[" * 100_000, (1, 33), "deeper"),
        ("- " * 100_000, (1, 65), "deeper"),
        ("a: 1\n" * 30_000, (5000, 4), "more than 10000 values"),
        ("#" * 300_000, (1, 1), "larger than 256 KiB"),
        ("a: 1\n---\nb: 2", (2, 1), "only one document"),
        ("a: *x", (1, 4), "undefined alias"),
        ("a: b: c", (1, 5), "not valid YAML"),
        ("ok: 1\nbad: [1, 2", (2, 11), "not valid YAML"),
        ("a: 1\nb: \x07", (2, 4), "U+0007"),
        ("? [a]\n: 1", (1, 3), "a key must be a name"),
        ("<<: {a: 1}", (1, 1), "merge keys"),
        ("a: " + "9" * 500, (1, 4), "too many digits"),
    ],
)
def test_refused_with_a_place(text, place, words):
    found = faults(text)
    assert len(found) == 1
    assert words in found[0][2]
    assert place is None or found[0][:2] == place


def test_tags_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    syntax.parse(f"!!python/object/apply:os.system ['touch {canary}']")
    syntax.parse(f"!!python/object/apply:pathlib.Path.touch [!!python/object:x '{canary}']")
    assert not canary.exists()


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(trees)
def test_what_is_dumped_is_read_back(value):
    # "<<" is the one key that cannot be written, because it is refused as a merge key.
    text = syntax.dump(value)
    document = syntax.parse(text)
    if not any("merge keys" in fault.message for fault in document.faults):
        assert document.faults == []
        assert document.value == value


@given(st.text(st.sampled_from("ab1:-[]{}#&*!|>'\"%@`?,. \n\t0e"), max_size=60))
def test_any_text_gives_a_value_or_a_placed_fault(text):
    document = syntax.parse(text)
    lines = text.split("\n")
    for fault in document.faults:
        assert 1 <= fault.line <= len(lines) + 1
        assert fault.column >= 1
