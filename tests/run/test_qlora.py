"""Runs whose adapters stand beside kernels in whole numbers: what is held, learned and exported."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import api, commands, models
from jaxdistill.compress import quantize
from jaxdistill.errors import ConfigError
from jaxdistill.models.quantized import QuantizedKernel
from jaxdistill.run import participants, setup
from tests.run.conftest import models_of
from tests.run.test_session import arrays, losses

pytestmark = pytest.mark.usefixtures("plain_runs")
OLD = jax.__version_info__ < (0, 11)
FOUR_BITS = pytest.mark.skipif(OLD, reason="JAX 0.10 gives a compiled step no arrays of 4 bits")
LORA = "student.lora={rank: 2, alpha: 8.0, targets: [query, value, down]}"
WIDE = "student={random: {embed: 64, mlp: 64, layers: 2, heads: 2}, compute_dtype: float32}"
BASE = "{scheme: int4, exceptions: [attention.key=int8, attention.out=none]}"
QLORA = (WIDE, LORA, f"student.base={BASE}")


@pytest.fixture(scope="module")
def run(load_config, tmp_path_factory):
    return api.train(load_config(tmp_path_factory.mktemp("qlora"), *QLORA)).run_dir


@FOUR_BITS
def test_the_rounded_kernels_stay_as_they_are_and_adapters_learn(run, load_config, tmp_path):
    config = load_config(tmp_path, *QLORA)
    model = models_of(config, setup.mesh_of(config)).student
    first, last = arrays(run, 3), arrays(run, 6)
    held = model.params["layers"]["attention"]["query"]["kernel"]
    assert isinstance(held, QuantizedKernel) and held.values.dtype == jnp.int4
    name = "frozen/layers/attention/query/kernel"
    np.testing.assert_array_equal(last[f"{name}/values"], held.values)
    np.testing.assert_array_equal(last[f"{name}/scale"], held.scale)
    assert last["frozen/layers/attention/key/kernel/values"].dtype == np.int8
    assert last["frozen/layers/attention/out/kernel"].dtype == np.float32
    trained = [name for name in last if name.startswith("params/student/")]
    assert trained and all(not np.array_equal(first[name], last[name]) for name in trained)
    assert losses(run)[6] < losses(run)[1]


@FOUR_BITS
def test_it_learns_as_beside_the_same_kernels_in_floating_point(run, load_config, tmp_path):
    """The student of the run, rounded and written as floats, with the same adapters."""
    config = load_config(tmp_path / "first", *QLORA)
    rounded = models_of(config, setup.mesh_of(config)).student
    models.save(quantize.dequantized(rounded), tmp_path / "rounded")
    same = load_config(
        tmp_path / "floats", f"student={{source: {tmp_path}/rounded, compute_dtype: float32}}", LORA
    )
    again = losses(api.train(same).run_dir)
    for step, loss in losses(run).items():
        assert again[step] == pytest.approx(loss, rel=1e-4), step


@FOUR_BITS
@pytest.mark.variant
def test_a_resumed_run_ends_in_the_same_bits(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "6")
    api.resume(tmp_path / "copy")
    for name, value in arrays(run, 6).items():
        np.testing.assert_array_equal(arrays(tmp_path / "copy", 6)[name], value, err_msg=name)


@FOUR_BITS
def test_adapters_are_merged_into_the_rounded_kernels(run, tmp_path):
    model = api.load(str(run))
    kept = arrays(run, 6)
    stem = "layers/mlp/down/kernel"
    values, scale = (kept[f"frozen/{stem}/{part}"] for part in ("values", "scale"))
    layers, inputs, outputs = values.shape
    whole = values.astype(np.float64).reshape(layers, -1, 64, outputs)
    whole = (whole * scale.astype(np.float64)[:, :, None]).reshape(layers, inputs, outputs)
    down, up = (kept[f"params/student/{stem}/{side}"].astype(np.float64) for side in ("down", "up"))
    found = model.params["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(found, whole + 8.0 / 2 * down @ up, atol=1e-6)
    api.export(str(run), tmp_path / "out", options=commands.Export(dtype="bfloat16"))
    assert models.load(tmp_path / "out", tokenizer=False).params["embedding"].dtype == jnp.bfloat16


@FOUR_BITS
def test_a_folder_is_rounded_as_it_is_read_and_never_held_in_floating_point(
    load_config, tmp_path, monkeypatch
):
    config = load_config(tmp_path, WIDE)
    student = models_of(config, setup.mesh_of(config)).student
    models.save(student, tmp_path / "model")
    monkeypatch.setattr(quantize, "quantized", None)  # of a whole model
    source = f"student={{source: {tmp_path}/model, base: int4, lora: {{rank: 2}}}}"
    found = models_of(load_config(tmp_path, source), setup.mesh_of(config)).student
    whole = jax.jit(lambda params: quantize._turned(params, quantize.named("int4"), None))
    jax.tree.map(np.testing.assert_array_equal, found.params, whole(student.params))
    assert found.source == str(tmp_path / "model")


@FOUR_BITS
def test_a_run_is_rounded_once_it_is_read(run, load_config, tmp_path):
    whole = api.load(str(run)).params["layers"]["mlp"]["up"]["kernel"]
    options = ("teacher.random=null", f"teacher.source={run}", "teacher.quantize=int8")
    config = load_config(tmp_path, WIDE, *options)
    model = models_of(config, setup.mesh_of(config)).teacher
    assert model.source == f"int8 of {run}@6"
    held = model.params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(held.dequantized(), whole, atol=np.abs(whole).max() / 250)


@FOUR_BITS
@pytest.mark.variant
def test_what_waits_for_the_backward_pass_is_whole_numbers(load_config, tmp_path):
    """The step's memory, beside that of the same step on kernels in floating point."""
    size = "student={random: {embed: 512, mlp: 1024, layers: 8, heads: 4}, compute_dtype: float32}"
    temporary, arguments = {}, {}
    for name, more in (("float", ()), ("int4", ("student.base=int4",))):
        config = load_config(tmp_path, size, LORA, "train.batch_size=1", *more)
        mesh = setup.mesh_of(config)
        shapes = participants.shapes_of(config, mesh)
        method = setup.method_of(config, shapes)
        state = setup.states.abstract(
            config, shapes.student.config, method.objective, method.tx, mesh
        )
        teacher = method.asked.abstract_params(mesh)
        program = setup.compile_step(config, method, state, teacher, mesh, check_kernels=False)
        memory = program.memory_analysis()
        temporary[name], arguments[name] = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    kernels = 4 * 8 * (4 * 512 * 512 + 3 * 512 * 1024)
    assert arguments["int4"] < arguments["float"] - 0.7 * kernels
    # Without the rule of its gradient: + 1.0. A CPU takes whole numbers of 4 bits apart, to bytes.
    assert temporary["int4"] < temporary["float"] + 0.3 * kernels


