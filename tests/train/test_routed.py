"""Several teachers in one step: against one alone, definitions in float64, any split and mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import losses, models, optim, teachers
from jaxdistill.data.routes import MicroBatchLayout
from jaxdistill.data.teacher_cache import formats
from jaxdistill.evaluate import answers_to_store
from jaxdistill.methods import grpo, kd
from jaxdistill.methods.routed import Routed
from jaxdistill.train import state as states
from jaxdistill.train import step as steps
from tests.also import also
from tests.train.test_step import (
    ROWS,
    STUDENT,
    TEACHER,
    VOCAB,
    logits,
    loss64,
    mesh_of,
    on_device,
    rows,
)

KNOBS = {"alpha": jnp.float32(0.3), "temperature": jnp.float32(2.0)}  # of `loss64`
OTHER = dataclasses.replace(
    TEACHER, family="qwen3", layers=1, embed=48, mlp=32, heads=2, kv_heads=2, tied_head=False
)
SHAPES = {"math": TEACHER, "code": OTHER}
MIXED = np.array([1, 2, 2, 1, 2, 1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1])  # 11 of math, 5 of code


@functools.cache
def params_of(name, mesh):
    return models.random(SHAPES[name], 1 + list(SHAPES).index(name), "float32", mesh).params


def laid(batch, routes, layout):
    """The batch as `layout` has it, what is left filled with rows that count nothing."""
    places = layout.places(routes, len(routes))
    give = lambda array: np.where(
        (places >= 0).reshape(-1, *[1] * (array.ndim - 1)), array[places], 0
    ).astype(array.dtype)
    return jax.tree.map(give, dataclasses.replace(batch, route=np.asarray(routes, np.int32)))


SGD = optax.with_extra_args_support(optax.sgd(0.1))  # plain steps down the gradient
KNOWING = optim.optimizer(1e-2, knobs={name: float(value) for name, value in KNOBS.items()})


class Learning:
    """A student under the given teachers."""

    def __init__(
        self, signal, params, micro_batches, *, rows=ROWS, mesh=None, tx=SGD, like=None, loss=None,
        **more,
    ):  # fmt: skip
        self.mesh = mesh or mesh_of(1, 1)
        self.state, self.params = begun(self.mesh, tx), params
        step = steps.make(loss or given, signal, tx, micro_batches=micro_batches, **more)
        like = example(isinstance(signal, Routed)) if like is None else like
        shape = steps.abstract_batch(like, rows, self.mesh)
        self.program = steps.compiled(step, self.state, params, shape, self.mesh)

    def step(self, batch):
        self.state, means = self.program(self.state, self.params, steps.place(batch, self.mesh))
        return {name: float(mean.value) for name, mean in jax.device_get(means).items()}

    def student(self):
        return jax.device_get(self.state.params["student"])


def given(params, signal, batch, knobs):
    """The loss at the knobs of `loss64`, whoever holds them."""
    loss = steps.make_loss(STUDENT, kd.objective(vocab=VOCAB), compute_dtype="float32")
    return loss(params, signal, batch, knobs or KNOBS)


def begun(mesh, tx):
    return states.create(models.random(STUDENT, 0, "float32", mesh).params, {}, tx, 7, mesh)


def example(routed):
    return dataclasses.replace(rows(0), route=MIXED.astype(np.int32)) if routed else rows(0)


@functools.cache
def compiled(micro_batches, normalise, mesh, tx):
    """Compiled once for all tests."""
    layout = MicroBatchLayout(2, micro_batches)
    signals = {n: teachers.online(one, compute_dtype="float32") for n, one in SHAPES.items()}
    params = {name: params_of(name, mesh) for name in SHAPES}
    size = layout.size(ROWS)
    return Learning(
        Routed(signals, normalise), params, layout.parts, rows=size, mesh=mesh, tx=tx
    ), layout


def both(micro_batches=2, normalise="token", mesh=None, tx=SGD, **replaced):
    """A student that begins, under the teachers of mathematics and of code; its batches' layout."""
    run, layout = compiled(micro_batches, normalise, mesh or mesh_of(1, 1), tx)
    run.state = begun(run.mesh, tx)
    run.params = {name: params_of(name, run.mesh) for name in SHAPES} | replaced
    return run, layout


