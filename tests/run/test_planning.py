"""`plan` against the step that the trainer compiles, against closed forms, and its errors."""

import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from jaxdistill import api, config, models
from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.plan import describe, faster, hlo, search, targets
from jaxdistill.run import participants, setup, states
from jaxdistill.train.step import recorded
from tests.also import also
from tests.models import variants
from tests.run.conftest import models_of

TEACHER = {"layers": 3, "embed": 64, "mlp": 96, "heads": 8, "kv_heads": 4, "head_dim": 8}
STUDENT = {"layers": 2, "embed": 32, "mlp": 64, "heads": 4, "kv_heads": 4, "head_dim": 8}
VOCAB, ROWS, LENGTH = 2048, 8, 32


def written(shape):
    return str(shape | {"vocab_size": VOCAB}).replace("'", "")


def text(**changed):
    fields = {
        "teacher": f"{{random: {written(TEACHER)}, dtype: float32}}",
        "student": f"{{random: {written(STUDENT)}, compute_dtype: float32}}",
        "mesh": "{fsdp: -1}",
    } | changed
    return f"""
teacher: {fields["teacher"]}
student: {fields["student"]}
tokenizer: {{from: bytes, rows: {VOCAB}}}
data:
  train: [{{path: "python:docs?split=train"}}]
  eval: [{{path: "python:docs?split=held_out"}}]
  seq_len: {LENGTH}
method: {{name: kd, alpha: 0.5, temperature: 2.0}}
train: {{steps: 10, batch_size: {ROWS}}}
mesh: {fields["mesh"]}
"""


def compiled(loaded, mesh):
    """The step as `train` compiles it, and its arguments."""
    models = participants.shapes_of(loaded, mesh)
    method = setup.method_of(loaded, models)
    state = states.abstract(loaded, models.student.config, method.objective, method.tx, mesh)
    teacher = method.asked.abstract_params(mesh)
    monitor = recorded(loaded.train.log_every, loaded.train.steps)
    return setup.compile_step(loaded, method, state, teacher, mesh, monitor)


def held(loaded, mesh):
    """The step as `train` compiles it for the arrays that it has made, and these."""
    models = models_of(loaded, mesh)
    method = setup.method_of(loaded, models)
    state = states.create(loaded, models.student, method.objective, method.tx, mesh)
    teacher = method.asked.params
    monitor = recorded(loaded.train.log_every, loaded.train.steps)
    return setup.compile_step(loaded, method, state, teacher, mesh, monitor), state, teacher


def mesh_of(loaded, count=8):
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices, XLA shows {jax.device_count()}")
    return setup.mesh_of(loaded, jax.devices()[:count])


@pytest.fixture(scope="module")
def planned():
    return api.plan(config.loads(text()), "cpu:8")


def assert_memory(found, stats):
    """What is planned is what the compiler says of the step that a run compiles."""
    real = (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )
    assert found["total"] == pytest.approx(real, rel=0.1)
    assert sum(found["arguments"].values()) == stats.argument_size_in_bytes
    assert sum(found["at_peak"].values()) == pytest.approx(stats.temp_size_in_bytes, rel=0.1)


@pytest.mark.variant
def test_planned_memory_is_that_of_the_compiled_step(planned):
    loaded = config.loads(text())
    assert_memory(planned["memory"], compiled(loaded, mesh_of(loaded)).memory_analysis())


def test_planned_arguments_are_the_arrays_of_a_run(planned):
    loaded = config.loads(text())
    _, state, teacher = setup.build(loaded, mesh_of(loaded))
    arguments = planned["memory"]["arguments"]
    assert arguments["parameters"] == on_first(state.params)
    assert arguments["optimizer"] == on_first(state.opt_state)
    assert arguments["teacher"] == on_first(teacher)
    assert planned["parameters"]["trainable"] == sum(
        leaf.size for leaf in jax.tree.leaves(state.params)
    )


SMALLER = TEACHER | {"mlp": 128}  # int4 has groups of 64 inputs


