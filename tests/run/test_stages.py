"""Runs whose teacher is asked in a part of the steps: two programs, glued to the bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxdistill import api, teachers
from jaxdistill.errors import UserError
from jaxdistill.report import read_metrics
from jaxdistill.run import participants, setup, stages, states
from jaxdistill.train import step as steps
from jaxdistill.train.hooks import Hooks
from jaxdistill.train.table import flatten
from tests.also import also
from tests.run.test_session import arrays

pytestmark = pytest.mark.usefixtures("plain_runs")
EVERY = "checkpoint={every: {steps: 1}, keep: {latest: 9}}"


class Batches(Hooks):
    """Keeps the batches of a run."""

    def __init__(self):
        self.kept = {}

    def batch(self, index, batch):
        self.kept[index] = batch
        return batch


@pytest.fixture(scope="module")
def staged(load_config, tmp_path_factory):
    """A run of six steps whose teacher is asked in the third, fourth and fifth; its batches."""
    hooks = Batches()
    config = load_config(
        tmp_path_factory.mktemp("staged"), "teacher.from=2", "teacher.until=0.84", EVERY
    )
    return api.train(config, hooks=hooks).run_dir, config, hooks.kept


def test_the_run_is_three_runs_glued_together_to_the_bit(staged, load_config):
    """SFT, KD, SFT: losses of runs that ask a teacher throughout or never, and one optimizer."""
    run, config, batches = staged
    mesh = setup.mesh_of(config)
    models = participants.load_models(config, participants.shapes_of(config, mesh), mesh)
    method = setup.method_of(config, models)
    alone = config.model_copy(update={"method": sft_of(load_config, run.parent)})
    sft = setup.method_of(alone, models)
    assert not sft.objective.needs_teacher
    sft = dataclasses.replace(sft, tx=method.tx)
    monitor = steps.recorded(1, 6)
    state = states.create(config, models.student, method.objective, method.tx, mesh)
    for number in range(1, 7):
        taught = 3 <= number <= 5
        one = method if taught else sft
        teacher_params = one.asked.params
        assert (one.teacher is teachers.none) == (not taught) == (teacher_params is None)
        batch = steps.place(batches[number - 1], mesh)
        program = steps.compiled(
            setup.make_step(config, one, monitor), state, teacher_params, batch, mesh
        )
        state, _ = program(state, teacher_params, batch)
        saved = arrays(run, number)
        for name, value in flatten(state.params).items():
            np.testing.assert_array_equal(
                saved[f"params/{name}"], value, err_msg=f"{number} {name}"
            )
        jax.block_until_ready(state)


def sft_of(load_config, folder):
    """The options of plain fine-tuning."""
    student = "student={random: {layers: 1, embed: 8, mlp: 8, heads: 2}}"
    return load_config(folder, "method={name: sft}", "teacher=null", student).method


def test_it_says_so_and_its_curve_goes_on(staged):
    run, _, _ = staged
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = [(event["step"], event["teacher"]) for event in events if event["kind"] == "stage"]
    assert told == [(3, True), (6, False)]
    assert sum(event["kind"] == "compiled" for event in events) == 2
    records = {r["step"]: r for r in read_metrics(run) if "loss/total" in r}
    assert [records[n]["knobs/teacher"] for n in range(1, 7)] == [0, 0, 1, 1, 1, 0]
    for number, record in records.items():
        taught = 3 <= number <= 5
        assert ("loss/divergence" in record) == taught == ("perf/teacher_share" in record)
        if not taught:
            np.testing.assert_allclose(record["loss/total"], record["loss/ce"], rtol=1e-6)
    evaluated = {r["step"]: r for r in read_metrics(run) if "eval/kl_t1" in r}
    assert set(evaluated) == {3, 6}  # held-out text is measured beside the teacher throughout


@pytest.mark.parametrize("at", [4, *also(1, 2, 5)])
def test_a_resumed_run_ends_in_the_same_bits_on_either_side(staged, tmp_path, at):
    run, _, _ = staged
    shutil.copytree(run, tmp_path / "copy")
    for number in range(at + 1, 7):
        shutil.rmtree(tmp_path / "copy" / "checkpoints" / str(number))
    api.resume(tmp_path / "copy")
    for name, value in arrays(run, 6).items():
        np.testing.assert_array_equal(arrays(tmp_path / "copy", 6)[name], value)


def test_the_stages_of_a_configuration(load_config, tmp_path):

    def shown(*options):
        config = load_config(tmp_path, *options)
        parts = stages.of(config.teacher, config.student, config.method, config.train.steps)
        assert all(stage.rounded is None for stage in parts)
        return [stage[:2] for stage in parts]

    assert shown() == [(0, True)]
    assert shown("teacher.until=0.6") == [(0, True), (4, False)]
    assert shown("teacher.from=2") == [(0, False), (2, True)]
    assert shown("teacher.from=2", "teacher.until=4") == [(0, False), (2, True), (4, False)]


SFT = "method={name: sft}"
TAID = "method={name: taid}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.until=0"], "is before the first step: the teacher would never be asked"),
        (["teacher.until=0.01"], "is before the first step"),
        (["teacher.until=6"], "is step 6, and the run has 6"),
        (["teacher.from=6"], "is step 6, and the run has 6"),
        (["teacher.from=0"], "from which the teacher is asked anyway"),
        (["teacher.from=3", "teacher.until=3"], "must be before until"),
        (["teacher.until=3", SFT], "has no effect with method sft"),
        (
            ["teacher.until=3", TAID],
            "method taid has a knob, taid_t, that adapts to what the teacher says",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    load_config, tmp_path, overrides, words
):
    with pytest.raises(UserError, match=words):
        api.train(load_config(tmp_path, *overrides))
    assert not (tmp_path / "run").exists()