@functools.cache
def definition():
    """Of each teacher in float64: the mean loss of its rows, and how many tokens count."""
    student = models.random(STUDENT, 0, "float32", mesh_of(1, 1)).params
    batch, found = rows(0), {}
    for number, name in enumerate(SHAPES, start=1):
        own = _of(batch, number)
        ours = logits(STUDENT, student, own)
        theirs = logits(SHAPES[name], params_of(name, mesh_of(1, 1)), own)
        found[name] = loss64(ours, theirs, own), own.mask.sum()
    return found


@functools.cache
def gradients():
    """Of each teacher, of the mean loss of its rows, from the loss without a step."""
    student = models.random(STUDENT, 0, "float32", mesh_of(1, 1)).params
    loss = steps.make_loss(STUDENT, kd.objective(vocab=VOCAB), compute_dtype="float32")
    batch, found = on_device(rows(0)), {}
    for number, name in enumerate(SHAPES, start=1):
        own = _of(batch, number)
        ask = teachers.online(SHAPES[name], compute_dtype="float32")
        signal = ask(params_of(name, mesh_of(1, 1)), None, own)

        def mean(params, signal=signal, own=own):
            return loss({"student": params, "objective": {}}, signal, own, KNOBS)["loss"].value

        found[name] = jax.device_get(jax.jit(jax.grad(mean))(student))
    return found


def _of(batch, number):
    """The rows of a teacher."""
    return jax.tree.map(lambda array: array[number == MIXED], batch)


def test_two_teachers_of_which_one_is_asked_are_one_to_the_bit():
    """In one micro-batch; of several XLA adds gradients up within the products, or behind them."""
    routed, layout = both(1, tx=KNOWING)
    signal = teachers.online(OTHER, compute_dtype="float32")
    alone = Learning(signal, params_of("code", mesh_of(1, 1)), 1, tx=KNOWING)
    for seed in range(3):
        batch = rows(seed)
        expected = alone.step(batch)
        found = routed.step(laid(batch, np.full(ROWS, 2), layout))
        assert {name: found[name] for name in expected} == expected
    jax.tree.map(np.testing.assert_array_equal, routed.student(), alone.student())


@pytest.mark.parametrize("normalise", ["token", "teacher"])
def test_a_mixed_batch_is_the_weighted_sum_of_both(normalise):
    run, layout = both(normalise=normalise)
    before = run.student()
    told = run.step(laid(rows(0), MIXED, layout))
    (math, math_tokens), (code, code_tokens) = definition().values()
    share = math_tokens / (math_tokens + code_tokens) if normalise == "token" else 0.5
    assert share != 0.5 or normalise == "teacher"
    np.testing.assert_allclose(told["loss/total"], share * math + (1 - share) * code, rtol=2e-6)
    np.testing.assert_allclose(told["teachers/math/loss"], math, rtol=2e-6)
    np.testing.assert_allclose(told["teachers/code/loss"], code, rtol=2e-6)
    assert told["teachers/math/tokens"] == math_tokens
    assert told["teachers/code/tokens"] == code_tokens
    assert told["teachers/code/share"] == pytest.approx(code_tokens / (math_tokens + code_tokens))
    mixed = lambda a, b: share * a + (1 - share) * b
    expected = jax.tree.map(mixed, *gradients().values())
    moved = jax.tree.map(lambda old, new: (old - new) / 0.1, before, run.student())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), moved, expected)


