"""The page of answers: curves by votes and rationales, samples side by side, nothing alive."""

import json

import pytest

from jaxdistill import cli
from jaxdistill.errors import DataError
from jaxdistill.report import answers

EVIL = "<script>alert(1)</script>"


def _folder(place, value):
    share = lambda v: {"value": v, "low": max(0.0, v - 0.1), "high": min(1.0, v + 0.1)}
    place.mkdir()
    numbers = {
        "questions": 3,
        "greedy": share(value),
        "unparsable": share(0.1),
        "maj_at": {"1": share(value), "5": share(value + 0.1), "30": share(value + 0.2)},
        "pass_at": {"1": share(value), "30": share(0.95)},
    }
    (place / "tasks.json").write_text(json.dumps({"sums?x=1": numbers}))
    rows = [
        {"id": "1", "question": f"q1 {EVIL}", "gold": "3", "answer": "3", "correct": True,
         "text": "because", "votes": ["3", "4"], "texts": ["like this", "like that"]},
        {"id": "2", "question": "q2", "gold": "3", "answer": "5", "correct": False,
         "text": f"oh {EVIL}", "votes": [None, "5"], "texts": ["hm", "five"]},
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "answers_sums_x_1.jsonl").write_text(text)
    return place


def test_the_page_shows_curves_and_both_kinds_of_answers(tmp_path, capsys):
    folders = [_folder(tmp_path / f"scotd_{n}", 0.3 + n / 100) for n in (1, 5, 30)]
    assert cli.main(["report", *map(str, folders)]) == 0
    assert str(folders[0] / "answers.html") in capsys.readouterr().out
    page = (folders[0] / "answers.html").read_text()
    assert "Accuracy by votes" in page and "Accuracy by rationales" in page
    assert page.count(">vote of all samples") == 2  # a column, and a line of the second curve
    assert page.count("<svg") == 2 and EVIL not in page and "&lt;script&gt;" in page
    assert "35.0% [25.0%, 45.0%]" in page and "80.0% [70.0%, 90.0%]" in page
    assert "right: gold 3, answered 3" in page and "wrong: gold 3, answered 5" in page
    assert "another sample: 4" in page and "like that" in page and "five" not in page


def test_without_votes_there_is_no_curve(tmp_path):
    place = _folder(tmp_path / "one", 0.5)
    numbers = json.loads((place / "tasks.json").read_text())
    numbers["sums?x=1"] = {k: numbers["sums?x=1"][k] for k in ("questions", "greedy", "unparsable")}
    (place / "tasks.json").write_text(json.dumps(numbers))
    page = answers.write_answers([place]).read_text()
    assert "<svg" not in page and "50.0% [40.0%, 60.0%]" in page
    (place / "tasks.json").write_text("[]")
    with pytest.raises(DataError, match="tasks.json: cannot be shown: .*no JSON object"):
        answers.write_answers([place])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("greedy", "value"), 1.5),
        (("greedy", "low"), -0.1),
        (("unparsable", "high"), 7),
        (("maj_at", "5", "value"), 50),
        (("pass_at", "30", "value"), -3),
    ],
)
def test_a_share_beyond_its_range_is_refused(tmp_path, place, value):
    folder = _folder(tmp_path / "one", 0.5)
    numbers = json.loads((folder / "tasks.json").read_text())
    node = numbers["sums?x=1"]
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    (folder / "tasks.json").write_text(json.dumps(numbers))
    with pytest.raises(DataError, match=f"'{place[-1]}' is {value}.*must be from 0 to 1"):
        answers.write_answers([folder])
