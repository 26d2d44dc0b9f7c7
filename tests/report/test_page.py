"""The builder of pages: it shows every kind of block, and nothing in any of them comes alive."""

import typing

import pytest

from jaxdistill.errors import StorageError
from jaxdistill.report import page
from tests.report.test_html import HOSTILE, Page

EVIL = " ".join(HOSTILE)
BLOCKS = [
    page.Text(EVIL),
    page.Text(EVIL, "heading"),
    page.Text(EVIL, "code"),
    page.Text(EVIL, "code", EVIL),
    page.Table(
        [(EVIL, EVIL)],
        [page.TableRow(EVIL, (), "red"), page.TableRow(EVIL, [page.Cell(EVIL, 5.0)])],
    ),
    page.Pictures([page.Picture(EVIL, "<svg></svg>", [page.Key(EVIL, "red", "dots", EVIL)], EVIL)]),
    page.SamplePair(EVIL, [(EVIL, EVIL)], [(EVIL, 2.5)]),
    page.Remarks([EVIL], [EVIL]),
    page.Pairs({EVIL: {EVIL: EVIL}}),
    page.Log(EVIL, [(EVIL, EVIL, EVIL)]),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)
def test_a_block_shows_all_its_text_as_text(block):
    source = page.render(page.Page("Report", "One", [page.PageSection("Part", [block])]))
    shown = Page(source)
    fields = repr(block).count(repr(EVIL)[1:-1])
    assert fields and shown.text.count('<script>document.title="owned"</script>') == fields
    tags = {tag for tag, _ in shown.tags}
    assert not tags & {"script", "img", "a", "link"} and "\x1b" not in source
    assert not [name for _, attributes in shown.tags for name in attributes if name[:2] == "on"]
    assert {type(one) for one in BLOCKS} == set(typing.get_args(page.Block))


def test_tokens_have_the_colour_of_their_gap():
    marks = [("a", 2.5), ("b", -1.0), ("c", 0.49), ("d", -0.5), ("e", 1.99)]
    source = page.render(
        page.Page(
            "R",
            "One",
            [page.PageSection("S", [page.SamplePair("", [("student", "abcde")], marks)])],
        )
    )
    spans = {
        (attributes.get("class"), attributes["title"])
        for tag, attributes in Page(source).tags
        if tag == "span" and "nats" in attributes.get("title", "")
    }
    assert spans == {
        ("p3", "+2.50 nats"),
        ("n2", "-1.00 nats"),
        (None, "+0.49 nats"),
        ("n1", "-0.50 nats"),
        ("p2", "+1.99 nats"),
    }
    for name in ("p1", "p2", "p3", "n1", "n2", "n3"):
        assert f".marks .{name}{{" in source


def test_the_head_of_a_page_is_text_too():
    lede, fact = (EVIL, EVIL, "blue"), (EVIL, EVIL, EVIL)
    head = page.Page(
        EVIL, EVIL, [page.PageSection(EVIL, [page.Text("x")])], EVIL, [lede], [fact], [EVIL]
    )
    source = page.render(head)
    assert Page(source).text.count("<script>") == 11
    assert "<script" not in source and "\x1b" not in source


def test_a_section_without_blocks_is_left_out():
    source = page.render(page.Page("Report", "One", [page.PageSection("Empty", [])]))
    assert "Empty" not in source and "<section" not in source


def test_a_page_that_cannot_be_written_names_its_file(tmp_path):
    with pytest.raises(StorageError, match=r"absent.x\.html: the page cannot be written"):
        page.write(page.Page("Report", "One", []), tmp_path / "absent" / "x.html")