def stored(name, form, batch):
    """What a teacher says of a batch as a store has it; in others' rows what nobody may read."""
    mesh = mesh_of(1, 1)
    ask = answers_to_store.step(SHAPES[name], form, mesh, compute_dtype="float32")
    keys = {answers_to_store.KEYS: np.zeros(batch.tokens.shape, np.uint32)}
    asked = steps.place(dataclasses.replace(batch, teacher=keys), mesh)
    found = {key: np.asarray(a) for key, a in ask(params_of(name, mesh), asked).items()}
    flat = {key: a.reshape(-1, *a.shape[2:]) for key, a in found.items()}
    others = list(SHAPES).index(name) + 1 != MIXED
    fields = {}
    for key, a in answers_to_store.finish(form, flat).items():
        fields[key] = a.reshape(ROWS, -1, *a.shape[1:]).copy()
        fields[key][others] = np.nan if np.issubdtype(a.dtype, np.floating) else 255
    return fields


def test_stored_answers_of_several_forms_teach_as_the_teachers_do():
    """Of one the hidden states, of the other all tokens' probabilities at T = 1 and 2."""
    run, layout = both()
    told = run.step(laid(rows(0), MIXED, layout))
    forms = {
        "math": formats.choose("hidden", vocab=VOCAB, embed=TEACHER.embed, dtype="float32"),
        "code": formats.choose(
            "topk", vocab=VOCAB, embed=OTHER.embed, k=VOCAB, dtype="float32", temperatures=(2.0,)
        ),
    }
    given = {name: stored(name, form, rows(0)) for name, form in forms.items()}
    batch = laid(dataclasses.replace(rows(0), teacher=given), MIXED, layout)
    signals = {
        name: teachers.cached(form, temperature=2.0, compute_dtype="float32")
        for name, form in forms.items()
    }
    params = {"math": {"head": params_of("math", mesh_of(1, 1))["embedding"][:VOCAB]}, "code": {}}
    asked = Learning(Routed(signals), params, layout.parts, rows=layout.size(ROWS), like=batch)
    found = asked.step(batch)
    of_rows = {"loss/kl_t1": "kl_t1", "agree/top1": "agree_top1"}  # known of mathematics alone
    for name, own in of_rows.items():
        assert found[name] == found[f"teachers/math/{own}"]
        assert f"teachers/code/{own}" not in found
    for name in found.keys() & told.keys() - {*of_rows, "teacher/entropy"}:
        assert found[name] == pytest.approx(told[name], rel=2e-6), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), asked.student(), run.student()
    )


@pytest.mark.parametrize(
    ("micro_batches", "axes", "normalise"),
    [
        (2, (2, 4), "teacher"),
        *also((8, (1, 1), "token"), (1, (1, 1), "teacher"), (1, (1, 8), "token")),
    ],
)
def test_any_split_and_mesh_gives_the_same(micro_batches, axes, normalise):
    plain, layout = both(normalise=normalise)
    told = plain.step(laid(rows(0), MIXED, layout))
    expected = plain.student()
    other, split = both(micro_batches, normalise, mesh_of(*axes))
    found = other.step(laid(rows(0), MIXED, split))
    assert found == pytest.approx(told, rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other.student(), expected
    )


