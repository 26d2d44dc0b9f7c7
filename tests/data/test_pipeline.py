import gc
import inspect
import itertools
import json
import threading
import time
import tokenize

import numpy as np
import pytest

from jaxdistill.data import batching, pipeline
from jaxdistill.data.feed import CorpusFeed
from jaxdistill.errors import ConfigError
from jaxdistill.types import Batch

FIELDS = ("tokens", "targets", "mask", "positions", "segment_ids")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, byte_tokenizer):
    """23 rows, each of one document that says its number."""
    folder = tmp_path_factory.mktemp("rows")
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {n:02d}"}) for n in range(23)))
    return pipeline.build(
        path, byte_tokenizer, seq_len=10, packing="none", cache_dir=folder / "cache"
    )


def take(dataset, count, **options):
    options = {"seed": 3, "batch_size": 4, **options}
    return list(itertools.islice(batching.batches(dataset, **options), count))


def same(one, other):
    return all(np.array_equal(getattr(one, f), getattr(other, f)) for f in FIELDS)


def numbers(dataset, batch):
    """Which rows of the data set a batch holds."""
    rows = {tuple(dataset[index]["tokens"].tolist()): index for index in range(len(dataset))}
    return [rows[tuple(row.tolist())] for row in batch.tokens]


def test_a_batch_is_rows_stacked(dataset):
    steps = take(dataset, 5, shuffle=False)
    assert [span for span, _ in steps] == [(4 * step, 4 * step + 4) for step in range(5)]
    for step, (_, batch) in enumerate(steps):
        assert isinstance(batch, Batch) and batch.tokens.shape == (4, 10)
        for place in range(4):
            row = dataset[(4 * step + place) % 23]
            for field in FIELDS:
                array = getattr(batch, field)
                assert isinstance(array, np.ndarray) and array.dtype == row[field].dtype
                np.testing.assert_array_equal(array[place], row[field])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_epoch_holds_every_row_once_in_its_own_order(dataset, threads):
    steps = take(dataset, 23 * 3, threads=threads)
    stream = [number for _, batch in steps for number in numbers(dataset, batch)]
    epochs = [stream[start : start + 23] for start in range(0, len(stream), 23)]
    assert len(epochs) == 12
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12
    assert list(range(23)) not in epochs


