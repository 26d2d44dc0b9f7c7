"""Importance, pruning and a run that starts from a pruned teacher, as commands."""

import json

import jax
import numpy as np
import pytest

from jaxdistill import api, cli, commands, models
from jaxdistill.compress import importance
from jaxdistill.config import preflight
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.evaluate import speed
from jaxdistill.models.architecture import Experts
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.run import setup
from tests.run.conftest import models_of

pytestmark = pytest.mark.usefixtures("plain_runs")
CALIBRATION = ["--rows", "8", "--seq-len", "32", "--batch-size", "8"]


@pytest.fixture(scope="module")
def scores(finished, data, tmp_path_factory):
    """The file that `jaxdistill importance` writes for the student of a run."""
    file = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    text = str(data / "train.txt")
    words = ["importance", str(finished.run_dir), "--data", text, *CALIBRATION, "-o", str(file)]
    assert cli.main([*words, "--without", "1"]) == 0
    return file


def test_one_file_serves_any_size(finished, scores, tmp_path, capsys):
    for name, words in {
        "width": ["--mlp", "24", "--embed", "20"],
        "depth": ["--layers", "1", "--by", "loss"],
        "budget": ["--parameters", "80%", "--axes", "layers", "mlp"],
    }.items():
        out = tmp_path / name
        code = cli.main(
            ["prune", str(finished.run_dir), "-o", str(out), "--importance", str(scores), *words]
        )
        printed = capsys.readouterr()
        assert (code, "parameters" in printed.out) == (0, True) or name == "budget", printed.err
    width = models.load(tmp_path / "width")
    assert (width.config.mlp, width.config.embed, width.config.head_dim) == (24, 20, 8)
    assert width.tokenizer is not None
    note = api.pruning_note(tmp_path / "depth")
    kept = importance.load(scores).kept_layers(1, "loss")
    assert note["layers"] == kept and models.load(tmp_path / "depth").config.layers == 1


def test_a_budget_that_is_met_says_so(finished, scores, tmp_path, capsys):
    words = ["--parameters", "80%", "--axes", "layers", "--importance", str(scores), "--json"]
    assert cli.main(["prune", str(finished.run_dir), "-o", str(tmp_path / "s"), *words]) == 0
    note = json.loads(capsys.readouterr().out)
    assert note["parameters"][1] <= 0.8 * note["parameters"][0]


def test_a_latency_is_measured_here(finished, scores, tmp_path, capsys, monkeypatch):
    took = lambda model: model.config.mlp * 1e-6  # 48 us for the model
    monkeypatch.setattr(speed, "fastest_token", took)
    words = ["prune", str(finished.run_dir), "--importance", str(scores), "--axes", "mlp"]
    assert cli.main([*words, "-o", str(tmp_path / "s"), "--latency", "47us"]) == 2
    assert "the smallest such model takes 0.048 ms here" in capsys.readouterr().err
    assert cli.main([*words, "-o", str(tmp_path / "s"), "--latency", "1ms", "--json"]) == 0
    note = json.loads(capsys.readouterr().out)
    assert note["decode_us"] == pytest.approx({"before": 48, "budget": 1000, "after": 48})
    assert note["parameters"][0] == note["parameters"][1]  # fast enough: everything stays
    monkeypatch.setattr(speed, "fastest_token", lambda model: None)
    assert cli.main([*words, "-o", str(tmp_path / "t"), "--latency", "1ms"]) == 2
    assert "a token cannot be timed here" in capsys.readouterr().err


def test_scores_are_measured_on_the_way(finished, data, tmp_path):
    text = str(data / "train.txt")
    words = ["prune", str(finished.run_dir), "-o", str(tmp_path / "s"), "--layers", "1"]
    assert cli.main([*words, "--by", "range_loss", "--data", text, *CALIBRATION]) == 0
    found = importance.load(tmp_path / "s.importance.safetensors")
    assert set(found.range_loss) == {1} and found.facts["rows"] == 8


