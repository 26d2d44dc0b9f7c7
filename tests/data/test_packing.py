import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.data.packing import best_fit, plan, windows

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(LENGTHS, st.integers(2, 20))
def test_windows_cut_every_document_and_lose_nothing(lengths, seq_len):
    offsets = np.cumsum([0, *lengths])
    pieces, own = windows(offsets[:-1], np.asarray(lengths), seq_len)
    expected = [
        (start, min(seq_len, offsets[d + 1] - start), d)
        for d in range(len(lengths))
        for start in range(offsets[d], offsets[d + 1], seq_len)
    ]
    assert [(*piece, d) for piece, d in zip(pieces, own, strict=True)] == expected


def slow_best_fit(lengths, capacity):
    """The definition, one row after the other."""
    free, rows = [], [None] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [(space, row) for row, space in enumerate(free) if space >= lengths[index]]
        if fitting:
            rows[index] = min(fitting)[1]
        else:
            rows[index] = len(free)
            free.append(capacity)
        free[rows[index]] -= lengths[index]
    return free, rows


@given(st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_best_fit_keeps_the_promise_of_the_definition(lengths):
    rows = best_fit(np.asarray(lengths), 20)
    used = np.bincount(rows, weights=lengths)
    assert (used <= 20).all() and (used > 0).all()
    free, _ = slow_best_fit(lengths, 20)
    assert sorted(20 - used) == sorted(free)
    assert len(used) <= 11 / 9 * np.ceil(sum(lengths) / 20) + 4
    # Rows are numbered by the first piece they hold.
    first = [rows.tolist().index(row) for row in range(len(used))]
    assert first == sorted(first)


def test_best_fit_by_hand():
    assert best_fit(np.asarray([3, 7, 5, 5, 2, 8]), 10).tolist() == [0, 0, 1, 1, 2, 2]
    assert best_fit(np.asarray([10, 10]), 10).tolist() == [0, 1]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@given(lengths=LENGTHS)
def test_a_plan_holds_every_piece_once(packing, lengths):
    pieces, _ = windows(np.cumsum([0, *lengths])[:-1], np.asarray(lengths), 16)
    segments, rows = plan(pieces, [16], packing)
    assert sorted(map(tuple, segments)) == sorted(map(tuple, pieces))
    assert rows[0] == 0 and rows[-1] == len(pieces) and (np.diff(rows) > 0).all()
    for first, last in zip(rows[:-1], rows[1:], strict=True):
        assert segments[first:last, 1].sum() <= 16
        assert (np.diff(segments[first:last, 0]) > 0).all()
        assert packing == "best_fit" or last - first == 1


def test_packing_takes_seconds_for_many_pieces():
    lengths = np.random.default_rng(0).integers(1, 2049, 200_000)
    start = time.process_time()
    rows = best_fit(lengths, 2048)
    assert time.process_time() - start < 10
    assert lengths.sum() / ((rows.max() + 1) * 2048) > 0.99