def test_the_order_is_the_seeds(dataset):
    first, again, other = (take(dataset, 6, seed=seed) for seed in (3, 3, 4))
    assert all(same(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(same(a[1], b[1]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("start", [0, 1, 5, 6, 40])
def test_resuming_gives_the_tail(dataset, start):
    whole = take(dataset, 46)
    tail = take(dataset, 46 - start, start=4 * start, threads=0)
    assert [span for span, _ in tail] == [span for span, _ in whole[start:]]
    assert all(same(a[1], b[1]) for a, b in zip(whole[start:], tail, strict=True))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_of_another_size_go_on_with_the_row_that_follows(dataset, size):
    stream = [number for _, batch in take(dataset, 30) for number in numbers(dataset, batch)]
    rest = take(dataset, 5, start=13, batch_size=size)
    assert [span for span, _ in rest] == [(13 + n * size, 13 + n * size + size) for n in range(5)]
    rows = [number for _, batch in rest for number in numbers(dataset, batch)]
    assert rows == stream[13 : 13 + 5 * size]


@pytest.mark.parametrize("start", [0, 1, 3, 5, 7, 9])
@pytest.mark.parametrize("left_out", [[(3, 5)], [(0, 2), (5, 6), (9, 21)], [(1, 30)]])
def test_batches_pass_over_the_rows_that_are_left_out(dataset, start, left_out):
    stream = [number for _, batch in take(dataset, 30) for number in numbers(dataset, batch)]
    given = [row for row in range(start, 60) if not any(a <= row < b for a, b in left_out)]
    steps = take(dataset, 6, start=start, left_out=left_out)
    for step, (span, batch) in enumerate(steps):
        rows = given[4 * step : 4 * step + 4]
        assert span == (rows[0], rows[-1] + 1)
        assert numbers(dataset, batch) == [stream[row] for row in rows]


def test_a_corpus_is_read_ahead_and_gives_any_row_again(dataset, monkeypatch):
    opened, original, gaps = [], batching.batches, [(20, 22)]
    whole = take(dataset, 8, left_out=gaps)
    after = take(dataset, 1, start=16)[0][1]

    def batches(*arguments, **options):
        opened.append(options["start"])
        return original(*arguments, **options)

    monkeypatch.setattr(batching, "batches", batches)
    feed = CorpusFeed(dataset, batch_size=4, seed=3, left_out=lambda: gaps)
    row = 0
    for span, batch in whole[:6]:
        ours = feed.next(row, None)
        assert ours[0] == span and same(ours[1], batch)
        row = span.end_row
    assert opened == [0]
    assert same(feed.next(8, None)[1], whole[2][1]) and opened == [0, 8]
    gaps.insert(0, (12, 16))  # of a rollback: what was prepared is not what comes now
    assert same(feed.next(12, None)[1], after)
    assert opened == [0, 8, 12]


def test_a_far_step_is_reached_at_once(dataset):
    begin = time.monotonic()
    [(span, batch)] = take(dataset, 1, start=10**12)
    assert span == (10**12, 10**12 + 4) and batch.tokens.shape == (4, 10)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_tile_the_global_batch(dataset, count):
    whole = take(dataset, 9)
    share = 4 // count
    rows = [range(p * share, (p + 1) * share) for p in range(count)]
    parts = [take(dataset, 9, rows=own) for own in rows]
    for step in range(9):
        for field in FIELDS:
            tiles = [getattr(part[step][1], field) for part in parts]
            assert all(len(tile) == 4 // count for tile in tiles)
            np.testing.assert_array_equal(np.concatenate(tiles), getattr(whole[step][1], field))


def test_fewer_rows_than_the_batch_are_reported(dataset, caplog):
    steps = take(dataset, 2, batch_size=50)
    stream = [number for _, batch in steps for number in numbers(dataset, batch)]
    assert sorted(stream[:92]) == sorted(list(range(23)) * 4)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("batch_size = 50: the data set has 23 rows, so every batch holds some")
    caplog.clear()
    next(batching.batches(dataset, batch_size=len(dataset), seed=0))
    assert not caplog.records


def test_a_feed_opens_while_somebody_edits_the_package(dataset, monkeypatch):
    """Grain names a step by the lines of its function, which an edit may have torn."""

    def torn(function):
        if inspect.isfunction(function):
            raise tokenize.TokenError("EOF in multi-line string", (39, 94))
        raise TypeError("no function")

    monkeypatch.setattr(inspect, "getsourcelines", torn)
    monkeypatch.setattr(inspect, "getsourcefile", lambda _: "pipeline.py")
    span, _ = next(batching.batches(dataset, batch_size=4, seed=0))
    assert span == (0, 4)


def test_wrong_arguments(dataset):
    for options, words in (
        ({"batch_size": 0}, "batch_size: 0"),
        ({"rows": [3, 4]}, r"rows: \[3, 4\]: must be some of 0 to 3"),
        ({"rows": []}, "rows: "),
        ({"seed": -1}, "seed: -1: must lie between"),
        ({"seed": 2**32}, "seed: 4294967296"),
        ({"start": -1}, "row -1: must be at least 0"),
    ):
        # At the call, not at the first batch.
        with pytest.raises(ConfigError, match=words):
            batching.batches(dataset, **{"batch_size": 4, "seed": 0, **options})


@pytest.mark.parametrize("batch_size", [1, 4, 23, 40])
def test_evaluation_sees_every_row_once(dataset, batch_size):
    steps = list(batching.eval_batches(dataset, batch_size=batch_size))
    assert [number for number, _ in steps] == list(range(-(-23 // batch_size)))
    whole = {f: np.concatenate([getattr(batch, f) for _, batch in steps]) for f in FIELDS}
    for field in FIELDS:
        expected = np.stack([row[field] for row in dataset])
        np.testing.assert_array_equal(whole[field][:23], expected)
    assert len(whole["tokens"]) == len(steps) * batch_size
    assert not whole["mask"][23:].any() and not whole["segment_ids"][23:].any()
    assert (whole["tokens"][23:] == dataset.pad).all()


def test_evaluation_tiles_too(dataset):
    whole = [batch for _, batch in batching.eval_batches(dataset, batch_size=8)]
    parts = [
        [batch for _, batch in batching.eval_batches(
            dataset, batch_size=8, rows=[2 * p, 2 * p + 1])]
        for p in range(4)
    ]  # fmt: skip
    assert [len(part) for part in parts] == [3] * 4
    for step, batch in enumerate(whole):
        tiles = np.concatenate([part[step].tokens for part in parts])
        np.testing.assert_array_equal(tiles, batch.tokens)


def test_an_abandoned_iterator_leaves_no_threads(dataset):
    before = threading.active_count()
    for _ in range(3):
        iterator = batching.batches(dataset, batch_size=4, seed=0, threads=3)
        next(iterator)
        del iterator
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_the_quickstarts_text(tmp_path, bpe_tokenizer):
    sets = [
        pipeline.build(f"python:docs?split={split}", bpe_tokenizer, seq_len=256, cache_dir=tmp_path)
        for split in ("train", "held_out")
    ]
    assert sets[0].fingerprint != sets[1].fingerprint
    assert all(data.kind == "text" and data.quarantined == 0 for data in sets)
    assert sets[0].num_tokens > 5 * sets[1].num_tokens > 100_000
    assert all(data.fill() > 0.99 for data in sets)