def test_bad_input_is_told_before_anything_is_measured(finished, data, tmp_path, capsys):
    run, text = str(finished.run_dir), str(data / "train.txt")
    for words, code, message in (
        ([], 2, "given: nothing"),
        (["--mlp", "4000"], 2, "the model has 48"),
        (["--mlp", "8", "--parameters", "50%"], 2, "given: mlp, parameters"),
        (["--mlp", "8", "--latency", "50%"], 2, "given: mlp, latency"),
        (["--mlp", "8"], 2, "give an importance file, or text"),
        (["--mlp", "8", "--data", text, "--rows", "100000", "--seq-len", "32"], 3, "100000 are"),
        (["--mlp", "8", "--importance", text], 2, "is damaged or no importance file"),
    ):
        assert cli.main(["prune", run, "-o", str(tmp_path / "s"), *words]) == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="at least 1 item"):
        commands.Importance(data=[])
    with pytest.raises(DataError, match="100000 are wanted"):
        api.importance(run, commands.Importance(data=[text], rows=100000, seq_len=32))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder of a random teacher, and its scores, whatever they are."""
    folder = tmp_path_factory.mktemp("teacher")
    shape = models.DecoderConfig(
        "llama", vocab_size=259, embed=32, mlp=128, layers=3, heads=4, kv_heads=2, head_dim=8
    )
    models.save(models.random(shape, tokenizer=byte_tokenizer()), folder / "model")
    rng = np.random.default_rng(0)
    draw = lambda *size: rng.uniform(0.5, 1.5, size)
    made = importance.ImportanceScores(
        neurons=draw(3, 128),
        heads=draw(3, 4),
        channels=draw(32),
        shares={"layers.mlp_norm": draw(3, 32), "final_norm": draw(32)},
        cosines=np.eye(4),
        facts={"shape": importance.shape_of(shape)},
    )
    importance.save(made, folder / "scores")
    return folder


def pruned_config(load_config, teacher, folder, *overrides):
    return load_config(
        folder,
        f"teacher={{source: {teacher}/model, dtype: float32}}",
        f"student={{from: teacher, prune: {{importance: {teacher}/scores, mlp: 64, layers: 2}}, "
        "compute_dtype: float32}",
        "method={name: kd, alpha: 0.0}",
        "train.steps=2",
        "optimizer.warmup=1",
        "train.eval_every=null",
        "checkpoint.every.steps=2",
        *overrides,
    )


def test_a_run_trains_a_pruned_teacher_and_resumes(load_config, teacher, tmp_path):
    loaded = pruned_config(load_config, teacher, tmp_path)
    assert preflight.check(loaded) == []
    result = api.train(loaded)
    student = api.load(str(result.run_dir))
    assert (student.config.layers, student.config.mlp) == (2, 64)
    rows = {row["name"]: row for row in result.rows}
    assert rows["student before"]["parameters"] == models.count_parameters(student.config)
    api.resume(result.run_dir)
    scores = importance.load(teacher / "scores")
    changed = scores.__class__(**{**vars(scores), "channels": scores.channels[::-1].copy()})
    kept = (teacher / "scores").read_bytes()
    importance.save(changed, teacher / "scores")
    with pytest.raises(ConfigError, match="student.prune.importance"):
        api.resume(result.run_dir)
    (teacher / "scores").write_bytes(kept)


def test_before_the_first_step_it_is_the_pruned_model(load_config, teacher, tmp_path):
    loaded = pruned_config(load_config, teacher, tmp_path)
    student = models_of(loaded, setup.mesh_of(loaded)).student
    options = commands.Prune(mlp=64, layers=2, importance=str(teacher / "scores"))
    api.prune(str(teacher / "model"), tmp_path / "s", options)
    want = models.load(tmp_path / "s", dtype="float32").params
    for ours, theirs in zip(jax.tree.leaves(student.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder of a random model with experts."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    shape = models.DecoderConfig(
        "qwen3_moe", 259, 32, 16, layers=2, heads=4, kv_heads=2, head_dim=8, qk_norm=True,
        experts=Experts(6, 2),
    )  # fmt: skip
    models.save(models.random(shape, tokenizer=byte_tokenizer()), folder)
    return folder


WORKFLOW = """
name: experts
dir: {folder}
steps:
  - {{name: scores, kind: importance, model: {model}, data: [{text}], rows: 8, seq_len: 32}}
  - {{name: cut, kind: prune, model: {model}, importance: "${{scores}}", experts: 4, mlp: 8}}
  - {{name: budget, kind: prune, model: {model}, importance: "${{scores}}", parameters: 90%,
     axes: [experts]}}
