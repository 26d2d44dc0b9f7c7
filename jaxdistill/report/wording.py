"""Numbers, times and foreign text as people should see them."""

import math
import re
import typing
import unicodedata

MISSING = "-"

# Terminal sequences: CSI (colours, cursor), OSC, DCS, APC, PM, SOS (titles, links), the rest.
_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x07|\x1b\\|\x9c|$)"
    r"|\x1b[ -/]*[0-~]?",
    re.DOTALL,
)
# Bidirectional controls reorder what is read, which lets text lie about itself.
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


def clean(text: typing.Any) -> str:
    """One line without terminal sequences, control or reordering characters, for a console.

    Args:
      text: anything; `str(text)` is used.

    Returns:
      The text on one line: line breaks and tabs become a space, other controls disappear, halves
      of surrogate pairs (which no terminal can encode) become U+FFFD.
    """
    out = []
    for char in _SEQUENCES.sub("", str(text)):
        category = unicodedata.category(char)
        if category in ("Zl", "Zp") or char in "\n\r\t\v\f\x85":
            out.append(" ")
        elif category == "Cs":
            out.append("\ufffd")
        elif category != "Cc" and ord(char) not in _BIDI:
            out.append(char)
    return "".join(out)


def visible(text: typing.Any) -> str:
    """Text for a page: line breaks stay, every other control character becomes a visible sign.

    A sample that holds an escape character should show it, not act it and not hide it.
    """
    out = []
    for char in str(text).replace("\r\n", "\n"):
        code = ord(char)
        if char in "\n\t":
            out.append(char)
        elif code < 0x20:
            out.append(chr(0x2400 + code))
        elif code == 0x7F:
            out.append("\u2421")
        elif 0x80 <= code < 0xA0 or code in _BIDI or unicodedata.category(char) == "Cs":
            out.append("\ufffd")
        else:
            out.append(char)
    return "".join(out)


def is_number(value: typing.Any) -> typing.TypeGuard[int | float]:
    """True for a finite number that is not a bool: what can be drawn, compared or divided."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: int | float | None, digits: int = 4) -> str:
    """A number with that many significant digits, without exponents where they can be avoided.

    >>> number(1.84321), number(0.000091), number(12345.6), number(None), number(float("inf"))
    ('1.843', '9.1e-05', '12346', '-', 'inf')
    """
    if not isinstance(value, int | float):
        return MISSING
    if not math.isfinite(value) or value == 0 or isinstance(value, int):
        return str(value) if value else "0"
    size = math.floor(math.log10(abs(value)))
    if size < -3:
        return f"{value:.{max(digits - 2, 1)}g}"
    return f"{value:.{max(digits - 1 - max(size, 0), 0)}f}"


def count(value: int | float | None) -> str:
    """A large count with three significant digits and a decimal suffix.

    >>> count(1_235_814_400), count(41_234), count(999_999), count(12), count(None)
    ('1.24B', '41.2k', '1.00M', '12', '-')
    """
    if not isinstance(value, int | float):
        return MISSING
    if not math.isfinite(value):
        return str(value)
    for power, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,999 rounds to 1000k, which is 1.00M.
        if abs(value) >= power * 0.9995:
            return number(value / power, 3) + suffix
    return number(value, 3)


def size(value: int | float | None) -> str:
    """Bytes in binary units.

    >>> size(2_471_645_608), size(2048), size(None)
    ('2.30 GiB', '2.00 KiB', '-')
    """
    if not isinstance(value, int | float):
        return MISSING
    if not math.isfinite(value):
        return str(value)
    for power, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= power:
            return f"{number(value / power, 3)} {unit}"
    return f"{value:.0f} B"


def percent(share: int | float | None, digits: int = 1) -> str:
    """A share of 1 as a percentage.

    >>> percent(0.7123), percent(None)
    ('71.2%', '-')
    """
    if not isinstance(share, int | float):
        return MISSING
    if not math.isfinite(share):
        return str(share)
    return f"{100 * share:.{digits}f}%"


def duration(seconds: int | float | None) -> str:
    """A time span in its two largest units.

    >>> duration(8012), duration(59.4), duration(3 * 86400 + 7200), duration(0.25), duration(None)
    ('2h13m', '59s', '3d02h', '0.25s', '-')
    """
    if not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 1:
        return f"{seconds:.2f}s"
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def abbreviated(text: str) -> str:
    """A text whose lists of whole numbers say runs of neighbours by their ends.

    >>> abbreviated("layers [0, 1, 2, 3, 7, 28, 29] of the teacher")
    'layers 0-3, 7, 28-29 of the teacher'
    """

    def ranges(match: re.Match[str]) -> str:
        numbers = [int(number) for number in match[1].split(",")]
        runs: list[list[int]] = []
        for number in numbers:
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)

    return re.sub(r"\[(\d+(?:, ?\d+){3,})\]", ranges, text)
