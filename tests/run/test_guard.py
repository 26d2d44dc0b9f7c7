"""Runs whose numbers go wrong: what they leave is what a run leaves that never saw the cause."""

import itertools
import json
import shutil

import numpy as np
import pytest

from jaxdistill import api
from jaxdistill.data import batching
from jaxdistill.errors import ConfigError, DivergedError
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.report import ProgressLine, read_metrics
from jaxdistill.run import run_table, texts
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.hooks import Hooks
from jaxdistill.types import Span
from tests.inject import Poison
from tests.run.test_session import arrays

pytestmark = pytest.mark.usefixtures("plain_runs")
OPTIONS = (
    "train.steps=10",
    "train.eval_every=4",
    "checkpoint.keep.latest=9",
    "guards.nonfinite.max_consecutive=2",
)
BAD = "nan@5,gradient@6"


@pytest.fixture(scope="module")
def run(load_config, tmp_path_factory):
    """(poison, overrides) -> the folder of a finished run; the same program in all of them."""

    def train(text, *overrides, folder=None):
        folder = tmp_path_factory.mktemp("guarded") if folder is None else folder
        api.train(load_config(folder, *OPTIONS, *overrides), hooks=Poison(text))
        return folder / "run"

    return train


@pytest.fixture(scope="module")
def undisturbed(run):
    return run("nan@999")


@pytest.fixture(scope="module")
def rolled_back(run):
    return run(BAD)


def records(folder):
    """The records of a run without what depends on the clock."""
    return [
        {k: v for k, v in one.items() if k != "time" and not k.startswith("perf/")}
        for one in read_metrics(folder)
    ]


def events(folder, *kinds):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["kind"] in kinds]


def same(folder, other, but=()):
    ours, theirs = arrays(folder, 10), arrays(other, 10)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - set(but):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def without(monkeypatch, first, end):
    """From here on the data set has no rows from `first` to before `end`."""
    original = batching.batches

    def batches(dataset, *, start, batch_size, **options):
        feed = original(dataset, start=0, batch_size=batch_size, **options)
        kept = (batch for (row, _), batch in feed if not first <= row < end)
        spans = (Span(row, row + batch_size) for row in itertools.count(0, batch_size))
        return ((span, batch) for span, batch in zip(spans, kept, strict=False) if span[0] >= start)

    monkeypatch.setattr(batching, "batches", batches)


def test_a_transient_fault_leaves_no_trace_but_its_events(run, undisturbed):
    folder = run("nan@5x1,inf@6x1")
    same(folder, undisturbed)
    assert records(folder) == records(undisturbed)
    assert [one["step"] for one in events(folder, "skipped")] == [6, 7]
    assert [one["verdict"] for one in events(folder, "rerun")] == ["transient"]
    assert not events(folder, "rollback") and not (folder / "rollbacks.json").exists()


def test_a_run_that_rolled_back_is_the_run_that_never_saw_those_batches(
    run, rolled_back, monkeypatch
):
    assert [one["verdict"] for one in events(rolled_back, "rerun")] == ["reproducible"]
    (back,) = events(rolled_back, "rollback")
    assert (back["step"], back["to"], back["blamed"]) == (7, 3, "batches")
    without(monkeypatch, 40, 56)
    clean = run("nan@999")
    same(rolled_back, clean)
    # Only how much of the data has gone by differs.
    ours, theirs = records(rolled_back), records(clean)
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("data/epoch", 0) >= other.pop("data/epoch", 0)
    assert ours == theirs
    steps = [one["step"] for one in ours if "loss/total" in one]
    assert steps == list(range(1, 11))


def test_a_killed_run_still_leaves_the_batches_out_when_it_resumes(
    load_config, rolled_back, monkeypatch, tmp_path
):
    step = ProgressLine.step

    def killed(self, number, scalars):
        step(self, number, scalars)
        if number == 5 and events(tmp_path / "run", "rollback"):
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        api.train(load_config(tmp_path, *OPTIONS), hooks=Poison(BAD))
    monkeypatch.setattr(ProgressLine, "step", step)
    api.resume(tmp_path / "run", hooks=Poison(BAD))
    same(tmp_path / "run", rolled_back)
    assert records(tmp_path / "run") == records(rolled_back)
    assert len(events(tmp_path / "run", "skipped")) == 3  # two and the rerun, before the kill