def on_first(tree):
    """Bytes of a tree's arrays that the first device holds; programs pack two int4 into one."""
    return sum(
        shard.data.size // 2 if leaf.dtype == "int4" else shard.data.on_device_size_in_bytes()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )


@pytest.mark.parametrize("scheme", ["int4", *also("int8_dynamic")])
def test_a_teacher_in_whole_numbers_is_planned_as_a_run_holds_it(scheme):
    pytest.importorskip("qwix", reason="needs qwix")
    teacher = f"{{random: {written(SMALLER)}, dtype: float32, quantize: {scheme}}}"
    loaded = config.loads(text(teacher=teacher, mesh="{data: 2, fsdp: 2, tensor: 2}"))
    step, _, params = held(loaded, mesh_of(loaded))
    found = api.plan(loaded, "cpu:8")["memory"]
    assert_memory(found, step.memory_analysis())
    assert found["arguments"]["teacher"] == on_first(params)
    floats = 4 * weights(SMALLER, copies=1) / 4  # fsdp and tensor
    assert found["arguments"]["teacher"] < 0.75 * floats


@pytest.mark.variant
def test_a_folder_in_whole_numbers_is_planned_as_a_run_holds_it(tmp_path):
    pytest.importorskip("qwix", reason="needs qwix")
    from jaxdistill.compress import quantize

    shape = models.DecoderConfig("llama", vocab_size=VOCAB, **SMALLER)
    rounded = quantize.quantized(models.random(shape, dtype="float32"), "int4")
    folder = models.save(rounded, tmp_path / "int4")
    loaded = config.loads(text(teacher=f"{{source: {folder}, dtype: float32}}"))
    step, _, params = held(loaded, mesh_of(loaded))
    found = api.plan(loaded, "cpu:8")["memory"]
    assert_memory(found, step.memory_analysis())
    assert found["arguments"]["teacher"] == on_first(params)
    loaded = config.loads(text(teacher=f"{{source: {folder}, quantize: int8}}"))
    with pytest.raises(ConfigError, match="is quantised already: leave it out"):
        api.plan(loaded, "cpu:8")
    with pytest.raises(ConfigError, match="is quantised already: leave it out"):
        participants.shapes_of(loaded, mesh_of(loaded))  # before any weights are read


@pytest.mark.variant
def test_weights_beside_adapters_are_planned_as_a_run_holds_them():
    student = f"{{random: {written(STUDENT)}, lora: {{rank: 2}}, compute_dtype: float32}}"
    loaded = config.loads(text(student=student))
    step, state, _ = held(loaded, mesh_of(loaded))
    found = api.plan(loaded, "cpu:8")
    assert_memory(found["memory"], step.memory_analysis())
    arguments = found["memory"]["arguments"]
    assert arguments["frozen weights"] == on_first(state.frozen)
    assert arguments["parameters"] == on_first(state.params)
    both = weights(TEACHER, copies=1) + weights(STUDENT, copies=1)
    assert found["parameters"]["total"] == both + found["parameters"]["trainable"]


def kernels(shape):
    query, keys = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    attention = 2 * shape["embed"] * (query + keys)
    return shape["layers"] * (attention + 3 * shape["embed"] * shape["mlp"])


def forward_flops(shape):
    """2ND: two for each weight of a product and token, and both products of whole attention."""
    mixed = 2 * LENGTH * shape["layers"] * shape["heads"] * shape["head_dim"]
    return 2 * (kernels(shape) + VOCAB * shape["embed"] + mixed)


def test_flops_are_the_closed_form(planned):
    tokens = ROWS * LENGTH
    expected = tokens * (forward_flops(TEACHER) + 3 * forward_flops(STUDENT))
    loaded = config.loads(text())
    whole = compiled(loaded, mesh_of(loaded, 1)).as_text()
    assert hlo.product_flops(whole) == expected
    assert planned["flops"] == expected / 8
    # The formula counts what attention can see; the program makes all of [length, length].
    hidden = 2 * (LENGTH - 1) / 2 * tokens
    unseen = lambda shape: 2 * shape["layers"] * shape["heads"] * shape["head_dim"] * hidden
    assert 8 * planned["model_flops"] == expected - unseen(TEACHER) - 3 * unseen(STUDENT)
    assert planned["unknown_loops"] == []


EXPERTS, CHOSEN = 8, 2


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A teacher of TEACHER's shape, with eight experts in each layer."""
    folder = tmp_path_factory.mktemp("routed")
    shape = {
        "hidden_size": TEACHER["embed"], "num_hidden_layers": TEACHER["layers"],
        "num_attention_heads": TEACHER["heads"], "num_key_value_heads": TEACHER["kv_heads"],
        "head_dim": TEACHER["head_dim"], "moe_intermediate_size": TEACHER["mlp"],
        "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "vocab_size": VOCAB,
    }  # fmt: skip
    case = variants.CASES["qwen3_moe"] | shape
    (folder / "config.json").write_text(json.dumps(case))
    return f"{{random: {{like: {folder}}}, dtype: float32}}"


def routed_flops(rows):
    """As `forward_flops`, with a router, and so many passes through an expert for each token."""
    mlps = 3 * TEACHER["embed"] * TEACHER["mlp"]
    each = (rows - 1) * mlps + TEACHER["embed"] * EXPERTS
    return forward_flops(TEACHER) + 2 * TEACHER["layers"] * each


def test_a_cpu_multiplies_the_rows_of_all_choices_with_all_experts(routed):
    loaded = config.loads(text(teacher=routed))
    found = hlo.product_flops(compiled(loaded, mesh_of(loaded, 1)).as_text())
    added = 2 * TEACHER["layers"] * CHOSEN * TEACHER["embed"]  # the choices' sum, by their shares
    whole = routed_flops(CHOSEN * EXPERTS) + added + 3 * forward_flops(STUDENT)
    assert found == ROWS * LENGTH * whole


def weights(shape, copies=2):
    """Numbers of a model; 2 copies: embedding and head."""
    norms = shape["embed"] * (2 * shape["layers"] + 1)
    return kernels(shape) + copies * VOCAB * shape["embed"] + norms


MESHES = ("{data: 2, fsdp: 2, tensor: 2}", *also("{fsdp: 8}", "{data: 2, fsdp: 1, tensor: 4}"))


@pytest.mark.parametrize("mesh", MESHES)
def test_no_logits_no_head_and_no_weight_twice_crosses_the_mesh(mesh):
    loaded = config.loads(text(mesh=mesh, teacher=text_of_untied()))
    devices = mesh_of(loaded)
    program = compiled(loaded, devices).as_text()
    found = [one for one in hlo.collectives(program) if one.axes(devices.shape)]
    gathers = [one for one in found if one.kind == "all-gather"]
    assert found
    parts, of_teacher = devices.shape["fsdp"] * devices.shape["tensor"], 0.0
    for one in found:
        for array in hlo.elements(one.shape):
            sizes = set(hlo.dims(array))
            # No logits, head or embedding: at most a device's own piece of a table moves.
            if sizes & {VOCAB, VOCAB // devices.shape["tensor"]}:
                assert hlo.nbytes(array) <= 4 * VOCAB * TEACHER["embed"] / parts, one
        if one in gathers and "teacher" in one.written_by and not {ROWS, LENGTH} <= sizes:
            of_teacher += one.nbytes * one.times
    tables = 4 * 2 * VOCAB * TEACHER["embed"]  # embedding and head stay where they are
    assert of_teacher <= 4 * weights(TEACHER) - tables


def text_of_untied():
    shape = str(TEACHER | {"vocab_size": VOCAB, "tied_head": "false"}).replace("'", "")
    return f"{{random: {shape}, dtype: float32}}"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("gpu:h200:8", 8),
        ("gpu:h100:8x8", 64),
        ("gpu:gb200:2x72", 144),
        ("tpu:v5p:8x8x4x2", 512),
        ("tpu:v7x:2x2x1", 8),  # a chip shows two devices
    ],
)
def test_hosts_and_slices_are_part_of_a_target(text, size):
    target = targets.parse(text)
    assert (str(target), target.size) == (text, size) and target.chip is not None


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cpu", "must look like gpu:h100:8, tpu:v5e:4x4"),
        ("gpu:h9:8", "GPUs are a100, h100, h200, b200, gb200"),
        ("tpu:v9:2x2", "TPUs are v4, v5e, v5p, v6e, v7x"),
    ],
)
def test_an_unknown_target_is_told_with_those_that_are_known(target, words):
    with pytest.raises(ConfigError, match=words):
        api.plan(config.loads(text()), target)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tpu:v5e:2x2", "pip install libtpu"),
        ("gpu:h100:8", f"jax-cuda13-plugin=={jax.__version__} .* nvidia-nvvm"),
    ],
)
def test_a_missing_compiler_is_told_with_the_command_that_installs_it(target, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=words):
        api.plan(config.loads(text()), target)


