"""The results of the soak: each part is as promised, and what is not would be told."""

import datetime
import json
import re

import pytest

from benchmarks import duel, soak

PARTS = json.loads((duel.RESULTS / "soak.json").read_text())["parts"]
WORSE = {
    "bitwise_equal": False, "bitwise_equal_runs": -1, "unreadable_run_folders": 1, "exits_75": -1,
    "saved": -1, "whole": -1, "refused_with_reason": 0, "equal_builds": -1, "left_behind": 1,
    "tracebacks": 1, "detected": -1, "found": -1, "put_aside_and_told": -1, "as_promised": False,
    "sound": False, "arrays_equal": False, "resumed_exit_code": 1, "records/lost": 1,
    "nonfinite_values_in_any_checkpoint": 1, "values_checked": 0, "configs/without a place": 1,
    "files/message without a name": 1, "bad": {"reset": 1}, "left": 1, "slowest_health": 1.5,
    "digest_share_of_time": 0.06, "bounded": False, "equal_rewards_and_answers": False,
    "largest_difference": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_what_is_saved_is_as_promised(name):
    assert soak.SOUND[name.partition(",")[0]](PARTS[name])


def _others(counts):
    """The counts with one of them changed for the worse, one after the other."""
    for name, value in counts.items():
        if name in WORSE:
            yield counts | {name: WORSE[name]}
        elif isinstance(value, dict):
            yield from (counts | {name: other} for other in _others(value))


@pytest.mark.parametrize("name", PARTS)
def test_what_is_worse_is_not(name):
    part = name.partition(",")[0]
    others = list(_others(PARTS[name]))
    if part == "serve":  # what it found, by kind, is no promise
        others = [other for other in others if other["found"] == PARTS[name]["found"]]
    assert others and not any(soak.SOUND[part](other) for other in others)


def test_every_part_says_when_it_was_saved():
    """Its own day, by the run or by the commit that saved it: the file's is that of the last."""
    for name, counts in PARTS.items():
        assert datetime.date.fromisoformat(counts["date"]).year >= 2026, name


def test_the_table_of_promises_names_only_parts_that_are_saved():
    page = (duel.RESULTS.parents[1] / "jaxdistill" / "README.md").read_text()
    lists = re.findall(r"\bsoak ((?:`\w+`(?:, | and )?)+)", page)
    named = set(re.findall(r"\w+", " ".join(lists).replace(" and ", " ")))
    assert len(named) > 10 and named <= {name.partition(",")[0] for name in PARTS}


def test_every_part_has_its_promise():
    assert set(soak.SOUND) == set(soak.PARTS)


def test_a_part_that_is_wrong_ends_with_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(duel, "RESULTS", tmp_path)
    races = {"rounds": 2, "processes": 3, "whole": 2, "refused_with_reason": 4}
    for whole, code in ((2, 0), (1, 1)):
        monkeypatch.setitem(soak.PARTS, "races", lambda *_, whole=whole: races | {"whole": whole})
        monkeypatch.setattr("sys.argv", ["soak", "--only", "races", "--folder", str(tmp_path)])
        assert soak.main() == code
        assert ("races: is not as promised" in capsys.readouterr().err) is bool(code)
    saved = json.loads((tmp_path / "soak.json").read_text())["parts"]["races"]
    assert saved["date"] and saved["whole"] == 1
