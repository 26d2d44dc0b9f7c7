"""A student that is its own teacher: whose weights, which positions, no gradient, any mesh."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models, optim, teachers
from jaxdistill.data import batching, pipeline
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.methods import kd
from jaxdistill.models import decoder
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.sharding import make_mesh
from jaxdistill.train import state as states
from jaxdistill.train import step as steps
from tests.also import also

VOCAB = 257
CONFIG = models.DecoderConfig(
    "llama", vocab_size=VOCAB, embed=16, mlp=32, layers=2, heads=2, kv_heads=2, head_dim=8,
    tied_head=True, initializer_range=0.3,
)  # fmt: skip
TEMPLATE = "Solution: {solution}\n{prompt}"
RECORDS = [
    {
        "prompt": f"{a}+{b}=",
        "completion": str(a + b),
        "solution": "so " * (a % 3) + f"it is {a + b}",
    }
    for a in range(3, 13)
    for b in range(5)
]


@functools.cache
def mesh_of(data=1, fsdp=1):
    return make_mesh(data, fsdp, 1, 1, devices=jax.devices()[: data * fsdp])


def built(folder, template, records=RECORDS, length=96, **options):
    path = folder / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    view = PrivilegedView(byte_tokenizer(), length, template, **options)
    return pipeline.build(
        path,
        view.tokenizer,
        seq_len=48,
        loss_on="completion",
        cache_dir=folder / "cache",
        second=view,
    )


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Rows with several answers, which lie elsewhere in the teacher's rows."""
    rows = built(tmp_path_factory.mktemp("context"), TEMPLATE)
    found = batching.stack([rows[i] for i in range(8)])
    assert max(row.max() for row in found.segment_ids) > 2
    return found


@pytest.fixture(scope="module")
def untold(tmp_path_factory):
    """The same documents, whose teacher is told nothing, in rows of one length."""
    records = [one | {"solution": "."} for one in RECORDS]
    rows = built(tmp_path_factory.mktemp("untold"), TEMPLATE, records, 48)
    found = batching.stack([rows[i] for i in range(8)])
    view = {name: getattr(found, name) for name in ("tokens", "positions", "segment_ids", "groups")}
    return dataclasses.replace(found, second=view)


def live(params, state):
    return state.params["student"]


def averaged(params, state):
    return optim.average(state.opt_state)["student"]


def given(params, state):
    return params


def copied(params):
    """Which no step takes over."""
    return jax.tree.map(jnp.copy, params)


class Training:
    """A student in training in float32 whose teacher has `weights` of its own."""

    def __init__(self, weights, batch, mesh=None, micro_batches=1, decay=0.9, lr=1e-2):
        self.mesh = mesh or mesh_of()
        itself = teachers.online(CONFIG, compute_dtype="float32", aligned=True)
        teacher = lambda params, state, batch: itself(weights(params, state), state, batch)
        tx = optim.optimizer(
            lr, knobs={"alpha": 0.0, "temperature": 1.0}, average=(decay, 1), weight_decay=0.0
        )
        loss = steps.make_loss(CONFIG, kd.objective(vocab=VOCAB), compute_dtype="float32")
        self.first = models.random(CONFIG, 0, "float32", self.mesh).params
        self.state = states.create(copied(self.first), {}, tx, 7, self.mesh)
        self.params = self.first if weights is given else None
        step = steps.make(loss, teacher, tx, micro_batches=micro_batches)
        shape = steps.abstract_batch(batch, len(batch.tokens), self.mesh)
        self.program = steps.compiled(step, self.state, self.params, shape, self.mesh)

    def step(self, batch):
        self.state, means = self.program(self.state, self.params, steps.place(batch, self.mesh))
        return {name: float(mean.value) for name, mean in jax.device_get(means).items()}


@jax.jit
def read(params, tokens, positions, segment_ids):
    return decoder.apply(CONFIG, params, tokens, positions, segment_ids, compute_dtype="float32")


def logprobs(params, ids):
    """float64 [L, V] of one text alone in its row; what follows it is not seen."""
    tokens = jnp.asarray([ids + [0] * (64 - len(ids))])
    outputs = read(params, tokens, jnp.arange(64)[None], jnp.ones_like(tokens))
    logits = np.asarray(outputs.hidden[0, : len(ids)] @ outputs.head.T, np.float64)
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def definition(student, teacher, batch, skip=0):
    """KL(teacher || student) over the tokens of the answers of a batch, each text by itself."""
    encode = lambda text: byte_tokenizer()(text)["input_ids"]
    total = count = 0
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            own = batch.tokens[row][batch.segment_ids[row] == segment].tolist()
            text = byte_tokenizer().decode(own)
            one = next(r for r in RECORDS if text.startswith(r["prompt"] + r["completion"] + "<"))
            answer = [*encode(one["completion"]), 256]
            ours = encode(one["prompt"])
            theirs = encode(f"Solution: {one['solution']}\n{one['prompt']}")
            assert own == [*ours, *answer]
            log_q = logprobs(student, own)[len(ours) - 1 + skip : len(own) - 1]
            log_p = logprobs(teacher, [*theirs, *answer])[len(theirs) - 1 + skip :][:-1]
            total += np.sum(np.exp(log_p) * (log_p - log_q))
            count += len(log_q)
    return total / count


