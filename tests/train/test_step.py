"""The step: one number for any mesh and split, AdamW in float64, the guard, memory, the teacher."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import losses, models, optim, teachers
from jaxdistill.methods import kd, sft
from jaxdistill.models import decoder
from jaxdistill.models.architecture import Experts
from jaxdistill.sharding import make_mesh, replicated
from jaxdistill.train import state as states
from jaxdistill.train import step as steps
from jaxdistill.train.guard import StepRecord, save_batch
from jaxdistill.types import Batch, Mean, Span, TeacherSignal
from tests.also import also

TEACHER = models.DecoderConfig(
    "llama", vocab_size=64, embed=32, mlp=64, layers=3, heads=4, kv_heads=2, head_dim=8,
    tied_head=True, initializer_range=0.3,
)  # fmt: skip
STUDENT = dataclasses.replace(TEACHER, layers=2, embed=16, head_dim=4, tied_head=False)
VOCAB, ROWS, LENGTH = 60, 16, 24
ALPHA, TEMPERATURE = 0.3, 2.0


def rows(seed, count=ROWS, length=LENGTH):
    """Two documents in every row, then padding; the loss mask leaves some predictions out."""
    rng = np.random.default_rng(seed)
    segments = np.repeat(np.array([[1] * 9 + [2] * 11 + [0] * 4], np.int32), count, 0)
    positions = np.repeat(np.r_[np.arange(9), np.arange(11), np.zeros(4)][None], count, 0)
    tokens = rng.integers(0, VOCAB, (count, length)).astype(np.int32)
    targets = rng.integers(0, VOCAB, (count, length)).astype(np.int32)
    mask = (rng.random((count, length)) < 0.6) & (segments > 0)
    return Batch(tokens, targets, mask, positions.astype(np.int32), segments)


@functools.cache
def mesh_of(data, fsdp, tensor=1, context=1):
    sizes = (data, fsdp, tensor, context)
    return make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


class Training:
    """A student in training, on a mesh, in float32."""

    def __init__(
        self, mesh=None, micro_batches=1, lr=1e-2, kind="forward_kl", dtype="float32", **optimizer
    ):
        self.mesh = mesh or mesh_of(1, 1)
        self.teacher = models.random(TEACHER, 1, "float32", self.mesh).params
        student = models.random(STUDENT, 0, dtype, self.mesh).params
        self.tx = optim.optimizer(
            lr, knobs={"alpha": ALPHA, "temperature": TEMPERATURE}, **optimizer
        )
        objective = kd.objective(vocab=VOCAB, divergence=kind)
        loss = steps.make_loss(STUDENT, objective, compute_dtype="float32")
        signal = teachers.online(TEACHER, compute_dtype="float32")
        self.state = states.create(student, {}, self.tx, 7, self.mesh)
        shape = steps.abstract_batch(rows(0), ROWS, self.mesh)
        step = steps.make(loss, signal, self.tx, micro_batches=micro_batches)
        self.program = steps.compiled(step, self.state, self.teacher, shape, self.mesh)

    def step(self, batch):
        batch = steps.place(batch, self.mesh)
        self.state, means = self.program(self.state, self.teacher, batch)
        return {name: float(mean.value) for name, mean in jax.device_get(means).items()}

    def params(self):
        return jax.device_get(self.state.params["student"])


def loss64(student_logits, teacher_logits, batch, kind="forward_kl"):
    """alpha * CE + (1 - alpha) * T^2 * D over all counted tokens, in float64."""
    s, t = (np.asarray(z, np.float64)[..., :VOCAB] for z in (student_logits, teacher_logits))

    def log_softmax(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    ce = -np.take_along_axis(log_softmax(s), batch.targets[..., None], -1)[..., 0]
    lq, lp = log_softmax(s / TEMPERATURE), log_softmax(t / TEMPERATURE)
    if kind == "reverse_kl":
        lq, lp = lp, lq
    divergence = TEMPERATURE**2 * (np.exp(lp) * (lp - lq)).sum(-1)
    per_token = ALPHA * ce + (1 - ALPHA) * divergence
    return (per_token * batch.mask).sum() / batch.mask.sum()


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def logits(config, params, batch):
    batch = on_device(batch)
    outputs = decoder.apply(
        config, params, batch.tokens, batch.positions, batch.segment_ids, compute_dtype="float32"
    )
    return decoder.logits(outputs)


@pytest.mark.parametrize("kind", ["forward_kl", *also("reverse_kl")])
def test_the_loss_is_the_definition_over_the_masked_tokens(kind):
    run = Training(kind=kind)
    batch = rows(0)
    expected = loss64(
        logits(STUDENT, run.state.params["student"], batch),
        logits(TEACHER, run.teacher, batch),
        batch,
        kind,
    )
    np.testing.assert_allclose(run.step(batch)["loss/total"], expected, rtol=2e-6)


def test_the_gradient_is_the_slope_of_the_definition():
    """Along its own direction, against central differences through float32 logits."""
    batch = on_device(rows(0))
    mesh = mesh_of(1, 1)
    params = models.random(STUDENT, 0, "float32", mesh).params
    teacher = models.random(TEACHER, 1, "float32", mesh).params
    loss = steps.make_loss(STUDENT, kd.objective(vocab=VOCAB), compute_dtype="float32")
    signal = teachers.online(TEACHER, compute_dtype="float32")(teacher, None, batch)
    knobs = {"alpha": jnp.float32(ALPHA), "temperature": jnp.float32(TEMPERATURE)}
    mean = lambda p: loss({"student": p, "objective": {}}, signal, batch, knobs)["loss"].value
    gradient = jax.jit(jax.grad(mean))(params)
    length = float(optax.tree_utils.tree_norm(gradient))
    direction = jax.tree.map(lambda g: g / length, gradient)  # the steepest: the clearest signal
    teacher_logits = logits(TEACHER, teacher, batch)
    at = lambda h: loss64(
        logits(STUDENT, jax.tree.map(lambda p, d: p + h * d, params, direction), batch),
        teacher_logits,
        batch,
    )
    step = 3e-3
    slope = (at(step) - at(-step)) / (2 * step)
    dots = jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), gradient, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(dots)), slope, rtol=1e-3)


def curve(**options):
    run = Training(**options)
    losses = [run.step(rows(seed))["loss/total"] for seed in range(5)]
    return losses, run.params()


@pytest.fixture(scope="module")
def plain():
    return curve()


@pytest.mark.parametrize(
    ("axes", "micro_batches"),
    [
        ((1, 8), 1),
        ((1, 2, 2, 2), 2),
        *also(((1, 1), 4), ((2, 4), 2), ((1, 1, 8), 1), ((1, 1, 1, 4), 1)),
    ],
)
def test_meshes_and_micro_batches_give_the_same_curve(plain, axes, micro_batches):
    losses, params = curve(mesh=mesh_of(*axes), micro_batches=micro_batches)
    np.testing.assert_allclose(losses, plain[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, plain[1])


def test_equal_runs_are_equal(plain):
    losses, params = curve()
    assert losses == plain[0]
    jax.tree.map(np.testing.assert_array_equal, params, plain[1])


@pytest.mark.usefixtures("contracted")
def test_padding_and_packing_change_nothing():
    """The same documents, two in a row or one in a row, give the same loss and gradient."""
    packed = rows(0, count=2)
    first, second = slice(0, 9), slice(9, 20)
    given = {name: array for name, array in vars(packed).items() if array is not None}
    apart = {name: np.zeros((4, LENGTH), array.dtype) for name, array in given.items()}
    for name, array in apart.items():
        source = given[name]
        array[:2, :9], array[2:, :11] = source[:, first], source[:, second]
    apart["segment_ids"] = np.minimum(apart["segment_ids"], 1)
    mesh = mesh_of(1, 1)
    params = {"student": models.random(STUDENT, 0, "float32", mesh).params, "objective": {}}
    teacher = models.random(TEACHER, 1, "float32", mesh).params
    loss = steps.make_loss(STUDENT, kd.objective(vocab=VOCAB), compute_dtype="float32")
    signal = teachers.online(TEACHER, compute_dtype="float32")
    knobs = {"alpha": jnp.float32(ALPHA), "temperature": jnp.float32(TEMPERATURE)}
    run = jax.jit(
        lambda batch: jax.value_and_grad(
            lambda p: loss(p, signal(teacher, None, batch), batch, knobs)["loss"].value
        )(params)
    )
    value, gradient = run(on_device(packed))
    other, other_gradient = run(on_device(Batch(**apart)))
    np.testing.assert_allclose(value, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, other_gradient)


def test_the_balance_of_experts_is_part_of_the_loss_on_any_mesh():
    config = dataclasses.replace(STUDENT, family="mixtral", experts=Experts(4, 2))
    batch, objective = on_device(rows(0)), sft.objective(vocab=VOCAB)

    def means(weight, student, batch):
        loss = steps.make_loss(
            config, objective, compute_dtype="float32", router_aux_loss_coef=weight
        )
        params = {"student": student, "objective": {}}
        return {k: m.value for k, m in loss(params, TeacherSignal(), batch, {}).items()}

    student = models.random(config, 0).params
    plain, both = means(0.0, student, batch), means(0.5, student, batch)
    outputs = decoder.apply(
        config, student, batch.tokens, batch.positions, batch.segment_ids,
        compute_dtype="float32", routing=True,
    )  # fmt: skip
    expected = losses.load_balancing(outputs.routing, 2, batch.segment_ids > 0)
    np.testing.assert_allclose(both["loss/routing"], expected, rtol=1e-6)
    np.testing.assert_allclose(both["loss"], plain["loss"] + 0.5 * expected, rtol=1e-6)
    assert "loss/routing" not in plain
    mesh = mesh_of(2, 2, 2)
    spread = models.random(config, 0, mesh=mesh).params
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(means, 0.5))
        found = step(spread, steps.place(rows(0), mesh))
    for name, value in both.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", *also("bfloat16")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(dtype):
    run = Training(dtype=dtype, average=(0.9, 1))
    run.step(rows(0))
    before = jax.device_get(run.state)
    moved = (
        optim.average(before.opt_state)["student"]["embedding"]
        - before.params["student"]["embedding"]
    )
    assert np.any(moved), "the first step moved the average"
    bad = run.teacher
    run.teacher = jax.tree.map(lambda leaf: leaf * jnp.nan, bad)
    means = run.step(rows(1))
    assert not np.isfinite(means["loss/total"])
    assert (means["guard/in_a_row"], means["guard/skipped"]) == (1, 1)
    after = jax.device_get(run.state)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    assert after.step == before.step + 1
    means = run.step(rows(2))
    assert (means["guard/in_a_row"], means["guard/skipped"]) == (2, 2)
    run.teacher = bad
    means = run.step(rows(3))
    assert (means["guard/in_a_row"], means["guard/skipped"]) == (0, 2)
    assert np.isfinite(means["loss/total"])


def test_a_batch_with_nothing_to_learn_moves_no_parameter_and_stays_finite():
    run = Training()
    batch = dataclasses.replace(rows(0), mask=np.zeros((ROWS, LENGTH), bool))
    means = run.step(batch)
    assert means["loss/total"] == 0 and means["optim/grad_norm"] == 0
    assert means["guard/skipped"] == 0


def test_the_teacher_does_not_come_back_and_the_state_is_reused():
    run = Training()
    memory = run.program.memory_analysis()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    state, teacher = size(run.state), size(run.teacher)
    assert memory.output_size_in_bytes < state + 4096 < state + teacher
    assert memory.alias_size_in_bytes >= 0.99 * state
    out_state, means = run.program.output_shardings
    assert len(jax.tree.leaves(out_state)) == len(jax.tree.leaves(run.state))
    assert len(jax.tree.leaves(means)) < 40


def test_no_buffer_of_tokens_times_vocabulary():
    """The compiled step of a wide vocabulary holds no [tokens, V] array of either model."""
    vocab, batch, length = 16_384, 4, 128
    wide = dataclasses.replace(TEACHER, vocab_size=vocab)
    small = dataclasses.replace(STUDENT, vocab_size=vocab)
    mesh = mesh_of(1, 1)
    tx = optim.optimizer(1e-3, knobs={"alpha": ALPHA, "temperature": TEMPERATURE})
    state = states.abstract(small, "float32", {}, tx, mesh)
    teacher = states.abstract(wide, "float32", {}, tx, mesh).params["student"]
    loss = steps.make_loss(small, kd.objective(vocab=vocab, chunk=32), compute_dtype="float32")
    step = steps.make(loss, teachers.online(wide, compute_dtype="float32"), tx)
    like = jax.tree.map(lambda leaf: np.zeros((1, length), leaf.dtype), rows(0))
    shape = steps.abstract_batch(like, batch, mesh)
    program = steps.compiled(step, state, teacher, shape, mesh)
    tokens = batch * length
    text = program.as_text()
    for dims in (f"{tokens},{vocab}", f"{batch},{length},{vocab}", f"{vocab},{tokens}"):
        assert f"[{dims}]" not in text, dims
    assert program.memory_analysis().temp_size_in_bytes < tokens * vocab * 4


def parts_of(config, **options):
    """(pure step, state, teacher's parameters, mesh) of a small training."""
    mesh = mesh_of(2, 1)
    tx = optim.optimizer(1e-2, knobs={"alpha": ALPHA, "temperature": TEMPERATURE})
    loss = steps.make_loss(config, kd.objective(vocab=VOCAB), compute_dtype="float32")
    pure = steps.make(loss, teachers.online(TEACHER, compute_dtype="float32"), tx, **options)
    student = models.random(config, 0, "float32", mesh).params
    state = states.create(student, {}, tx, 7, mesh)
    return pure, state, models.random(TEACHER, 1, "float32", mesh).params, mesh


def test_batches_of_two_sizes_train_with_two_programs_and_the_numbers_of_padded_ones():
    whole, half = rows(0), jax.tree.map(lambda leaf: leaf[: ROWS // 2], rows(1))
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros_like(leaf)]), half)

    def train(batches):
        pure, state, teacher, mesh = parts_of(STUDENT)
        made, losses = [], []

        def compile(state, teacher, batch):
            made.append(batch.tokens.shape)
            return steps.compiled(pure, state, teacher, batch, mesh)

        step = steps.PerShape(compile)
        step.prepare(state, teacher, steps.abstract_batch(whole, ROWS, mesh))
        for batch in batches:
            state, means = step(state, teacher, steps.place(batch, mesh))
            losses.append(float(means["loss/total"].value))
        return made, losses, jax.device_get(state.params)

    shapes, losses, params = train([whole, half, half, whole])
    assert shapes == [(ROWS, LENGTH), (ROWS // 2, LENGTH)]
    shapes, expected, same_params = train([whole, padded, padded, whole])
    assert shapes == [(ROWS, LENGTH)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, same_params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored(Batch):
    """What later feeds may bring: a number per row, entries per token, another view of the text."""

    advantage: jax.Array | None = None
    top: jax.Array | None = None
    view: dict[str, jax.Array] | None = None


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_leaf_that_a_batch_carries_reaches_the_loss_with_its_rows(micro_batches, tmp_path):
    """Shapes, places, micro-batches and saved batches follow from the leaves alone."""
    rng = np.random.default_rng(5)
    advantage = rng.normal(size=ROWS).astype(np.float32)
    top = rng.normal(size=(ROWS, LENGTH, 3)).astype(np.float32)
    view = rng.integers(0, VOCAB, (ROWS, 10)).astype(np.int32)
    batch = Scored(**vars(rows(0)), advantage=advantage, top=top, view={"tokens": view})

    def loss(params, signal, batch, knobs):
        read = batch.advantage[:, None] * batch.top.sum(-1) + batch.view["tokens"].sum(1)[:, None]
        total = (batch.mask * read * params["student"]).sum()
        return {"loss": Mean(total, batch.mask.sum().astype(jnp.float32))}

    tx, mesh = optim.optimizer(1e-2, knobs={}), mesh_of(2, 1)
    one = jax.device_put(jnp.ones(()), replicated(mesh))
    state = states.create(one, {}, tx, 0, mesh)
    like = jax.tree.map(lambda leaf: leaf[:1], batch)
    shape = steps.abstract_batch(like, ROWS, mesh)
    pure = steps.make(loss, teachers.none, tx, micro_batches=micro_batches)
    program = steps.compiled(pure, state, None, shape, mesh)
    placed = steps.place(batch, mesh)
    _, means = program(state, None, placed)
    read = advantage[:, None] * top.sum(-1) + view.sum(1)[:, None]
    expected = (batch.mask * read).sum() / batch.mask.sum()
    np.testing.assert_allclose(means["loss/total"].value, expected, rtol=1e-5)
    save_batch(tmp_path, StepRecord(1, Span(0, ROWS), placed, "data"))
    with np.load(tmp_path / "crash" / "rows_00000000.npz", allow_pickle=False) as saved:
        np.testing.assert_array_equal(saved["advantage"], advantage)
        np.testing.assert_array_equal(saved["view/tokens"], view)
        assert "origin" not in saved


def test_a_teacher_may_be_made_of_the_student_and_costs_no_copy_of_the_state():
    """The student's own parameters before the step, on the same rows: no divergence at first."""
    _, state, _, mesh = parts_of(STUDENT)
    itself = teachers.online(STUDENT, compute_dtype="float32")
    teacher = lambda params, state, batch: itself(state.params["student"], state, batch)
    tx = optim.optimizer(1e-2, knobs={"alpha": ALPHA, "temperature": TEMPERATURE})
    loss = steps.make_loss(STUDENT, kd.objective(vocab=VOCAB), compute_dtype="float32")
    batch = steps.place(rows(0), mesh)
    program = steps.compiled(steps.make(loss, teacher, tx), state, None, batch, mesh)
    memory = program.memory_analysis()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= 0.99 * held
    assert memory.output_size_in_bytes < held + 4096
    _, means = program(state, None, batch)
    np.testing.assert_allclose(means["loss/kl_t1"].value, 0, atol=1e-6)
    assert means["optim/grad_norm"].value > 0  # of the labels


def test_an_unknown_remat_is_refused_before_anything_is_compiled():
    loss = steps.make_loss(STUDENT, kd.objective(vocab=VOCAB), remat="some")
    params = {"student": decoder.shapes(STUDENT), "objective": {}}
    with pytest.raises(ValueError, match="remat"):
        jax.eval_shape(lambda p: loss(p, None, on_device(rows(0)), {}), params)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_and_not_the_gradient(remat):
    batch = on_device(rows(0))
    mesh = mesh_of(1, 1)
    params = {"student": models.random(STUDENT, 0, "float32", mesh).params, "objective": {}}
    teacher = models.random(TEACHER, 1, "float32", mesh).params
    signal = teachers.online(TEACHER, compute_dtype="float32")(teacher, None, batch)
    knobs = {"alpha": jnp.float32(ALPHA), "temperature": jnp.float32(TEMPERATURE)}

    def gradient(remat):
        loss = steps.make_loss(
            STUDENT, kd.objective(vocab=VOCAB), compute_dtype="float32", remat=remat
        )
        return jax.jit(jax.grad(lambda p: loss(p, signal, batch, knobs)["loss"].value))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(remat), gradient("none")
    )


def test_bfloat16_compute_keeps_float32_masters_and_moments():
    mesh = mesh_of(1, 1)
    student = models.random(STUDENT, 0, "float32", mesh).params
    tx = optim.optimizer(1e-2, knobs={"alpha": ALPHA, "temperature": TEMPERATURE})
    state = states.create(student, {}, tx, 0, mesh)
    teacher = models.random(TEACHER, 1, "bfloat16", mesh).params
    loss = steps.make_loss(STUDENT, kd.objective(vocab=VOCAB), compute_dtype="bfloat16")
    step = steps.make(loss, teachers.online(TEACHER), tx)
    batch = steps.place(rows(0), mesh)
    program = steps.compiled(step, state, teacher, batch, mesh)
    state, means = program(state, teacher, batch)
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    exact = Training().step(rows(0))["loss/total"]
    np.testing.assert_allclose(float(means["loss/total"].value), exact, rtol=2e-2)
