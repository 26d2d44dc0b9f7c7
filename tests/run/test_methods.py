"""Every method of a configuration trains, is evaluated, resumes and is exported."""

import json
import math
import pathlib

import jax
import pytest

from jaxdistill import api, models
from jaxdistill.config.optimizer import Optimizer
from jaxdistill.errors import UserError
from jaxdistill.run import participants, setup, states
from tests.also import also

pytestmark = pytest.mark.usefixtures("plain_runs")
WROTE = ("teacher", "student")
METHODS = {
    "taid": "{name: taid, mode: scaled}",
    "ctkd": "{name: ctkd, t_range: 4.0, temperature_lr: 0.05}",
    "ctkd_per_token": "{name: ctkd, per_token: true}",
    "smoothed_kd": "{name: smoothed_kd, label_smoothing: 0.1}",
    "distillm": "{name: distillm, parameters: {skew: 0.2}}",
    "jsd": "{name: jsd, parameters: {beta: {schedule: linear, start: 0.2, end: 0.8}}}",
    "adaptive_kl": "{name: kd, divergence: adaptive_kl, parameters: {mu: 0.6}}",
    "decoupled_kl": "{name: kd, divergence: decoupled_kl}",
    "logit_mse": "{name: kd, divergence: logit_mse, alpha: 0.1}",
    "hidden": "{name: hidden, balance: true}",
    "hidden_pairs": "{name: hidden, layers: [[0, 1], [1, 3]], distance: mse}",
    "distillm2": "{name: distillm2, balance: {schedule: linear, start: 1.0, end: 1.5}}",
    "minilm": "{name: minilm, teacher_layer: 2, feature_weight: 10.0}",
    "ted": "{name: ted, layers: 2, filter_steps: 0.5}",
    "alpha_beta": "{name: kd, divergence: alpha_beta_divergence}",
}


# One of each way to build: the others differ from one of these, or from kd, in numbers alone.
WHOLE_RUNS = ("taid", "ted", *also("ctkd_per_token", "jsd", "hidden", "distillm2", "minilm"))


@pytest.fixture
def configured(load_config, data, tmp_path):
    """name -> the configuration of a run by that method."""

    def load(name):
        options = [f"method={METHODS[name]}", "train.steps=4", "train.eval_every=2"]
        if name == "distillm2":
            text = f"path: {data}/train.txt, format: paragraphs"
            options.append(f"data.train=[{', '.join(f'{{{text}, origin: {w}}}' for w in WROTE)}]")
        return load_config(tmp_path, *options)

    return load


@pytest.mark.parametrize("name", METHODS)
def test_the_step_of_a_method_reads_the_knobs_that_it_is_given(name, configured):
    """Traced, not compiled: every knob is there that the formula reads, and is reported."""
    config = configured(name)
    mesh = setup.mesh_of(config)
    models = participants.shapes_of(config, mesh)
    method = setup.method_of(config, models)
    state = states.abstract(config, models.student.config, method.objective, method.tx, mesh)
    teacher = method.asked.abstract_params(mesh)
    batch = setup.abstract_batch_of(config, mesh, method.asked)
    with jax.set_mesh(mesh):
        _, means = jax.eval_shape(setup.make_step(config, method), state, teacher, batch)
    assert {f"knobs/{knob}" for knob in method.measuring} <= set(means)
    assert "loss/total" in means


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_a_method_of_one_word_runs_end_to_end(name, configured, tmp_path):
    config = configured(name)
    result = api.train(config)
    lines = (pathlib.Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss/total" in line]
    assert len(steps) == 4
    assert all(math.isfinite(line["loss/total"]) for line in steps)
    assert math.isfinite(result.metrics["eval/kl_t1"])
    if name == "taid":
        ts = [line["knobs/taid_t"] for line in steps]
        assert ts == sorted(ts)
        assert ts[0] == pytest.approx(0.4)
        assert ts[-1] > 0.4
    if name == "jsd":
        betas = [line["knobs/divergence_beta"] for line in steps]
        assert betas == pytest.approx([0.2, 0.4, 0.6, 0.8])
    if name.startswith("ctkd"):
        assert steps[0]["loss/temperature"] > 1
        assert steps[-1]["knobs/reversal"] == pytest.approx(-1)
    longer = api.resume(result.run_dir)  # finished: nothing to do, and it opens
    assert longer.metrics["eval/kl_t1"] == pytest.approx(result.metrics["eval/kl_t1"], rel=1e-5)
    folder = api.export(f"{result.run_dir}@latest", tmp_path / "student")
    assert models.load(folder or tmp_path / "student", tokenizer=False).config.layers == 2


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{name: minilm, teacher_layer: 4}", "method.teacher_layer = 4: the teacher has layers"),
        ("{name: minilm, student_layer: 2}", "method.student_layer = 2: the student has layers"),
        ("{name: minilm, heads: 3}", "method.heads = 3: must divide the widths"),
        ("{name: hidden, layers: [[0, 4]]}", "teacher has no layer 4"),
        ("{name: ted, layers: 3}", "layers = 3: must be from 1 to the smaller depth, 2"),
    ],
)
def test_layers_that_do_not_exist_are_named_before_anything_trains(
    method, message, load_config, tmp_path
):
    with pytest.raises(UserError, match=message):
        api.train(load_config(tmp_path, f"method={method}"))


@pytest.mark.parametrize("rule", ["lion", "adafactor"])
def test_the_step_of_a_rule_is_traced(rule, configured):
    config = configured("decoupled_kl")
    config = config.model_copy(update={"optimizer": Optimizer(name=rule)})
    mesh = setup.mesh_of(config)
    models = participants.shapes_of(config, mesh)
    method = setup.method_of(config, models)
    state = states.abstract(config, models.student.config, method.objective, method.tx, mesh)
    teacher = method.asked.abstract_params(mesh)
    with jax.set_mesh(mesh):
        step = setup.make_step(config, method)
        after, _ = jax.eval_shape(
            step, state, teacher, setup.abstract_batch_of(config, mesh, method.asked)
        )
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
    assert all(jax.tree.leaves(same))


def test_muon_with_bfloat16_moments_runs_and_resumes(load_config, tmp_path):
    options = ["train.steps=4", "train.eval_every=4"]
    options += ["optimizer.name=muon", "optimizer.moments=bfloat16"]
    result = api.train(load_config(tmp_path, *options))
    assert math.isfinite(result.metrics["eval/kl_t1"])
    longer = api.resume(result.run_dir)
    assert longer.metrics["eval/kl_t1"] == pytest.approx(result.metrics["eval/kl_t1"], rel=1e-5)
