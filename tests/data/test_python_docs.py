import ast
import sys

import pytest

from jaxdistill.data import python_docs
from jaxdistill.data.records import Record
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError


def test_there_is_real_english_in_a_fixed_order():
    documents = list(python_docs.documents())
    assert len(documents) > 200 and sum(map(len, documents)) > 1_000_000
    words = " ".join(documents).split()
    assert words.count("the") > 5_000
    assert documents == list(python_docs.documents())
    assert all(len(set(document)) > 10 and document.strip() == document for document in documents)
    assert not any(line.startswith(">>>") for text in documents for line in text.splitlines()[:1])


def test_the_splits_are_disjoint_and_make_the_whole():
    everything = list(python_docs.documents())
    train, held_out = list(python_docs.documents("train")), list(python_docs.documents("held_out"))
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(everything)
    assert 0.04 < len(held_out) / len(everything) < 0.2
    assert len(set(everything)) == len(everything)


def test_modules_are_parsed_and_never_imported(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    docstring = "Opens the canary's cage. " * 20
    (tmp_path / "evil.py").write_text(
        f'"""{docstring}"""\nimport pathlib\npathlib.Path({str(canary)!r}).touch()\n'
        'def f():\n    """Sings in the morning, and again when the evening comes."""\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text(f'"""Not part of it. {docstring}"""')
    monkeypatch.setattr(python_docs, "_library", lambda: tmp_path)
    monkeypatch.setattr(python_docs, "_documents", python_docs._documents.__wrapped__)
    before = set(sys.modules)
    [document] = python_docs.documents()
    first = python_docs.digest()
    assert first != python_docs.digest("train")
    text = (tmp_path / "evil.py").read_text()
    (tmp_path / "evil.py").write_text(text.replace("Sings", "Swims"))
    assert first != python_docs.digest()
    (tmp_path / "evil.py").write_text('"""x"""')
    with pytest.raises(DataError, match="ships without its library's source"):
        list(python_docs.documents())
    assert document.startswith("Opens the canary") and "Sings in the morning" in document
    assert not canary.exists() and "evil" not in set(sys.modules) - before


def test_cleaning_keeps_prose_only():
    text = "One  \nline.\n\n\n\n>>> 1 + 1\n2\n\n.. note:: x\n\n---\n\nTwo\x07 lines."
    assert python_docs._clean(text) == "One\nline.\n\nTwo lines."


def test_docstrings_come_in_the_order_of_the_source(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""A."""\nclass K:\n  """B."""\n  def f(self):\n    """C."""\ndef g():\n  """D."""'
    )
    ast.parse(path.read_text())
    assert python_docs._docstrings(path).split() == ["A.", "B.", "C.", "D."]


def test_names():
    items = list(open_source("python:docs?split=held_out"))
    assert all(isinstance(item, Record) for item in items)
    assert [item.texts[0] for item in items] == list(python_docs.documents("held_out"))
    assert [item.line for item in items] == list(range(1, len(items) + 1))
    for name in (
        "python:doc",
        "python:docs?split=test",
        "python:docs?part=1",
        "python:docs?split=",
    ):
        with pytest.raises(DataError, match="python:docs"):
            open_source(name)
    with pytest.raises(DataError, match="holds plain text"):
        open_source("python:docs", "messages")


def test_the_manual_and_the_library_are_all_of_it_and_have_nothing_in_common():
    for split in python_docs.SPLITS:
        manual, library = (
            set(python_docs.documents(split, part)) for part in python_docs.PARTS[1:]
        )
        assert manual and library and not manual & library
        assert manual | library == set(python_docs.documents(split))
    prints = {python_docs.digest("train", part) for part in python_docs.PARTS}
    assert len(prints) == 3 and python_docs.digest("train") in prints
    source = open_source("python:docs?split=held_out&part=manual")
    assert [item.texts[0] for item in source] == list(python_docs.documents("held_out", "manual"))
    with pytest.raises(DataError, match="unknown text set"):
        open_source("python:docs?split=train&part=news")
