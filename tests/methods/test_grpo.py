"""A teacher's number for each drawn token joins its advantage: against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.methods import grpo
from jaxdistill.types import Known, Outputs, TeacherSignal
from tests.methods.test_known_temperature import V, batch, outputs

WEIGHT = 0.7


def logp64(model):
    hidden, head = np.float64(model.hidden), np.float64(model.head)
    logits = hidden @ head.T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_advantage_is_that_of_the_reward_and_that_of_the_teacher():
    """Value and gradient, of a teacher at hand and of one whose numbers came from elsewhere."""
    student, teacher, drawn = outputs(1), outputs(2), batch()
    picked = lambda table: np.take_along_axis(table, np.asarray(drawn.targets)[..., None], -1)
    own, theirs = (picked(logp64(one))[..., 0] for one in (student, teacher))
    rng = np.random.default_rng(3)
    reward = np.float32(rng.normal(size=own.shape))
    wrong = rng.random(own.shape) < 0.6
    drawn = dataclasses.replace(
        drawn,
        sampler_logprobs=np.float32(own),
        sampled={"advantages": reward, "wrong": wrong},
    )
    made = grpo.objective(
        policy=losses.POLICIES["dapo"], divergence="sampled_kl", only_wrong=True, vocab=V
    )
    signals = {
        "at hand": TeacherSignal(teacher),
        "served": TeacherSignal(
            known=Known(drawn.targets[..., None], jnp.float32(theirs)[..., None]), form="served"
        ),
    }
    mask = np.asarray(drawn.mask)
    gains = reward + WEIGHT * wrong * (theirs - own)
    tokens = mask.sum()
    at_target = np.eye(V)[np.asarray(drawn.targets)]
    scores = (gains * mask)[..., None] * (np.exp(logp64(student)) - at_target)
    slope = scores @ np.float64(student.head)

    def loss(hidden, signal):
        given = dataclasses.replace(student, hidden=hidden)
        means = made.apply({}, given, signal, drawn, {"teacher_weight": jnp.float32(WEIGHT)})
        return means["loss"].total, means

    for name, signal in signals.items():
        (total, means), found = jax.value_and_grad(loss, has_aux=True)(student.hidden, signal)
        np.testing.assert_allclose(found, slope, rtol=2e-4, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(total, -(gains * mask).sum(), rtol=1e-5, err_msg=name)
        value = {key: float(mean.value) for key, mean in means.items()}
        part = mask & wrong
        told = {
            "loss/sampled_kl": (own - theirs)[part].mean(),
            "policy/of_reward": np.abs(reward[mask]).mean(),
            "policy/of_teacher": WEIGHT * np.abs((theirs - own)[part]).sum() / tokens,
        }
        for key, expected in told.items():
            np.testing.assert_allclose(value[key], expected, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("divergence", ["forward_kl", "sampled_kl"])
@pytest.mark.parametrize("form", ["dapo", "grpo"])
def test_each_term_is_a_mean_over_its_own_answers(divergence, form):
    """Some rows are for the reward alone, some for the teacher alone: each has its own count."""
    student, teacher, drawn = outputs(1), outputs(2), batch()
    rng = np.random.default_rng(4)
    reward = np.float32(rng.normal(size=drawn.mask.shape))
    rewarded = np.arange(len(reward))[:, None] < 1 + np.zeros(reward.shape)
    mask, at_target = np.asarray(drawn.mask), np.asarray(drawn.targets)[..., None]
    q, p = logp64(student), logp64(teacher)
    own, theirs = (np.take_along_axis(table, at_target, -1)[..., 0] for table in (q, p))
    parts = {"rewarded": rewarded, "taught": ~rewarded}
    drawn = dataclasses.replace(
        drawn,
        sampler_logprobs=np.float32(own),
        sampled={"advantages": np.where(rewarded, reward, 0), **parts},
    )
    each = {name: mask & part for name, part in parts.items()}
    of_reward = -reward[each["rewarded"]].mean()  # of one sequence: its mean in either form
    made = grpo.objective(policy=losses.POLICIES[form], divergence=divergence, vocab=V)

    def loss(hidden):
        given = dataclasses.replace(student, hidden=hidden)
        signal = TeacherSignal(teacher)
        means = made.apply({}, given, signal, drawn, {"teacher_weight": jnp.float32(WEIGHT)})
        return means["loss"].value, means

    (value, means), slope = jax.value_and_grad(loss, has_aux=True)(student.hidden)
    knobs = {"teacher_weight": jnp.float32(WEIGHT)} | made.prepare(drawn)
    rows = [jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], drawn) for n in range(2)]
    given = [Outputs(student.hidden[n : n + 1], student.head) for n in range(2)]
    signals = [TeacherSignal(Outputs(teacher.hidden[n : n + 1], teacher.head)) for n in range(2)]
    alone = [made.apply({}, *one, knobs)["loss"] for one in zip(given, signals, rows, strict=True)]
    np.testing.assert_allclose((alone[0] + alone[1]).value, value, rtol=1e-5)
    assert (each["rewarded"].sum(), each["taught"].sum()) == (7, 8)
    if divergence == "forward_kl":
        of_teacher = (np.exp(p) * (p - q)).sum(-1)[each["taught"]].mean()
        scores = np.exp(q) - np.exp(p)
    else:
        of_teacher = -(theirs - own)[each["taught"]].mean()
        scores = (theirs - own)[..., None] * (np.exp(q) - np.eye(V)[at_target[..., 0]])
    np.testing.assert_allclose(value, of_reward + WEIGHT * of_teacher, rtol=1e-5)
    rewards = reward[..., None] * (np.exp(q) - np.eye(V)[at_target[..., 0]])
    expected = rewards * (each["rewarded"] / each["rewarded"].sum())[..., None]
    expected += WEIGHT * scores * (each["taught"] / each["taught"].sum())[..., None]
    np.testing.assert_allclose(slope, expected @ np.float64(student.head), rtol=2e-4, atol=2e-5)
    told = {
        "policy/of_reward": np.abs(reward[each["rewarded"]]).mean(),
        "policy/of_teacher": WEIGHT * np.abs((theirs - own)[each["taught"]]).mean(),
    }
    if divergence == "forward_kl":
        told["policy/of_teacher"] = WEIGHT * of_teacher
    for key, number in told.items():
        np.testing.assert_allclose(means[key].value, number, rtol=1e-5, err_msg=key)
