"""Runs whose student computes in fewer bits from a step on: each stage is the quantised model."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import api, cli, commands, config, models
from jaxdistill.compress import quantize
from jaxdistill.errors import UserError
from jaxdistill.models import Model
from jaxdistill.models.quantized import SCHEMES, QuantizedKernel
from jaxdistill.report import read_metrics
from jaxdistill.run import export, participants, setup, stages
from tests.also import also
from tests.run.conftest import models_of
from tests.run.test_session import arrays
from tests.run.test_stages import EVERY, Batches

pytest.importorskip("qwix", reason="needs qwix (pip install 'jaxdistill[quant]')")
pytestmark = pytest.mark.usefixtures("plain_runs")
WIDE = "student={random: {embed: 64, mlp: 64, layers: 2, heads: 2}, compute_dtype: float32}"
AIM = "exceptions: [attention.out=int8, mlp.gate=none]"
LATER = "then: [{at: 2, scheme: int8}, {at: 0.67, scheme: int4}]"
BITS = f"student.quantize={{scheme: none, {LATER}, {AIM}}}"


@pytest.fixture(scope="module")
def run(load_config, tmp_path_factory):
    """A run of six steps: two as they are, two in int8, two in int4; and its batches."""
    hooks = Batches()
    loaded = load_config(tmp_path_factory.mktemp("bits"), WIDE, BITS, EVERY)
    return api.train(loaded, hooks=hooks).run_dir, loaded, hooks.kept


def cross_entropy(model: Model, batch) -> float:
    """Of the targets that count, by logits in float64."""
    logits = np.asarray(model.logits(batch.tokens, batch.segment_ids), np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    said = np.take_along_axis(scores, np.asarray(batch.targets)[..., None], -1)[..., 0]
    return float(-said[np.asarray(batch.mask)].mean())


def test_each_stage_computes_as_the_quantised_model_of_that_stage(run):
    folder, loaded, batches = run
    shape = participants.shapes_of(loaded, setup.mesh_of(loaded)).student
    found = {r["step"]: r["loss/ce"] for r in read_metrics(folder) if "loss/ce" in r}
    aims = {1: None, 2: "int8", 3: "int8", 4: "int4", 5: "int4"}
    exceptions = ("attention.out=int8", "mlp.gate=none")
    for number, scheme in aims.items():  # the state after step `number` makes the next loss
        model = api.load(f"{folder}@{number}")
        model = Model(shape.config, model.params)
        batch = batches[number]
        every = {name: quantize.named(name, exceptions) for name in ("int8", "int4")}
        losses = {
            name: cross_entropy(quantize.quantized(model, q), batch) for name, q in every.items()
        }
        losses[None] = cross_entropy(model, batch)
        assert found[number + 1] == pytest.approx(losses.pop(scheme), rel=2e-6), number
        assert all(abs(found[number + 1] / other - 1) > 1e-5 for other in losses.values())


def test_it_says_so_and_each_stage_is_a_program(run):
    folder, loaded, _ = run
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    told = [(one["step"], one["quantize"]) for one in events if one["kind"] == "stage"]
    more = ", attention.out=int8, mlp.gate=none"
    assert told == [(3, f"int8{more}"), (5, f"int4{more}")]
    assert sum(one["kind"] == "compiled" for one in events) == 3
    records = [r for r in read_metrics(folder) if "knobs/bits" in r]
    assert [r["knobs/bits"] for r in records] == [32, 32, 8, 8, 4, 4]
    assert "knobs/teacher" not in records[0]


@pytest.mark.parametrize("at", [2, *also(1, 4, 5)])
def test_a_resumed_run_ends_in_the_same_bits_on_either_side(run, tmp_path, at):
    folder, _, _ = run
    shutil.copytree(folder, tmp_path / "copy")
    for number in range(at + 1, 7):
        shutil.rmtree(tmp_path / "copy" / "checkpoints" / str(number))
    api.resume(tmp_path / "copy")
    for name, value in arrays(folder, 6).items():
        np.testing.assert_array_equal(arrays(tmp_path / "copy", 6)[name], value)


def test_held_out_text_is_measured_by_the_last_scheme_and_it_is_written_so(run, tmp_path, capsys):
    folder, loaded, _ = run
    assert cli.main(["export", str(folder), "-o", str(tmp_path / "floats")]) == 0
    aim = "int4, attention.out=int8, mlp.gate=none"
    assert f"trained to be {aim}" in capsys.readouterr().out
    assert cli.main(["quantize", str(folder), "-o", str(tmp_path / "few")]) == 0
    assert f"few: {aim}, " in capsys.readouterr().out
    small = models.load(tmp_path / "few", tokenizer=False).params["layers"]
    kinds = {
        name: leaf["kernel"].scheme if isinstance(leaf["kernel"], QuantizedKernel) else None
        for part in ("attention", "mlp")
        for name, leaf in small[part].items()
    }
    others = dict.fromkeys(("query", "key", "value", "up", "down"), SCHEMES["int4"])
    assert kinds == others | {"out": SCHEMES["int8"], "gate": None}
    assert export.quantization_of(str(tmp_path / "floats"), commands.Quantize()) == quantize.named(
        "int8"
    )
    before = {row["name"]: row for row in json.loads((folder / "table.json").read_text())["rows"]}
    words = ["--data", loaded.data.eval_files[0].path, "--format", "paragraphs", "--seq-len", "32"]
    words += ["--max-rows", "8", "--json"]
    assert cli.main(["eval", str(tmp_path / "few"), *words]) == 0
    perplexity = json.loads(capsys.readouterr().out)["eval/perplexity"]
    assert before["student after"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_the_stages_of_teacher_and_bits_are_cut_together(load_config, tmp_path):
    loaded = load_config(tmp_path, WIDE, BITS, "teacher.until=3")
    given = loaded.teacher, loaded.student, loaded.method, 6
    int8, int4 = (
        quantize.named(n, ("attention.out=int8", "mlp.gate=none")) for n in ("int8", "int4")
    )
    assert stages.of(*given) == [
        (0, True, None),
        (2, True, int8),
        (3, False, int8),
        (4, False, int4),
    ]


def test_exceptions_hold_for_a_teacher(load_config, tmp_path):
    loaded = load_config(
        tmp_path, WIDE, "teacher.quantize={scheme: float8, exceptions: ['attention.*=none']}"
    )
    mesh = setup.mesh_of(loaded)
    models_ = models_of(loaded, mesh)
    layers = models_.teacher.params["layers"]
    assert layers["mlp"]["up"]["kernel"].values.dtype == jnp.float8_e4m3fn
    assert isinstance(layers["attention"]["query"]["kernel"], jax.Array)
    shapes = participants.shapes_of(loaded, mesh).teaching.abstract_params(mesh)
    same = lambda one, two: (
        (one.shape, one.dtype, one.sharding) == (two.shape, two.dtype, two.sharding)
    )
    assert jax.tree.all(jax.tree.map(same, models_.teaching.params, shapes))


THEN = "student.quantize={{scheme: int8, then: [{{at: {}, scheme: int4}}{}]}}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([THEN.format(6, "")], "then.0.at = 6: is step 6, and the run has 6"),
        ([THEN.format(0, "")], "is step 0: must be after the first step"),
        ([THEN.format(3, ", {at: 0.5, scheme: int8}")], "must be after step 3, where int4 begins"),
        ([THEN.format(3, ", {at: 4, scheme: int4}")], "int4 follows int4"),
        (["student.quantize={scheme: none}"], "none without `then` rounds nothing"),
        (["student.quantize=int3"], "must be one of int8, int4, .*or {scheme: int8, exceptions"),
        (
            ["student.quantize={scheme: int8, exceptions: [mlp.dawn=none]}"],
            "student.quantize.exceptions: 'mlp.dawn' matches no projection: a llama model has "
            "attention.query",
        ),
        (
            ["teacher.quantize={scheme: int8, exceptions: [layers.0.*=none]}"],
            "teacher.quantize.exceptions: 'layers.0.*' matches no projection.*in every layer alike",
        ),
        (
            ["student.lora={rank: 2}", "student.base={scheme: int8, exceptions: [q=none]}"],
            "student.base.exceptions: 'q' matches no projection",
        ),
        (
            ["student.lora={rank: 2}", "student.base={scheme: int8, exceptions: [mlp.*=float8]}"],
            "mlp.*=float8: a frozen kernel is held as int8, int4 or none",
        ),
        (["student.quantize={scheme: int8, exceptions: [mlp.down]}"], "must be a pattern, = and"),
        (
            ["student.quantize={scheme: int8, exceptions: [mlp.down=float8]}"],
            "no folder holds float8 beside int8",
        ),
        (
            [
                THEN.format(3, "")[:-1].replace("int4", "float8") + ", exceptions: [mlp.up=int4]}",
            ],
            "no folder holds int4 beside float8",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(load_config, tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        loaded = load_config(tmp_path, WIDE, *overrides)
        participants.shapes_of(loaded, setup.mesh_of(loaded))


def test_a_student_that_writes_or_teaches_itself_has_one_scheme(load_config, tmp_path):
    then = THEN.format(3, "")
    with pytest.raises(UserError, match="computed by one scheme: name it alone, or remove rollout"):
        config.load("configs/gkd.yaml", [then])
    with pytest.raises(UserError, match="teaches itself by one scheme"):
        config.load("configs/sdft.yaml", [then])
