"""Runs whose student becomes sparse: what is zero, kept, resumed, written; and what is refused."""

import json
import shutil

import numpy as np
import pytest

from jaxdistill import api, models
from jaxdistill.cli import main
from jaxdistill.compress import importance, sparsify
from jaxdistill.errors import ConfigError, UserError
from jaxdistill.report import read_metrics
from jaxdistill.run import setup
from tests.run.conftest import models_of
from tests.run.test_session import arrays, losses

pytestmark = pytest.mark.usefixtures("plain_runs")
SPARSE = "student.sparsity={end: 4, every: 2}"
KERNELS = [f"attention/{n}" for n in ("query", "key", "value", "out")]
KERNELS += [f"mlp/{n}" for n in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def run(load_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    return api.train(load_config(folder, SPARSE)).run_dir


def kernel(saved, name, tree="params"):
    found = [n for n in saved if n.startswith(tree) and n.endswith(f"student/layers/{name}/kernel")]
    return saved[found[0]]


def test_every_four_inputs_of_a_finished_run_have_two_zeros_in_checkpoint_table_and_folder(
    run, tmp_path
):
    saved = arrays(run, 6)
    masks = {name: value for name, value in saved.items() if "/masks/" in name}
    assert len(masks) == len(KERNELS)
    for name in KERNELS:
        values = kernel(saved, name)
        (mask,) = (value for key, value in masks.items() if f"/{name}/kernel" in key)
        np.testing.assert_array_equal(values != 0, mask)
        groups = mask.reshape(mask.shape[0], -1, 4, mask.shape[-1])
        np.testing.assert_array_equal(groups.sum(2), 2)
    table = {row["name"]: row for row in json.loads((run / "table.json").read_text())["rows"]}
    assert table["student after"]["zeros"] == 0.5
    assert "zeros" not in table["student before"]
    shares = [r["knobs/sparsity"] for r in read_metrics(run) if "knobs/sparsity" in r]
    ramp = [0.5 * (1 - (1 - t / 4) ** 3) for t in (0, 0, 2, 2, 4)]
    np.testing.assert_allclose(shares, [0, *ramp], atol=2e-3)  # rounded to whole weights
    written = models.load(api.export(str(run), tmp_path / "out"), tokenizer=False)
    assert sparsify.zeros(written.params) == 0.5
    curve = losses(run)
    assert curve[6] < curve[1]


@pytest.mark.variant
def test_a_resumed_run_ends_in_the_same_bits_from_the_middle_of_its_ramp(run, tmp_path):
    assert 0 < (kernel(arrays(run, 3), "mlp/up") == 0).mean() < 0.5
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "6")
    api.resume(tmp_path / "copy")
    for name, value in arrays(run, 6).items():
        np.testing.assert_array_equal(arrays(tmp_path / "copy", 6)[name], value)
    with pytest.raises(ConfigError, match=r"changed since this run began: config\.student\.spars"):
        api.resume(run, ["student.sparsity.every=1"])


def test_wanda_reads_the_students_own_norms(load_config, tmp_path, data):
    """Masks of the first update, at a learning rate that moves nothing: those of the start."""
    config = load_config(tmp_path)
    start = models_of(config, setup.mesh_of(config)).student
    folder = models.save(start, tmp_path / "start")
    file = tmp_path / "scores.safetensors"
    text = ["--data", f"{data}/train.txt", "--format", "paragraphs", "--seq-len", "32"]
    text += ["--rows", "8", "--cache-dir", str(tmp_path / "cache")]
    assert main(["importance", str(folder), "-o", str(file), *text]) == 0
    wanda = f"by: wanda, importance: {file}, begin: 0, end: 0, scope: output"
    made = api.train(
        load_config(
            tmp_path,
            f"student={{source: {folder}, compute_dtype: float32, sparsity: {{{wanda}}}}}",
            "optimizer={lr: 1.0e-30, warmup: 0}", "train.steps=1", "train.eval_every=null",
        )
    ).run_dir  # fmt: skip
    assert main(["prune", str(folder), "-o", str(tmp_path / "p"), "--sparsity", "2:4",
                 "--scope", "output", "--importance", str(file)]) == 0  # fmt: skip
    pruned = models.load(tmp_path / "p", tokenizer=False)
    norms = sparsify.input_norms(importance.load(file), start.config)
    saved, same = arrays(made, 1), True
    for name in KERNELS:
        block, part = name.split("/")
        weights = np.asarray(start.params["layers"][block][part]["kernel"], np.float64)
        scores = np.abs(weights) * norms[f"layers/{name}/kernel"].astype(np.float64)[..., None]
        groups = scores.reshape(scores.shape[0], -1, 4, scores.shape[-1])
        kept = (groups >= np.sort(groups, axis=2)[:, :, 2:3]).reshape(scores.shape)
        np.testing.assert_array_equal(kernel(saved, name) != 0, kept)
        np.testing.assert_array_equal(
            pruned.params["layers"][block][part]["kernel"], np.where(kept, weights, 0)
        )
        order = np.abs(weights).reshape(groups.shape)
        same &= (kept == (order >= np.sort(order, axis=2)[:, :, 2:3]).reshape(kept.shape)).all()
    assert not same  # and they are not those of the weights alone
    note = api.pruning_note(tmp_path / "p")
    assert (note["sparsity"], note["by"], note["zeros"]) == ("2:4", "wanda", 0.5)


def test_a_share_of_any_weights_needs_no_scores(load_config, tmp_path, capsys):
    config = load_config(tmp_path)
    start = models_of(config, setup.mesh_of(config)).student
    folder = models.save(start, tmp_path / "start")
    assert main(["prune", str(folder), "-o", str(tmp_path / "p"), "--sparsity", "62.5%"]) == 0
    assert "62.50% of its layers' weights are 0" in capsys.readouterr().out
    made = models.load(tmp_path / "p", tokenizer=False).params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal((np.asarray(made) == 0).mean((1, 2)), 0.625)
    for words, option in (
        (["--sparsity", "2:4", "--mlp", "8"], "--sparsity: leaves sizes as they are"),
        (["--sparsity", "0%"], "--sparsity: must be 2:4, or a share above 0%"),
        (["--mlp", "8", "--scope", "global"], "--scope: has no effect without sparsity"),
        (["--sparsity", "2:4", "--by", "loss"], "--by: has no effect with sparsity"),
        (["--sparsity", "4:8"], "--sparsity"),
    ):
        assert main(["prune", str(folder), "-o", str(tmp_path / "q"), *words]) == 2
        assert option in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["student.sparsity={end: 6}"], "must be below train.steps"),
        (["student.sparsity={begin: 5, end: 2}"], "is update 5, after the end, update 2"),
        (["student.sparsity={share: 0.7}"], "is 0.5 for 2:4"),
        (["student.sparsity={by: wanda}"], "required for by: wanda"),
        (["student.sparsity={importance: x}"], "has no effect with by: weight"),
        (["student.sparsity={}", "student.lora={}"], "adapters would fill what masks make 0"),
        (["student.sparsity={targets: [up, up]}"], "name each projection once"),
        (
            ["student.sparsity={}", "student.from=null", "student.every=null",
             "student.random={layers: 1, embed: 12, mlp: 6, heads: 2, kv_heads: 2}"],
            "layers.mlp.down.kernel has 6 inputs, which 4 does not divide",
        ),
        (["student.sparsity={by: wanda, importance: nowhere}"], "no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(
    load_config, tmp_path, override, words
):
    with pytest.raises(UserError, match=words):
        api.train(load_config(tmp_path, *override))
    assert not (tmp_path / "run").exists()
