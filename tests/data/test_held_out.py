import gzip
import json

import pytest

from jaxdistill.data import held_out, pipeline
from jaxdistill.data.records import Record
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError


@pytest.fixture
def build(tmp_path, byte_tokenizer):
    return lambda sources, name: pipeline.build(
        sources, byte_tokenizer, seq_len=16, cache_dir=tmp_path / "cache", name=name
    )


def texts(source):
    return [item.texts[0] for item in source if isinstance(item, Record)]


def rows(first, last):
    return [{"text": f"record {number}"} for number in range(first, last)]


def test_a_share_is_held_out_by_what_the_records_say(jsonl, build):
    first = open_source(jsonl(rows(0, 1000), "a.jsonl"))
    [train], [held] = held_out.split([first], 0.1)
    assert sorted(texts(train) + texts(held)) == sorted(texts(first))
    assert 70 <= len(texts(held)) <= 130  # 100 on average, three standard deviations
    # Other files beside it, another order, another shape of the file: the same records.
    more = open_source(jsonl(rows(1000, 1500)[::-1], "b.jsonl"))
    again = open_source(jsonl(rows(0, 1000)[::-1], "c.jsonl"))
    _, later = held_out.split([more, again], 0.1)
    assert set(texts(later[1])) == set(texts(held))
    assert len({train.digest(), held.digest(), first.digest()}) == 3
    made = build(train, "train"), build(held, "eval")
    held_out.check(*made)
    assert made[0].used + made[1].used == 1000


def test_broken_records_are_counted_once_and_files_of_a_folder_are_parted(jsonl, tmp_path):
    (tmp_path / "d").mkdir()
    jsonl([*rows(0, 60), b"{"], "d/a.jsonl")
    jsonl(rows(60, 100), "d/b.jsonl")
    [train], [held] = held_out.split([open_source(tmp_path / "d")], 0.3)
    assert len(list(train)) + len(list(held)) == 101
    assert all(isinstance(item, Record) for item in held)
    assert len(held.parts) == 2 and sum(map(texts, held.parts), []) == texts(held)


def test_a_share_that_holds_out_nothing_is_refused(jsonl):
    source = open_source(jsonl(rows(0, 20)))
    with pytest.raises(DataError, match="fraction: 1e-06 holds out none of the 20 records: raise"):
        held_out.split([source], 1e-6)
    with pytest.raises(DataError, match="holds out all of the 20 records: lower it"):
        held_out.split([source], 0.999999)


def test_copies_of_the_training_data_are_no_held_out_data(jsonl, build, tmp_path, caplog):
    train = build(jsonl(rows(0, 40)), "train")
    packed = tmp_path / "copy.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "data.jsonl").read_bytes()))
    for path in (
        packed,
        jsonl(rows(0, 40)[::-1], "turned.jsonl"),
        jsonl(rows(30, 60), "part.jsonl"),
    ):
        with pytest.raises(
            DataError, match="records are in data.train too.*must not be trained on"
        ):
            held_out.check(train, build(path, "eval"))
    listed = tmp_path / "copy.json"
    listed.write_text(json.dumps(rows(0, 40)))
    with pytest.raises(DataError, match="40 of 40 records"):
        held_out.check(train, build(listed, "eval"))
    held_out.check(train, build(jsonl(rows(38, 60), "few.jsonl"), "eval"))
    assert "2 of 22 records are in data.train too" in caplog.text
    caplog.clear()
    held_out.check(train, build(jsonl(rows(40, 60), "other.jsonl"), "eval"))
    assert not caplog.text
