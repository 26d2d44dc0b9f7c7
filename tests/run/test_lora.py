"""Runs that train adapters alone: what is kept, resumed, merged and exported; with every method."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxdistill import api, models
from jaxdistill.cli import main
from jaxdistill.errors import ConfigError
from jaxdistill.formats import peft
from jaxdistill.run import setup
from jaxdistill.train.step import place
from jaxdistill.types import Batch
from tests.also import also
from tests.run.conftest import models_of
from tests.run.test_session import arrays, losses

pytestmark = pytest.mark.usefixtures("plain_runs")
LORA = "student.lora={rank: 2, alpha: 8.0, targets: [query, value, down]}"

BATCH = ("train.batch_size=16", "train.micro_batches=2")


@pytest.fixture(scope="module")
def run(load_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return api.train(load_config(folder, LORA, *BATCH, "eval.samples=1")).run_dir


def test_only_adapters_are_trained_and_have_moments(run, load_config, tmp_path):
    config = load_config(tmp_path, LORA)
    before = models_of(config, setup.mesh_of(config)).student
    first, last = arrays(run, 3), arrays(run, 6)
    frozen = {name for name in last if name.startswith("frozen/")}
    trained = {name for name in last if name.startswith("params/student/")}
    for name in frozen:
        node = before.params
        for part in name.split("/")[1:]:
            node = node[part]
        np.testing.assert_array_equal(last[name], node)
    assert trained == {
        f"params/student/layers/{block}/{target}/kernel/{side}"
        for block, target in (("attention", "query"), ("attention", "value"), ("mlp", "down"))
        for side in ("down", "up")
    }
    for name in trained:
        assert not np.array_equal(first[name], last[name]), name
    sizes = sum(last[name].size for name in trained)
    moments = sum(value.size for name, value in last.items() if "/mu/" in name or "/nu/" in name)
    assert moments == 2 * sizes
    curve = losses(run)
    assert curve[6] < curve[1]


def test_a_resumed_run_ends_in_the_same_bits(run, load_config, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "6")
    api.resume(tmp_path / "copy")
    for name, value in arrays(run, 6).items():
        np.testing.assert_array_equal(arrays(tmp_path / "copy", 6)[name], value)


DROPOUT = "student.lora={rank: 2, alpha: 8.0, targets: [query, value, down], dropout: 0.4}"


@pytest.mark.variant
def test_dropout_is_drawn_anew_in_every_step_and_resumes_in_the_same_bits(
    run, load_config, tmp_path
):
    dropped = api.train(load_config(tmp_path / "one", DROPOUT, *BATCH)).run_dir
    assert losses(dropped)[1] == losses(run)[1]  # new adapters add nothing, whatever they read
    assert losses(dropped)[3] != losses(run)[3]
    shutil.copytree(dropped, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "6")
    api.resume(tmp_path / "copy")
    for name, value in arrays(dropped, 6).items():
        np.testing.assert_array_equal(arrays(tmp_path / "copy", 6)[name], value)
    folder = tmp_path / "adapters"
    api.export_adapters(str(dropped), folder)
    assert json.loads((folder / peft.CONFIG).read_text())["lora_dropout"] == 0.4


@pytest.mark.parametrize("options", [LORA, DROPOUT])
def test_what_is_left_out_depends_on_the_step(options, load_config, tmp_path):
    """Two steps on one batch that hardly move the parameters."""
    config = load_config(tmp_path, options, "optimizer.lr=1e-9", "optimizer.warmup=0")
    step, state, teacher = api.build(config)
    places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    moved = jax.device_put(jax.tree.map(lambda leaf: leaf + 0.1, state.params), places)
    state = dataclasses.replace(state, params=moved)
    tokens = np.random.default_rng(0).integers(0, 250, (8, 32)).astype(np.int32)
    ones = np.ones_like(tokens)
    batch = Batch(tokens, np.roll(tokens, -1, 1), ones > 0, ones.cumsum(1, np.int32) - 1, ones)
    found = []
    for _ in range(2):
        state, means = step(state, teacher, place(batch, setup.mesh_of(config)))
        found.append(float(means["loss/ce"].value))
    assert (abs(found[1] - found[0]) > 1e-3) == (options == DROPOUT)


def test_a_run_is_read_merged_and_exported(run, tmp_path):
    kept = arrays(run, 6)
    model = api.load(str(run))
    for block, target in (("attention", "query"), ("mlp", "down"), ("attention", "out")):
        stem = f"layers/{block}/{target}/kernel"
        expected = kept[f"frozen/{stem}"]
        if target != "out":
            down, up = (kept[f"params/student/{stem}/{side}"] for side in ("down", "up"))
            expected = expected + 8.0 / 2 * down @ up
        found = model.params["layers"][block][target]["kernel"]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    api.export(str(run), tmp_path / "merged")
    again = models.load(tmp_path / "merged", tokenizer=False)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_the_command_exports_adapters(run, tmp_path, capsys):
    assert main(["export", str(run), "-o", str(tmp_path / "own"), "--adapters"]) == 0
    described = json.loads((tmp_path / "own" / peft.CONFIG).read_text())
    assert (described["r"], described["lora_alpha"]) == (2, 8.0)
    assert described["target_modules"] == [
        "mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"
    ]  # fmt: skip
    assert main(["export", str(run), "-o", str(tmp_path / "no"), "--adapters", "--dtype",
                 "bfloat16"]) != 0  # fmt: skip


def test_a_run_without_adapters_has_none_to_export(finished, tmp_path):
    with pytest.raises(ConfigError, match="has no adapters: name a run whose configuration has"):
        api.export_adapters(str(finished.run_dir), tmp_path / "none")


@pytest.mark.parametrize(
    "method",
    [
        "{name: taid}",  # a knob with a state
        *also("{name: ted, layers: 2, filter_steps: 0.5}"),  # parameters, stages and features
    ],
)
def test_methods_with_parameters_knobs_and_features_train_adapters(method, load_config, tmp_path):
    options = [f"method={method}", "train.steps=4", "train.eval_every=2"]
    result = api.train(load_config(tmp_path, LORA, *BATCH, *options))
    first, last = (arrays(result.run_dir, step) for step in (3, 4))
    changed = [name for name in first if name.startswith("params/student/")]
    assert any(not np.array_equal(first[name], last[name]) for name in changed)
    for name in first:
        if name.startswith("frozen/"):
            np.testing.assert_array_equal(first[name], last[name])


def test_settings_that_cannot_be_met_are_named(load_config, tmp_path):
    with pytest.raises(ConfigError, match="does not go together with quantize"):
        load_config(tmp_path, LORA, "student.quantize=int8")
    with pytest.raises(ConfigError, match="name each projection once"):
        load_config(tmp_path, "student.lora={targets: [up, up]}")
