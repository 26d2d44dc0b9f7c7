"""A page is a list of sections of tables, pictures and text: one builder, one file, no scripts."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe

from jaxdistill.errors import StorageError
from jaxdistill.report import pictures, wording
from jaxdistill.safe import whole_file

_MOODS = {"done": "good", "failed": "bad", "stopped": "bad", "preempted": "bad"}


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
      text: any text.
      style: "note", "heading", or "code", which keeps line breaks.
      summary: where there is one, the text is folded away under it.
    """

    text: str
    style: str = "note"
    summary: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A value of a table, the length of its bar in percent, and whether it is the best one."""

    text: str
    bar: float | None = None
    best: bool = False


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A named row of a table, or without cells a heading; `colour` is its own in the pictures."""

    name: str
    cells: Sequence[Cell] = ()
    colour: str = ""
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a head, which holds a title and a hint for every column."""

    head: Sequence[tuple[str, str]]
    rows: Sequence[TableRow]


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of a legend; `style` is that of a line in `curves.Line`."""

    label: str
    colour: str
    style: str = "dots"
    number: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An SVG element made by `pictures.render`, with its title, legend and remark."""

    title: str
    svg: str
    legend: Sequence[Key]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures side by side, as many as the width allows; small ones to be compared at a glance."""

    pictures: Sequence[Picture]
    small: bool = False


_SHADES = (0.5, 1.0, 2.0)  # nats from which a token has the next colour


def _shade(gap: float) -> str:
    """The class of a token's colour: p1 to p3 above the teacher, n1 to n3 below, none between."""
    strength = sum(abs(gap) >= least for least in _SHADES)
    return f"{'p' if gap > 0 else 'n'}{strength}" if strength else ""


@dataclasses.dataclass(frozen=True)
class SamplePair:
    """A prompt and what several models answered: (name, text).

    `marks` is the student's answer once more, token by token, each with log q - log p in nats.
    """

    prompt: str
    answers: Sequence[tuple[str, str]]
    marks: Sequence[tuple[str, float]] = ()

    @property
    def shades(self) -> list[tuple[str, str, str]]:
        """(token, class of its colour, what is said of it); p3 is far above the teacher."""
        return [(text, _shade(gap), f"{gap:+.2f} nats") for text, gap in self.marks]


@dataclasses.dataclass(frozen=True)
class Remarks:
    """A list of sentences, and a muted one of what is missing."""

    remarks: Sequence[str]
    missing: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Titled lists of names and values."""

    lists: Mapping[str, Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Log:
    """Lines of three fields, folded away under a summary."""

    summary: str
    lines: Sequence[tuple[str, str, str]]


Block = Text | Table | Pictures | SamplePair | Remarks | Pairs | Log


@dataclasses.dataclass(frozen=True)
class PageSection:
    """A titled part of a page; without blocks it is left out."""

    title: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Page:
    """What a page shows, from top to bottom.

    Attributes:
      over: what kind of page it is.
      title: its title.
      sections: its body.
      status: of the run; "" for none.
      ledes: sentences under the title: (text, name, colour); a name says what it is about.
      facts: (label, value, remark).
      sources: what the page was made from.
    """

    over: str
    title: str
    sections: Sequence[PageSection]
    status: str = ""
    ledes: Sequence[tuple[str, str, str]] = ()
    facts: Sequence[tuple[str, str, str]] = ()
    sources: Sequence[str] = ()


def render(page: Page) -> str:
    """The page as HTML: all its text is escaped, control characters become visible signs."""
    files = importlib.resources.files("jaxdistill.report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: v if isinstance(v, markupsafe.Markup) else wording.visible(v),
    )
    environment.filters["svg"] = markupsafe.Markup
    template = environment.from_string(files.joinpath("page.html.jinja").read_text("utf-8"))
    return template.render(
        page=page,
        style=markupsafe.Markup(_palette() + files.joinpath("page.css").read_text("utf-8")),
        mood=_MOODS.get(page.status, "live"),
    )


def write(page: Page, path: pathlib.Path) -> pathlib.Path:
    """Writes a page as one file that loads nothing and runs no script; its policy forbids both.

    Raises:
      StorageError: the file cannot be written.
    """
    try:
        whole_file.write_text(path, render(page))
    except OSError as error:
        raise StorageError(f"{path}: the page cannot be written: {error}") from error
    return path


def _palette() -> str:
    """The colours of page and pictures as CSS variables, light first; paper is always light."""
    light = "".join(f"--{name}:{pair[0]};" for name, pair in pictures.PALETTE.items())
    dark = "".join(f"--{name}:{pair[1]};" for name, pair in pictures.PALETTE.items())
    return (
        f":root{{{light}--page:#fdfdfc;--card:#f5f6f7;}}\n"
        f"@media screen and (prefers-color-scheme: dark){{:root{{{dark}"
        "--page:#15171a;--card:#1d2024;}}\n"
    )
