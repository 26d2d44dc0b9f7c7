import numpy as np
import pytest

from jaxdistill.data import batching, pipeline
from jaxdistill.data.dataset import empty_row
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError
from jaxdistill.types import ORIGINS

TALKS = ["aaa", "bb", "cccc", "d", "e" * 23, "ffffff"]


@pytest.fixture
def build(jsonl, tmp_path, byte_tokenizer):
    def make(lines, **options):
        options = {"seq_len": 8, "cache_dir": tmp_path / "cache", **options}
        return pipeline.build(jsonl(lines), byte_tokenizer, **options)

    return make


def test_a_row_by_hand(build, byte_tokenizer):
    dataset = build([{"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": "de"}],
                    loss_on="completion")  # fmt: skip
    a, b, c, d, e = byte_tokenizer("abcde", add_special_tokens=False)["input_ids"]
    assert len(dataset) == 1
    row = dataset[0]
    assert row["tokens"].tolist() == [a, b, c, 0, d, e, 0, 0]
    assert row["targets"].tolist() == [b, c, 0, 0, e, 0, 0, 0]
    assert row["mask"].tolist() == [False, True, True, False, True, True, False, False]
    assert row["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    assert [row[field].dtype for field in row] == [np.int32, np.int32, bool, np.int32, np.int32]
    assert (dataset.num_tokens, dataset.num_loss_tokens) == (7, 4)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("seq_len", [2, 5, 8, 64])
def test_rows_hold_every_token_once_and_cross_no_border(build, packing, seq_len, byte_tokenizer):
    dataset = build([{"text": text} for text in TALKS], packing=packing, seq_len=seq_len)
    expected = []
    for text in TALKS:
        ids = [*byte_tokenizer(text, add_special_tokens=False)["input_ids"], 0]
        expected += [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    found, counted = [], 0
    for index in range(len(dataset)):
        row = dataset[index]
        segments = row["segment_ids"]
        kept = segments[segments > 0]
        assert (segments[len(kept) :] == 0).all() and (np.diff(kept) >= 0).all()
        assert sorted(set(kept.tolist())) == list(range(1, kept.max() + 1))
        for segment in range(1, kept.max() + 1):
            [place] = np.nonzero(segments == segment)
            tokens = row["tokens"][place]
            found.append(tokens.tolist())
            assert row["positions"][place].tolist() == list(range(len(place)))
            assert row["targets"][place[:-1]].tolist() == tokens[1:].tolist()
            assert row["mask"][place[:-1]].all() and not row["mask"][place[-1]]
        assert not row["mask"][segments == 0].any()
        counted += row["mask"].sum()
    assert sorted(found) == sorted(expected)
    assert counted == dataset.num_loss_tokens
    assert dataset.num_tokens == sum(map(len, expected))
    assert packing == "best_fit" or len(dataset) == len(expected)


def test_the_count_of_predictions_is_that_of_the_rows(build):
    lines = [{"prompt": "a" * n, "completion": "b" * (n % 5 + 1)} for n in range(20)]
    for policy in ("split", "truncate"):
        dataset = build(lines, loss_on="completion", long_documents=policy, max_bad_fraction=1.0)
        assert dataset.num_loss_tokens == sum(row["mask"].sum() for row in dataset) > 0


def test_indices_are_checked(build):
    dataset = build([{"text": "ab"}])
    for index in (-1, 1):
        with pytest.raises(IndexError, match="of 1"):
            dataset[index]


def test_fill(build):
    dataset = build([{"text": "a" * 7}] * 6)
    assert len(dataset) == 6 and dataset.fill() == 1.0
    assert build([{"text": "abc"}]).fill() == 0.5


def test_an_empty_row_counts_nothing():
    row = empty_row(4, 9)
    assert row["tokens"].tolist() == [9] * 4
    assert not row["segment_ids"].any() and not row["mask"].any()


def test_who_wrote_a_text_is_told_token_by_token(tmp_path, byte_tokenizer):
    """And nothing is told, and no fingerprint changes, where all of it is data."""
    files = {}
    for who, texts in {"teacher": ["aaa", "bb"], "data": ["cccc"], "student": ["d", "ee"]}.items():
        files[who] = tmp_path / f"{who}.jsonl"
        files[who].write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    options = {"seq_len": 9, "cache_dir": tmp_path / "cache"}

    def build(**origins):
        sources = [open_source(path, origin=origins.get(who, who)) for who, path in files.items()]
        return pipeline.build(sources, byte_tokenizer, **options)

    dataset = build()
    whose = {byte_tokenizer(c, add_special_tokens=False)["input_ids"][0]: ORIGINS.index(who)
             for who, letters in (("teacher", "ab"), ("data", "c"), ("student", "de"))
             for c in letters}  # fmt: skip
    seen = set()
    for index in range(len(dataset)):
        row = dataset[index]
        assert row["origin"].dtype == np.int32
        assert (row["origin"][row["segment_ids"] == 0] == 0).all()
        for token, origin in zip(row["tokens"], row["origin"], strict=True):
            if token in whose:
                assert origin == whose[token]
                seen.add(origin)
    assert seen == {0, 1, 2}
    [*_, (_, last)] = batching.eval_batches(dataset, batch_size=2, threads=0)
    assert last.origin.shape == (2, 9)
    plain = build(teacher="data", student="data")
    assert "origin" not in plain[0]
    assert plain.fingerprint != dataset.fingerprint
    [*_, (_, last)] = batching.eval_batches(plain, batch_size=2, threads=0)
    assert last.origin is None
    with pytest.raises(DataError, match="origin 'me' is unknown"):
        open_source(files["data"], origin="me")
