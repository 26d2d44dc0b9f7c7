import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.report import wording


@pytest.mark.parametrize(
    "hostile, shown",
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;new title\x07after", "after"),
        ("\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\", "click"),
        ("\x9b2Jcleared", "cleared"),
        ("a\rb\nc\td", "a b c d"),
        ("bell\x07null\x00", "bellnull"),
        ("file\u202egpj.exe", "filegpj.exe"),
        ("half \ud800 pair", "half \ufffd pair"),
        ("plain é 中 [bold]", "plain é 中 [bold]"),
        ("\x1b", ""),
        ("cut \x1b]0;never ended", "cut "),
    ],
)
def test_clean_leaves_what_a_terminal_only_shows(hostile, shown):
    assert wording.clean(hostile) == shown


@given(st.text(alphabet=st.characters(min_codepoint=0, max_codepoint=0x2FFF)))
def test_clean_never_leaves_a_control(text):
    cleaned = wording.clean(text)
    assert not [char for char in cleaned if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")]
    assert wording.clean(cleaned) == cleaned
    cleaned.encode()


def test_visible_shows_controls_instead_of_acting_or_hiding_them():
    assert wording.visible("a\x1b[31mb\x00\n\tc\x7f") == "a\u241b[31mb\u2400\n\tc\u2421"
    assert wording.visible("x\u202ey\x9b\ud800") == "x\ufffdy\ufffd\ufffd"


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.0, "0"),
        (7, "7"),
        (23.4, "23.40"),
        (0.5234, "0.523"),
        (-1.5, "-1.500"),
        (float("nan"), "nan"),
        (1e-12, "1e-12"),
        (123456.7, "123457"),
    ],
)
def test_number(value, text):
    assert wording.number(value) == text


def test_a_number_is_finite_and_no_bool():
    assert wording.is_number(1) and wording.is_number(0.5)
    assert not any(map(wording.is_number, (True, None, "1", float("nan"), float("inf"))))


def test_counts_round_into_the_next_unit():
    assert wording.count(999_499_000) == "999M"
    assert wording.count(999_600_000) == "1.00B"
    assert wording.count(float("inf")) == "inf"
    assert wording.count(0.5) == "0.50"


def test_durations():
    assert wording.duration(-1) == "-"
    assert wording.duration(float("inf")) == "-"
    assert wording.duration(61) == "1m01s"
    assert wording.duration(3599.9) == "59m59s"