@pytest.mark.skipif(not OLD, reason="newer versions do")
@pytest.mark.parametrize("options", [QLORA, ("teacher.quantize=int4", WIDE)])
def test_an_old_jax_is_named_before_anything_is_read(options, load_config, tmp_path):
    config = load_config(tmp_path, *options)
    with pytest.raises(ConfigError, match="no arrays of 4 bits: use int8, or JAX 0.11"):
        participants.shapes_of(config, setup.mesh_of(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("student.base=int4",), r"student.base.*: nothing would be trained: add lora"),
        pytest.param(
            (LORA, "student.base=int4"),
            "groups of 64 inputs do not divide the 32 inputs",
            marks=FOUR_BITS,
        ),
        ((LORA, "student.base=nf4"), "student.base"),
        ((LORA, "student.base=int8", "student.quantize=int8"), "lora"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    options, message, load_config, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        config = load_config(tmp_path, *options)
        participants.shapes_of(config, setup.mesh_of(config))


def test_a_student_in_whole_numbers_has_base_or_is_refused(load_config, tmp_path):
    config = load_config(tmp_path, WIDE)
    student = models_of(config, setup.mesh_of(config)).student
    models.save(quantize.quantized(student, "int8"), tmp_path / "whole")
    source = f"source: {tmp_path}/whole"
    for options in ("", ", lora: {rank: 2}", ", lora: {rank: 2}, base: int4"):
        refused = load_config(tmp_path, f"student={{{source}{options}}}")
        with pytest.raises(ConfigError, match="kernels are whole numbers.*base: int8"):
            participants.shapes_of(refused, setup.mesh_of(refused))
    fits = load_config(tmp_path, f"student={{{source}, lora: {{rank: 2}}, base: int8}}")
    held = models_of(fits, setup.mesh_of(fits)).student.params["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(held, QuantizedKernel)


@pytest.mark.variant
def test_the_student_before_the_first_step_stays_in_whole_numbers(load_config, tmp_path):
    """A method that compares with it reads a copy of the rounded kernels, as `plan` counts it."""
    for name, first in (("train", 0), ("eval", 100)):
        texts = [f"the fox {number}" for number in range(first, first + 16)]
        rows = [{"prompt": one, "chosen": "jumps", "rejected": "sleeps"} for one in texts]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    held = f"train: [{{path: {tmp_path}/train.jsonl}}], eval: [{{path: {tmp_path}/eval.jsonl}}]"
    told = f"data={{{held}, seq_len: 64, loss_on: completion}}"
    given = (told, "teacher=null", "tokenizer={from: bytes}", "method={name: dpo}")
    config = load_config(tmp_path, WIDE, LORA, "student.base=int8", *given)
    mesh = setup.mesh_of(config)
    method = setup.method_of(config, models_of(config, mesh))
    planned = setup.method_of(config, participants.shapes_of(config, mesh)).asked
    same = lambda one, two: (one.shape, one.dtype) == (two.shape, two.dtype)
    shapes = planned.abstract_params(mesh)
    assert jax.tree.all(jax.tree.map(same, method.asked.params, shapes))
    assert isinstance(shapes["layers"]["mlp"]["up"]["kernel"], QuantizedKernel)
    found = losses(api.train(config).run_dir)
    assert found[1] == pytest.approx(np.log(2), rel=1e-5), "nothing has moved yet"
    assert found[6] < found[1]