def test_a_mesh_that_is_not_the_targets():
    with pytest.raises(ConfigError, match="does not divide the 4 devices"):
        api.plan(config.loads(text(mesh="{fsdp: 8}")), "cpu:4")


def test_a_model_that_is_not_on_first():
    loaded = config.loads(text(teacher="{source: hf:nobody/nothing}"))
    with pytest.raises(ModelError, match="nobody/nothing: no folder of that name here, and"):
        api.plan(loaded, "cpu:1")


# ------------------------------------------------------------------------------- what makes it fit


def simple_model(loaded, target):
    """Memory and time of a machine whose rules are known, in place of a compiler."""
    remat, parts = loaded.student.remat, loaded.train.micro_batches
    activations = {"none": 80.0, "dots": 40.0, "full": 10.0}[remat] / parts
    state = 20.0 if loaded.student.param_dtype == "float32" else 12.0
    seconds = {"none": 1.0, "dots": 1.1, "full": 1.3}[remat] + 0.3 * math.log2(parts)
    total = activations + state
    tokens = loaded.train.batch_size * loaded.data.seq_len
    return {
        "memory": {"total": total},
        "fits": total <= simple_model.room,
        "floor_seconds": seconds,
        "seconds": {"compute": seconds},
        "tokens_per_step": tokens,
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "context": 1},
    }


