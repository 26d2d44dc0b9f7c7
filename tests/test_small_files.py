"""Every small file may be empty, cut, of another shape, no text, full of numbers: one message."""

import os

import pytest

from benchmarks import soak_small_files
from jaxdistill.errors import UserError
from jaxdistill.report import answers, curves, diagrams, pictures, run_files
from jaxdistill.run.folder import RunDir


@pytest.fixture
def plain_pages(monkeypatch):
    """Pages without pictures: what matplotlib makes of numbers is tested elsewhere."""
    for module in (pictures, answers, curves, diagrams):
        monkeypatch.setattr(module, "render", lambda *_, **__: "<svg/>", raising=False)


@pytest.mark.parametrize(("reader", "name"), soak_small_files.CASES)
def test_a_damaged_small_file_is_read_around_or_named(reader, name, tmp_path, plain_pages):
    every = 4 if reader in ("report", "story", "answers") else 1  # pages take time
    variants, wrong = soak_small_files.fuzz(reader, name, tmp_path / "folder", 12, every=every)
    assert variants > 6 and not wrong, wrong[0]


def test_what_is_no_file_is_not_read_for_ever(tmp_path):
    os.mkfifo(tmp_path / "RUN.json")
    with pytest.raises(UserError, match="no regular file"):
        RunDir.open(tmp_path)
    assert run_files.read_object(tmp_path / "RUN.json", []) == {}