def test_beside_rewards_each_answer_has_the_term_of_its_own_teacher():
    """L = -mean A q / sg(q) + 0.7 mean_t KL(q, p of the row's), counted in the whole batch."""
    policy, weight = losses.POLICIES["dapo"], 0.7
    objective = grpo.objective(vocab=VOCAB, policy=policy, divergence="reverse_kl", only_wrong=True)
    loss = steps.make_loss(STUDENT, objective, compute_dtype="float32")
    rng, whole = np.random.default_rng(3), rows(0)
    sampled = {
        "advantages": rng.normal(size=whole.mask.shape).astype(np.float32),
        "wrong": rng.random(whole.mask.shape) < 0.6,
    }
    drawn = dataclasses.replace(
        whole, sampled=sampled, sampler_logprobs=np.full(whole.mask.shape, -9.0, np.float32)
    )
    layout, mesh = MicroBatchLayout(2, 2), mesh_of(1, 1)
    batch = laid(drawn, MIXED, layout)
    signals = {n: teachers.online(one, compute_dtype="float32") for n, one in SHAPES.items()}
    params = {name: params_of(name, mesh) for name in SHAPES}
    run = Learning(
        Routed(signals), params, layout.parts, rows=layout.size(ROWS), like=batch,
        loss=lambda p, signal, part, knobs: loss(
            p, signal, part, {**knobs, "teacher_weight": jnp.float32(weight)}
        ),
        prepare=objective.prepare,
    )  # fmt: skip
    before = run.student()
    told = run.step(batch)
    theirs = [logits(SHAPES[name], params[name], whole)[..., :VOCAB] for name in SHAPES]
    own = jnp.where((MIXED == 1)[:, None, None], *theirs)

    def expected(student):
        z = logits(STUDENT, student, whole)[..., :VOCAB]
        logq = jax.nn.log_softmax(z)
        q = jnp.take_along_axis(logq, whole.targets[..., None], -1)[..., 0]
        # q_old / mu is far above its bound of 2 in every token.
        gain = 2 * sampled["advantages"] * jnp.exp(q - jax.lax.stop_gradient(q))
        kl = (jnp.exp(logq) * (logq - jax.nn.log_softmax(own))).sum(-1)
        taught = whole.mask & sampled["wrong"]
        return (
            -(gain * whole.mask).sum() / whole.mask.sum()
            + weight * (kl * taught).sum() / taught.sum()
        )

    value, gradient = jax.jit(jax.value_and_grad(expected))(before)
    assert told["loss/total"] == pytest.approx(float(value), rel=2e-5)
    assert told["teachers/math/tokens"] + told["teachers/code/tokens"] == whole.mask.sum()
    moved = jax.tree.map(lambda old, new: (old - new) / 0.1, before, run.student())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, gradient)


@pytest.mark.parametrize(("lost", "route"), [("code", 1), ("math", 2)])
def test_a_teacher_that_no_row_names_is_not_run(lost, route):
    """Nor on the part of padding that follows, which is for none."""
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params_of(lost, mesh_of(1, 1)))
    run, layout = both(**{lost: broken})
    told = run.step(laid(rows(0), np.full(ROWS, route), layout))
    assert np.isfinite(told["loss/total"]) and told["guard/skipped"] == 0
    assert told[f"teachers/{lost}/tokens"] == 0
    told = run.step(laid(rows(0), MIXED, layout))
    assert told["guard/skipped"] == 1


def test_the_weights_of_a_teacher_are_an_argument_and_no_copy():
    """XLA's memory for what the step makes does not grow with the teachers' weights."""
    run, _ = both()
    made = run.program.memory_analysis().temp_size_in_bytes
    wide = dataclasses.replace(TEACHER, mlp=4096)  # 3 * 3 * 32 * 4032 * 4 bytes more
    signals = {name: teachers.online(wide, compute_dtype="float32") for name in SHAPES}
    params = dict.fromkeys(SHAPES, models.random(wide, 1, "float32", mesh_of(1, 1)).params)
    large = Learning(Routed(signals), params, 3, rows=MicroBatchLayout(2, 2).size(ROWS))
    more = large.program.memory_analysis().temp_size_in_bytes - made
    activations = 8 * 24 * 4096 * 4 * 3  # of one layer, rows * length * width * bytes
    assert more < activations


def test_the_layout_has_room_for_any_mixture():
    """All mixtures of three teachers in batches of up to 12 rows, by hand: nothing lost or met."""
    for micro_batches, rows_each in ((1, 4), (2, 3), (3, 4)):
        layout, count = MicroBatchLayout(3, micro_batches), micro_batches * rows_each
        for first in range(count + 1):
            for second in range(count + 1 - first):
                routes = np.repeat([1, 2, 3], [first, second, count - first - second])
                routes = np.random.default_rng(first).permutation(routes)
                places = layout.places(routes, count)
                assert len(places) == layout.size(count) == (micro_batches + 2) * rows_each
                assert sorted(places[places >= 0]) == list(range(count))
                for part in range(layout.parts):
                    own = places[part :: layout.parts]
                    assert len(set(routes[own[own >= 0]])) <= 1
                assert layout.fits(routes, count)
    assert not MicroBatchLayout(2, 2).fits([1] * 5 + [2] * 5, 4)