def test_the_cheapest_changes_are_found_by_trying(monkeypatch):
    monkeypatch.setattr(search, "_measured", simple_model)
    monkeypatch.setattr(simple_model, "room", 61.0, raising=False)
    found = api.plan(config.loads(text()), "cpu:1")
    changes = found["changes"]
    assert [change["overrides"] for change in changes] == [
        ["student.remat=dots"],  # 1.1 s
        ["student.remat=full"],  # 1.3 s, as two micro-batches; four take 1.6 s
        ["train.micro_batches=2"],
    ]
    assert found["tried"] <= 8


def test_changes_are_combined_where_one_is_not_enough(monkeypatch):
    monkeypatch.setattr(search, "_measured", simple_model)
    monkeypatch.setattr(simple_model, "room", 22.0, raising=False)
    found = api.plan(config.loads(text()), "cpu:1", tries=6)
    (change,) = found["changes"]
    assert {"student.remat=full", "train.micro_batches=8"} <= set(change["overrides"])
    monkeypatch.setattr(simple_model, "room", 1.0)
    assert api.plan(config.loads(text()), "cpu:1", tries=6)["changes"] == []


# ------------------------------------------------------------------------------- what is faster


def machine(loaded, target):
    """A step that fits: weights are gathered once a micro-batch, activations are made twice."""
    machine.compiled += 1
    remat, parts, mesh = loaded.student.remat, loaded.train.micro_batches, loaded.mesh
    fsdp = 8 // (mesh.data or 1) // mesh.tensor
    whose = loaded.train.gather_once
    crossings = {"none": parts, "teacher": (parts + 1) / 2, "both": 1}[whose]
    seconds = {
        "compute": {"none": 0.9, "dots": 1.0, "full": 1.2}[remat],
        "links": 0.5 * crossings * (fsdp - 1) / 7 + 0.2 * (mesh.tensor > 1),
    }
    total = {"none": 60.0, "dots": 30.0, "full": 10.0}[remat] / parts + 40 / fsdp
    total += {"none": 0.0, "teacher": 1.0, "both": 4.0}[whose]
    return {
        "memory": {"total": total},
        "fits": total <= machine.room,
        "floor_seconds": max(seconds.values()),
        "seconds": seconds,
        "tokens_per_step": 1,
        "mesh": {"data": 1, "fsdp": 8, "tensor": 1, "context": 1},
    }


