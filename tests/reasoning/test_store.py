"""Samples on disk: a torn line is dropped, what was added stays, nothing is doubled."""

import dataclasses
import json

import pytest

from jaxdistill.errors import ConfigError, StorageError
from jaxdistill.reasoning.rationales import Sample
from jaxdistill.reasoning.store import AnswerStore


def _sample(name, number):
    return Sample(name, number, "q", "1", "text", "why", "1", True, -1.0, 2, "stop")


def test_a_store_goes_on_where_it_was(tmp_path):
    with AnswerStore(tmp_path / "a", {"task": "x"}) as store:
        assert store.missing("q", 5) == [(0, 5)]
        for number in (0, 1, 3):
            assert store.add(_sample("q", number))
        assert not store.add(_sample("q", 1))
    with (tmp_path / "a" / "samples.jsonl").open("a") as file:
        file.write('{"id": "q", "sam')  # a kill in the middle of a line
    with AnswerStore(tmp_path / "a", {"task": "x"}) as store:
        assert sorted(number for _, number in store.samples) == [0, 1, 3]
        assert store.missing("q", 6) == [(2, 1), (4, 2)] and store.missing("q", 2) == []
        assert store.missing("other", 1) == [(0, 1)]
        store.add(_sample("q", 2))
    lines = (tmp_path / "a" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [0, 1, 3, 2]


def test_what_is_kept_is_searched_for_keys(tmp_path):
    key = "github_pat_" + "0123456789abcdefghij"
    sample = dataclasses.replace(_sample("q", 0), completion=f"use {key}", rationale=f"{key}.")
    with AnswerStore(tmp_path, {"model": f"x at http://me:{key}@host"}) as store:
        store.add(sample)
        assert store.samples["q", 0].completion == "use [redacted]"
    assert store.samples["q", 0].tokens == 2
    assert key not in "".join(path.read_text() for path in tmp_path.iterdir())
    AnswerStore(tmp_path, {"model": f"x at http://me:{key}@host"}).close()  # the same configuration


def test_another_configuration_or_damage_is_refused(tmp_path):
    AnswerStore(tmp_path, {"task": "x", "n": 1}).close()
    with pytest.raises(ConfigError, match=r"another configuration \(task changed\)"):
        AnswerStore(tmp_path, {"task": "y", "n": 1})
    (tmp_path / "samples.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ConfigError, match="samples.jsonl:1: is no sample"):
        AnswerStore(tmp_path, {"task": "x", "n": 1})

    for name in ("sample", "tokens"):
        row = dataclasses.replace(_sample("q", 0), **{name: -1}).json()
        (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(ConfigError, match=f"'{name}' is negative"):
            AnswerStore(tmp_path, {"task": "x", "n": 1})


def test_a_damaged_note_is_named(tmp_path):
    AnswerStore(tmp_path, {"task": "x"}).close()
    for text in ("{", "[1]", "7", ""):
        (tmp_path / "asked.json").write_text(text)
        with pytest.raises(ConfigError, match="asked.json: is damaged"):
            AnswerStore(tmp_path, {"task": "x"})


def test_one_process_asks_at_a_time(tmp_path):
    with (
        AnswerStore(tmp_path, {"task": "x"}),
        pytest.raises(ConfigError, match="is being written by another process"),
    ):
        AnswerStore(tmp_path, {"task": "x"})
    AnswerStore(tmp_path, {"task": "x"}).close()


def test_a_full_disk_is_one_message_and_leaves_whole_lines(tmp_path, monkeypatch):
    class Full:
        """Takes half a record, and then nothing."""

        def __init__(self, file):
            self.file, self.left = file, 20

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            written, self.left = self.file.write(data[: self.left]), 0
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    with AnswerStore(tmp_path, {"task": "x"}) as store:
        store.add(_sample("q", 0))
        store._file = Full(store._file)
        with pytest.raises(StorageError, match="samples.jsonl: cannot be written: No space left"):
            store.add(_sample("q", 1))
    with AnswerStore(tmp_path, {"task": "x"}) as store:
        assert sorted(number for _, number in store.samples) == [0]


def test_samples_without_what_was_asked_are_refused(tmp_path):
    with AnswerStore(tmp_path, {"task": "x"}) as store:
        store.add(_sample("q", 0))
    (tmp_path / "asked.json").unlink()
    with pytest.raises(ConfigError, match="asked.json: is missing, and says what the samples"):
        AnswerStore(tmp_path, {"task": "y"})