@pytest.fixture(scope="module")
def curve(batch):
    """The loss of four steps with the averaged teacher, on one device, in one part."""
    run = Training(averaged, batch)
    return [run.step(batch)["loss/total"] for _ in range(4)]


def test_each_token_of_an_answer_is_compared_with_itself_behind_the_other_prompt(batch, curve):
    run = Training(averaged, batch)
    np.testing.assert_allclose(curve[0], definition(run.first, run.first, batch), rtol=2e-5)


def test_skipped_tokens_count_on_neither_side(batch, tmp_path):
    rows = built(tmp_path, TEMPLATE, skip_first=1)
    fewer = batching.stack([rows[i] for i in range(8)])
    assert 0 < fewer.mask.sum() < batch.mask.sum()
    run = Training(live, fewer)
    wanted = definition(run.first, run.first, fewer, skip=1)
    np.testing.assert_allclose(run.step(fewer)["loss/total"], wanted, rtol=2e-5)


def test_a_teacher_that_is_told_nothing_has_nothing_to_teach(untold):
    """Nothing at all where one program reads both sides, in a step's two nothing but rounding."""
    params = models.random(CONFIG, 0, "float32", mesh_of()).params
    rows = steps.place(untold, mesh_of())
    ours = read(params, rows.tokens, rows.positions, rows.segment_ids)
    itself = jax.jit(teachers.online(CONFIG, compute_dtype="float32", aligned=True))
    knobs = {"alpha": jnp.float32(0), "temperature": jnp.float32(1)}
    apply = kd.objective(vocab=VOCAB).apply
    assert apply({}, ours, itself(params, None, rows), rows, knobs)["loss"].total == 0
    means = Training(live, untold).step(untold)
    assert abs(means["loss/total"]) < 1e-7 and means["optim/grad_norm"] < 1e-5


def test_the_gradient_does_not_reach_the_teacher(batch):
    """It is that of a teacher which is an argument with the same numbers, to the last bit."""
    one, other = Training(live, batch), Training(given, batch)
    assert one.step(batch) == other.step(batch)
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, one.state.params, other.state.params)
    jax.tree.map(same, one.state.opt_state, other.state.opt_state)


def test_frozen_weights_are_those_before_the_first_step_after_any_number_of_steps(batch):
    run = Training(given, batch)
    for _ in range(3):
        run.step(batch)
    now = copied(run.state.params["student"])
    first = models.random(CONFIG, 0, "float32", mesh_of()).params
    jax.tree.map(np.testing.assert_array_equal, run.params, first)
    wanted = definition(now, first, batch)
    np.testing.assert_allclose(run.step(batch)["loss/total"], wanted, rtol=2e-5)
    assert abs(definition(now, now, batch) / wanted - 1) > 0.01, "they have moved apart"


def test_the_average_of_before_the_update_teaches(batch):
    run, kept = Training(averaged, batch, decay=0.5), None
    for _ in range(3):
        now = copied(run.state.params["student"])
        kept = now if kept is None else jax.tree.map(lambda a, b: (a + b) / 2, kept, now)
        wanted = definition(now, kept, batch)
        np.testing.assert_allclose(run.step(batch)["loss/total"], wanted, rtol=2e-5)


@pytest.mark.parametrize(
    ("axes", "micro_batches"),
    [((1, 1), 2), ((2, 4), 1), *also(((1, 1), 8), ((2, 1), 2), ((1, 8), 1))],
)
def test_meshes_and_micro_batches_give_the_same_curve(batch, curve, axes, micro_batches):
    run = Training(averaged, batch, mesh_of(*axes), micro_batches)
    found = [run.step(batch)["loss/total"] for _ in range(4)]
    np.testing.assert_allclose(found, curve, rtol=2e-5)


def test_a_skipped_step_leaves_the_teacher_as_it_is(batch):
    run = Training(averaged, batch)
    run.step(batch)
    kept = jax.device_get(optim.average(run.state.opt_state))
    params = jax.tree.map(lambda leaf: leaf * math.nan, run.state.params)
    run.state = dataclasses.replace(run.state, params=params)
    assert math.isnan(run.step(batch)["loss/total"])
    jax.tree.map(np.testing.assert_array_equal, optim.average(run.state.opt_state), kept)