@pytest.fixture
def slow(monkeypatch):
    """A configuration that fits in 41, gathers four times and makes activations twice: 2 s."""
    monkeypatch.setattr(search, "_measured", machine)
    monkeypatch.setattr(machine, "room", 41.0, raising=False)
    monkeypatch.setattr(machine, "compiled", 0, raising=False)
    return config.loads(text(), "slow", ("train.micro_batches=4", "student.remat=full"))


def test_faster_settings_are_found_one_kind_after_the_other(slow):
    found = api.plan(slow, "cpu:1", tries=20)
    best = found["faster"][0]
    # Gathered once, links take 0.5 s; then products are longest: activations of "none" do not fit,
    # those of "dots" do. The room that is left is for a second copy of the weights, no fourth.
    assert best["overrides"] == [
        "mesh.data=2", "mesh.fsdp=4", "mesh.tensor=1",
        "train.micro_batches=1", "student.remat=dots",
    ]  # fmt: skip
    assert best["seconds"] == {"compute": 1.0, "links": pytest.approx(0.5 * 3 / 7)}
    assert found["tried"] == machine.compiled - 1 == 6
    assert found["floor_seconds"] == 2.0  # of what was asked, which stays the plan


@pytest.mark.parametrize(("room", "whose"), [(12.0, "teacher"), (14.5, "both")])
def test_weights_cross_once_a_step_where_memory_allows(slow, monkeypatch, room, whose):
    """One micro-batch takes 15; two take 10, with the weights of the one or of both 11 or 14."""
    monkeypatch.setattr(machine, "room", room)
    best = api.plan(slow, "cpu:1", tries=20)["faster"][0]
    assert best["overrides"] == ["train.micro_batches=2", f"train.gather_once={whose}"]
    assert best["seconds"]["links"] == {"teacher": 0.75, "both": 0.5}[whose]


def test_what_is_no_step_ends_no_search(slow, monkeypatch):
    """Where nobody is asked, `teacher` is refused and `both` is not."""
    monkeypatch.setattr(machine, "room", 14.5)
    alone = config.loads(config.dump(slow), "alone", ("method={name: sft}", "teacher=null"))
    found = api.plan(alone, "cpu:1", tries=20)
    assert "train.gather_once=both" in found["faster"][0]["overrides"]


@pytest.mark.parametrize(
    ("override", "fsdp", "tried"),
    [
        ("train.micro_batches=4", 8, ["teacher", "both"]),
        ("train.gather_once=teacher", 8, ["both"]),
        ("train.gather_once=both", 8, []),
        ("train.micro_batches=1", 8, []),
        ("train.micro_batches=4", 1, []),
    ],
)
def test_weights_that_lie_whole_or_cross_once_are_left(slow, override, fsdp, tried):
    loaded = config.loads(config.dump(slow), "changed", (override,))
    kinds = faster.kinds(loaded, {"data": 1, "fsdp": fsdp, "tensor": 1, "context": 1})
    found = next(kind.overrides for kind in kinds if kind.about == "weights")
    assert found == [(f"train.gather_once={whose}",) for whose in tried]


def test_a_search_ends_with_its_tries_and_its_minutes(slow):
    assert api.plan(slow, "cpu:1", tries=1)["tried"] == machine.compiled - 1 == 1
    assert "tried" not in api.plan(slow, "cpu:1", tries=0)
    found = api.plan(slow, "cpu:1", minutes=-1.0)
    assert (found["tried"], found["faster"]) == (0, [])


