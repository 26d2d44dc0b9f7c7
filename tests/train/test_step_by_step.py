"""Step-by-Step: two tasks in one batch, each with its own mean, however the batch is split."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import api, losses, models, optim, teachers
from jaxdistill import config as configs
from jaxdistill.errors import ConfigError
from jaxdistill.methods import step_by_step
from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.reasoning import rationales
from jaxdistill.sharding import make_mesh
from jaxdistill.train import state as states
from jaxdistill.train import step as steps
from jaxdistill.types import Batch, TeacherSignal
from tests import inject
from tests.also import also
from tests.run.conftest import take_devices

VOCAB, EXPLAIN, PLACE = 23, 7, 1
SHAPE = DecoderConfig(
    "llama", vocab_size=VOCAB, embed=16, mlp=16, layers=1, heads=2, kv_heads=2, head_dim=8
)


def _batch(rows=8, length=12, seed=0):
    """Two documents a row, of unequal lengths; those with EXPLAIN at place 1 are rationales."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, VOCAB, (rows, length)).astype(np.int32)
    cut = rng.integers(3, length - 3, rows)
    segments = (np.arange(length)[None] >= cut[:, None]).astype(np.int32) + 1
    positions = np.where(
        segments == 1, np.arange(length)[None], np.arange(length)[None] - cut[:, None]
    )
    kinds = rng.random((rows, 2)) < 0.5
    kinds[0] = [True, False]
    for row in range(rows):
        for number, start in enumerate((0, cut[row])):
            if kinds[row, number]:
                tokens[row, start + PLACE] = EXPLAIN
    mask = rng.random((rows, length)) < 0.6
    is_rationale = np.where(segments == 1, kinds[:, :1], kinds[:, 1:])
    targets = np.roll(tokens, -1, 1)
    return Batch(tokens, targets, mask, positions.astype(np.int32), segments), is_rationale


def _step(label_weight, micro_batches=1, lr=0.1, bad=None):
    mesh = make_mesh(devices=jax.devices()[:1])
    objective = step_by_step.objective(
        vocab=VOCAB, explains=(PLACE, EXPLAIN), label_weight=label_weight
    )
    tx = optim.optimizer(lr, knobs={}, clip_norm=None, weight_decay=0.0)
    params = models.random(SHAPE, 0, "float32", mesh).params
    loss = steps.make_loss(SHAPE, objective, compute_dtype="float32")
    batch, _ = _batch()
    if bad is not None:
        loss, batch = inject.poisoned(loss), inject.Poison(f"{bad}@3").batch(3, batch)
    step = steps.make(
        loss, teachers.none, tx, micro_batches=micro_batches, prepare=objective.prepare
    )
    state = states.create(jax.tree.map(jnp.copy, params), {}, tx, 0, mesh)
    with jax.set_mesh(mesh):
        state, means = jax.jit(step)(state, None, steps.place(batch, mesh))
    return params, state.params["student"], {n: float(m.value) for n, m in means.items()}


@pytest.mark.parametrize("a", [0.0, 0.3, *also(0.5, 1.0)])
def test_each_task_has_its_own_mean(a):
    params, _, means = _step(a)
    batch, is_rationale = _batch()
    arrays = [jnp.asarray(x) for x in (batch.tokens, batch.positions, batch.segment_ids)]
    outputs = decoder.apply(SHAPE, params, *arrays, compute_dtype="float32")
    scores = np.asarray(jax.nn.log_softmax(decoder.logits(outputs)))
    ce = -np.take_along_axis(scores, batch.targets[..., None], 2)[..., 0]
    label, rationale = (ce[batch.mask & which].mean() for which in (~is_rationale, is_rationale))
    assert means["loss/total"] == pytest.approx(a * label + (1 - a) * rationale, rel=1e-5)
    assert abs(label - rationale) > 1e-3