def test_a_run_that_gives_up_saves_the_batch_and_says_where(run, load_config, tmp_path):
    with pytest.raises(DivergedError, match=r"step 6 \(rows 40 to 47\).*rollbacks = 0") as error:
        run(BAD, "guards.nonfinite.max_rollbacks=0", folder=tmp_path)
    assert error.value.exit_code == 7
    path = tmp_path / "run" / "crash" / "rows_00000040.npz"
    assert str(path) in str(error.value)
    dataset = texts.data_of(load_config(tmp_path).data, byte_tokenizer())["train"]
    _, expected = next(batching.batches(dataset, batch_size=8, start=40, seed=3))
    with np.load(path, allow_pickle=False) as saved:
        for name in ("tokens", "targets", "mask", "segment_ids"):
            np.testing.assert_array_equal(saved[name], getattr(expected, name))
        assert (saved["step"], saved["first_row"], saved["end_row"]) == (6, 40, 48)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 3


def test_no_rollback_to_where_there_is_no_checkpoint_but_to_the_start(run, monkeypatch):
    folder = run("nan@0,nan@1")
    (back,) = events(folder, "rollback")
    assert (back["to"], back["first_row"], back["end_row"]) == (0, 0, 16)
    without(monkeypatch, 0, 16)
    same(folder, run("nan@999"))


def test_an_evaluation_that_is_nan_is_never_the_best(load_config, monkeypatch, tmp_path):
    measured = itertools.count()
    evaluate = run_table.RunTable.evaluate

    def sometimes_nan(self, state):
        metrics = evaluate(self, state)
        return metrics | {"eval/loss": float("nan")} if next(measured) else metrics

    monkeypatch.setattr(run_table.RunTable, "evaluate", sometimes_nan)
    api.train(load_config(tmp_path, "checkpoint.keep.latest=1"))
    folder = tmp_path / "run"
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.best() == 3 and checkpoints.steps() == [3, 6]
    assert [one["step"] for one in events(folder, "evaluation")] == [6]
    assert arrays(folder, 3)


class RowsSeen(Hooks):
    """Keeps the tokens of all rows that training is given, in order."""

    def __init__(self):
        self.rows = []

    def batch(self, index, batch):
        self.rows.extend(np.asarray(batch.tokens))
        return batch


def edit(folder, *pairs):
    """Changes lines of the configuration that a run resumes with."""
    file = folder / "config.resolved.yaml"
    text = file.read_text()
    for before, after in pairs:
        assert text.count(before) == 1
        text = text.replace(before, after)
    file.write_text(text)


def test_a_run_that_resumes_with_another_batch_size_reads_the_rows_that_follow(
    load_config, tmp_path
):
    config = load_config(tmp_path, "train.steps=12", "train.eval_every=null")
    dataset = texts.data_of(config.data, byte_tokenizer())["train"]
    stream = batching.batches(dataset, batch_size=1, seed=3)
    rows = np.concatenate([batch.tokens for _, batch in itertools.islice(stream, 120)])
    first, rest = RowsSeen(), RowsSeen()
    api.train(config, hooks=first)
    np.testing.assert_array_equal(np.stack(first.rows), rows[:96])
    folder = tmp_path / "run"
    edit(folder, ("batch_size: 8\n  micro", "batch_size: 4\n  micro"), ("steps: 12", "steps: 18"))
    api.resume(folder, hooks=rest)
    np.testing.assert_array_equal(np.stack(rest.rows), rows[96:120])
    epochs = {one["step"]: one["data/epoch"] for one in read_metrics(folder) if "data/epoch" in one}
    assert epochs[12] == 96 / len(dataset) and epochs[18] == 120 / len(dataset)


def test_a_run_whose_files_count_batches_resumes_to_the_same_bits(
    load_config, run, undisturbed, monkeypatch, tmp_path
):
    """As an earlier version left them, with a `data_step` and no `data_row`."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for step in (9, 10):
        shutil.rmtree(folder / "checkpoints" / str(step))
    restore = Checkpoints.restore_latest

    def counting_batches(self, *arguments):
        step, state, meta = restore(self, *arguments)
        meta["data_step"] = meta.pop("data_row") // 8
        return step, state, meta

    monkeypatch.setattr(Checkpoints, "restore_latest", counting_batches)
    edit(folder, ("batch_size: 8\n  micro", "batch_size: 16\n  micro"))
    with pytest.raises(ConfigError, match="train.batch_size = 16: the run began with 8"):
        api.resume(folder)
    edit(folder, ("batch_size: 16\n  micro", "batch_size: 8\n  micro"))
    api.resume(folder, hooks=Poison("nan@999"))  # the program of the run
    same(folder, undisturbed)