@pytest.mark.variant
def test_the_program_that_writes_is_compiled_and_counted():
    """The copy of the weights and the cache of keys are inside, at their closed forms or above."""
    written = text(mesh="{fsdp: 1}").replace("method:", "  prompts: [{path: p.jsonl}]\nmethod:")
    written = written.replace(
        "name: kd, alpha: 0.5, temperature: 2.0", "name: reverse_kd, alpha: 0"
    )
    written = written.replace(f", batch_size: {ROWS}", "")
    written += f"rollout: {{prompts_per_step: {ROWS}, max_new_tokens: 16}}\n"
    found = api.plan(config.loads(written), "cpu:1")
    writing, memory = found["rollout"], found["memory"]
    numbers = 2 * STUDENT["layers"] * STUDENT["kv_heads"] * STUDENT["head_dim"]
    assert writing["cache"] == 4 * numbers * ROWS * LENGTH
    least = writing["cache"] + writing["weights"]
    assert least <= writing["temporaries"] < 3 * least + 2**20
    assert writing["total"] == sum(memory["arguments"].values()) + writing["temporaries"]
    told = describe(found)
    assert "while the student writes 8 answers" in told and "keys and values" in told


def test_a_plan_can_be_read(planned):
    shown = describe(planned)
    for words in ("cpu:8: 8 devices, fsdp 8", "optimizer", "temporaries", "all-gather over fsdp"):
        assert words in shown


# ------------------------------------------------------------------------- described accelerators


@pytest.mark.parametrize("target", ["tpu:v5e:2x4", "gpu:h100:8"])
def test_a_described_target_is_planned(target, routed):
    """Each of two devices along `tensor` has half of the experts, and all tokens of the other.

    A TPU passes by the rows of others' experts; a GPU multiplies all choices with all experts.
    """
    lacking = targets.missing(targets.parse(target))
    if lacking:
        pytest.skip(f"compiling for {target}: {lacking}")
    loaded = config.loads(text(teacher=routed, mesh="{fsdp: 4, tensor: 2}"))
    found = api.plan(loaded, target, tries=0)
    passes = CHOSEN * (EXPERTS if found["target"].startswith("gpu") else 1)
    tokens, student = ROWS * LENGTH, 3 * forward_flops(STUDENT)
    assert found["flops"] == pytest.approx(tokens * (routed_flops(passes) + student) / 8, rel=0.02)
    # What a token needs: the experts that it chose, and of the scores those that it sees.
    hidden = LENGTH - 1
    unseen = lambda shape: 2 * hidden * shape["layers"] * shape["heads"] * shape["head_dim"]
    needed = routed_flops(CHOSEN) - unseen(TEACHER) + student - 3 * unseen(STUDENT)
    assert 8 * found["model_flops"] == tokens * needed
    assert found["unknown_loops"] == []
    assert found["fits"] and 0 < found["mfu"] <= 1
    assert found["floor_seconds"] == max(found["seconds"].values())
    assert np.isclose(found["tokens_per_second"], ROWS * LENGTH / found["floor_seconds"])


def test_a_teacher_on_the_host_of_a_tpu_is_planned_and_a_described_gpu_is_refused():
    """Its layers are no memory of the device, and come once in each micro-batch."""
    target = "tpu:v5e:2x2"
    lacking = targets.missing(targets.parse(target))
    if lacking:
        pytest.skip(f"needs {lacking}")
    large = TEACHER | {"layers": 8, "embed": 512, "mlp": 2048, "head_dim": 64}
    tall = f"{{random: {written(large)}, dtype: bfloat16}}"
    loaded = config.loads(text(teacher=tall))
    away = config.loads(text(teacher=tall), "away", ["teacher.offload=true"])
    here, there = api.plan(loaded, target, tries=0), api.plan(away, target, tries=0)
    moved = there["memory"]["host"]["teacher"]
    arguments = [one["memory"]["arguments"]["teacher"] for one in (here, there)]
    assert arguments[0] - arguments[1] == moved == there["host_bytes"]
    saved = here["memory"]["total"] - there["memory"]["total"]
    assert saved > 0.7 * moved, "a layer or two are on the device at a time"
    if targets.missing(targets.parse("gpu:h100:1")) is None:
        with pytest.raises(ConfigError, match="nothing that JAX lists, as described GPUs do"):
            api.plan(away, "gpu:h100:4")