def test_a_teacher_adds_its_kl_within_each_task():
    """a * mean_label(l) + (1 - a) * mean_rationale(l), l = alpha CE + (1 - alpha) T^2 KL."""
    batch, is_rationale = _batch()
    arrays = jax.tree.map(jnp.asarray, batch)
    run = lambda seed: decoder.apply(
        SHAPE, models.random(SHAPE, seed, "float32").params, arrays.tokens, compute_dtype="float32"
    )
    student, teacher = run(0), run(1)
    objective = step_by_step.objective(
        vocab=VOCAB, explains=(PLACE, EXPLAIN), label_weight=0.3, with_teacher=True
    )
    assert objective.needs_teacher
    knobs = {"alpha": jnp.float32(0.4), "temperature": jnp.float32(2.0)}
    means = objective.apply({}, student, TeacherSignal(teacher), arrays, knobs)
    s, t = decoder.logits(student), decoder.logits(teacher)
    ce = losses.cross_entropy(s, arrays.targets)
    each = np.asarray(0.4 * ce + 0.6 * losses.forward_kl(s, t, temperature=2.0))
    label, rationale = (each[batch.mask & which].mean() for which in (~is_rationale, is_rationale))
    expected = 0.3 * label + 0.7 * rationale
    assert float(means["loss"].value) == pytest.approx(expected, rel=1e-5)


def test_the_step_does_not_depend_on_micro_batches():
    _, whole, means = _step(0.3)
    _, split, parts = _step(0.3, micro_batches=4)
    assert parts["loss/total"] == pytest.approx(means["loss/total"], rel=1e-5)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("bad", ["nan", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    before, after, means = _step(0.3, micro_batches=4, bad=bad)
    assert means["guard/skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_batch_without_one_of_the_tasks_is_finite():
    objective = step_by_step.objective(vocab=VOCAB, explains=(PLACE, 0))
    batch = jax.tree.map(jnp.asarray, _batch()[0])
    params = models.random(SHAPE, 0, "float32").params
    outputs = decoder.apply(SHAPE, params, batch.tokens, compute_dtype="float32")
    means = objective.apply({}, outputs, None, batch, {})
    assert math.isfinite(float(means["loss"].value)) and float(means["loss"].value) > 0


def test_prompts_are_told_apart_by_one_token():
    tokenizer = byte_tokenizer()
    place, token = step_by_step.explain_token(tokenizer)
    codec_ids = lambda text: tokenizer(text)["input_ids"]
    assert codec_ids(rationales.EXPLAIN)[place] == token != codec_ids(rationales.PREDICT)[place]


CONFIG = """
seed: 3
run: {{name: steps, dir: {folder}/run}}
student: {{random: {{layers: 1, embed: 16, mlp: 16, heads: 2}}, compute_dtype: float32}}
tokenizer: {{from: bytes}}
data:
  train: [{{path: {folder}/train.jsonl}}]
  eval: [{{path: {folder}/eval.jsonl}}]
  seq_len: 64
  loss_on: completion
  cache_dir: {folder}/cache
method: {{name: step_by_step, label_weight: 0.4}}
train: {{steps: 3, batch_size: 16, eval_every: null}}
eval: {{batch_size: 8, samples: 0}}
logging: {{progress: none, tensorboard: false}}
"""


def test_a_run_of_records_that_teacher_generate_writes(tmp_path, monkeypatch):
    take_devices(monkeypatch, 1)
    samples = [
        rationales.Sample(f"q{n}", 0, f"{n} + 1?", str(n + 1), "", f"{n} and 1.", str(n + 1), True,
                          None, 1, "stop")
        for n in range(24)
    ]  # fmt: skip
    rows = rationales.records(samples, "step_by_step")
    for name, some in (("train", rows[:40]), ("eval", rows[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    curves = []
    for parts in (1, 2):  # micro-batches whose label and rationale tokens are not in proportion
        change = [f"train.micro_batches={parts}", f"run.dir={tmp_path / f'run{parts}'}"]
        result = api.train(configs.loads(CONFIG.format(folder=tmp_path), overrides=change))
        lines = (pathlib.Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
        curves.append([row["loss/total"] for row in map(json.loads, lines) if "loss/total" in row])
        assert math.isfinite(result.metrics["eval/ce"])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and len(curves[0]) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method.alpha=0.5", "method step_by_step needs a teacher"),
        ("method.temperature=2.0", "has no effect with alpha: 1"),
        ("method.label_weight=1.5", "must be at most 1"),
    ],
)
def test_wrong_settings_are_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        configs.loads(CONFIG.format(folder=tmp_path), overrides=[change])
