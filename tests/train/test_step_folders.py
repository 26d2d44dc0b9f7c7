"""Folders of checkpoints without JAX: manifests, order, what stays, what was left half-done."""

import math

import pytest

from jaxdistill.safe import manifest
from jaxdistill.train import step_folders
from jaxdistill.train.hooks import NO_HOOKS
from tests.inject import Fault


def commit(directory, step, rank=None, content=b"arrays", hooks=NO_HOOKS):
    staged = step_folders.staging(directory, step)
    (staged / "state").mkdir(parents=True)
    (staged / "state" / "data").write_bytes(content)
    metrics = None if rank is None else {"eval/loss": -rank}
    facts = {"meta": {}, "metrics": metrics, "rank": rank}
    step_folders.commit(directory, step, facts, hooks)


def test_what_is_staged_is_no_checkpoint_until_it_is_committed(tmp_path):
    with pytest.raises(OSError):
        commit(tmp_path, 5, hooks=Fault("checkpoint.commit:1:full"))
    assert step_folders.steps(tmp_path) == []
    step_folders.sweep(tmp_path)
    assert not list(tmp_path.iterdir())
    commit(tmp_path, 5)
    assert step_folders.steps(tmp_path) == [5]


def test_a_removal_that_was_cut_short_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    for step in (1, 2, 3):
        commit(tmp_path, step)
    with pytest.raises(OSError):
        step_folders.retire(tmp_path, {3}, Fault("checkpoint.remove:1:full"))
    assert step_folders.steps(tmp_path) == [2, 3]
    step_folders.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_the_best_is_the_newest_of_equals_and_never_one_that_is_not_finite(tmp_path):
    assert step_folders.best(tmp_path) is None
    for step, rank in ((1, None), (2, -2.0), (3, -1.0), (4, -1.0), (5, -3.0)):
        commit(tmp_path, step, rank)
    assert step_folders.best(tmp_path) == 4
    saved = step_folders.readable(tmp_path)
    assert [one.rank for one in saved] == [-math.inf, -2.0, -1.0, -1.0, -3.0]
    assert step_folders.kept(saved, latest=1, best=1) == {4, 5}
    assert step_folders.kept(saved, latest=2, best=0) == {4, 5}


def test_damage_is_left_for_people_and_set_aside_on_demand(tmp_path):
    for step in (1, 2):
        commit(tmp_path, step)
    (tmp_path / "1" / manifest.NAME).write_text("{")
    assert [one.step for one in step_folders.readable(tmp_path)] == [2]
    step_folders.retire(tmp_path, {2})
    assert step_folders.steps(tmp_path) == [1, 2]
    place = step_folders.set_aside(tmp_path, 1, step_folders.BAD)
    assert step_folders.steps(tmp_path) == [2] and (place / "state" / "data").is_file()