"""


def test_experts_are_pruned_by_a_workflow_a_command_and_a_run(
    mixture, data, load_config, tmp_path, capsys
):
    file, out = tmp_path / "flow.yaml", tmp_path / "flow"
    file.write_text(WORKFLOW.format(folder=out, model=mixture, text=data / "train.txt"))
    api.run_workflow(file)
    scores = out / "scores" / importance.FILE
    found = importance.load(scores)
    assert found.experts.shape == (2, 6) and found.neurons.shape == (2, 6, 16)
    small = models.load(out / "cut")
    assert (small.config.experts, small.config.mlp) == (Experts(4, 2), 8)
    note = api.pruning_note(out / "cut")
    assert note["experts"] == [importance.best(each, 4) for each in found.experts]
    before, after = api.pruning_note(out / "budget")["parameters"]
    assert after <= 0.9 * before and models.load(out / "budget").config.experts.count < 6
    words = ["prune", str(mixture), "-o", str(tmp_path / "s"), "--importance", str(scores)]
    assert cli.main([*words, "--experts", "1"]) == 2
    assert "prune.experts = 1: the model has 6, a token passes 2 of them" in capsys.readouterr().err
    assert cli.main([*words, "--experts", "4", "--mlp", "8"]) == 0
    again = models.load(tmp_path / "s")
    loaded = load_config(
        tmp_path,
        f"teacher={{source: {mixture}, dtype: float32}}",
        f"student={{from: teacher, prune: {{importance: {scores}, experts: 4, mlp: 8}}}}",
    )
    assert preflight.check(loaded) == []
    student = models_of(loaded, setup.mesh_of(loaded)).student
    for other in (again.params, student.params):
        jax.tree.map(np.testing.assert_array_equal, other, small.params)


def test_experts_of_a_model_without_any_are_told(load_config, teacher, tmp_path):
    loaded = pruned_config(
        load_config,
        teacher,
        tmp_path,
        f"student={{from: teacher, prune: {{importance: {teacher}/scores, experts: 4}}}}",
    )
    with pytest.raises(ConfigError, match="prune.experts: llama models have no routed experts"):
        models_of(loaded, setup.mesh_of(loaded))


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ("{from: teacher, prune: {importance: x}}", "give sizes"),
        ("{from: teacher, prune: {importance: x, mlp: 8, parameters: 50%}}", "give sizes"),
        ("{from: teacher, layers: [0], prune: {importance: x, mlp: 8}}", "give layers, every or"),
        ("{source: a, prune: {importance: x, mlp: 8}}", "no effect without `from: teacher`"),
        ("{from: teacher, prune: {importance: x, mlp: 8, axes: [mlp]}}", "without a budget"),
        ("{from: teacher, prune: {importance: x, memory: 4GB}}", "write 4GiB, 300MiB or 50%"),
        ("{from: teacher, prune: {mlp: 8}}", "student.prune.importance: required"),
    ],
)
def test_configurations_that_cannot_be_meant(load_config, tmp_path, student, words):
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path, f"student={student}")


def test_a_missing_file_is_told_by_validate(load_config, tmp_path):
    student = f"{{from: teacher, prune: {{importance: {tmp_path}/none, mlp: 8}}}}"
    found = preflight.check(load_config(tmp_path, f"student={student}"))
    assert any("no such file" in str(error) for error in found)


@pytest.mark.variant
def test_distillation_that_knows_of_int8_and_the_folder_it_ends_as(
    load_config, teacher, tmp_path, capsys
):
    pytest.importorskip("qwix", reason="needs qwix (pip install 'jaxdistill[quant]')")
    loaded = pruned_config(load_config, teacher, tmp_path, "student.quantize=int8")
    result = api.train(loaded)
    plain = pruned_config(load_config, teacher, tmp_path / "plain")
    other = api.train(plain)
    rows = {row["name"]: row for row in result.rows}
    theirs = {row["name"]: row for row in other.table}
    before = [table["student before"]["kl_t1"] for table in (rows, theirs)]
    assert before[0] != before[1]  # measured as it will be, not as it is held
    out = tmp_path / "int8"
    assert cli.main(["quantize", str(result.run_dir), "-o", str(out), "--scheme", "int8"]) == 0
    assert "int8" in capsys.readouterr().out
    small = models.load(out)
    assert small.params["layers"]["mlp"]["up"]["kernel"].values.dtype == np.int8
    words = ["--data", loaded.data.eval[0].path, "--seq-len", "32", "--max-rows", "8", "--json"]
    assert cli.main(["eval", str(out), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["eval/perplexity"] > 1 and found["bytes"] < 4 * found["parameters"]
