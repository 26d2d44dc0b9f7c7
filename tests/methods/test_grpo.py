"""A teacher's number for each drawn token joins its advantage: against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import losses
from jaxdistill.methods import grpo
from jaxdistill.types import Known, TeacherSignal
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
        means = made.apply({}, given, signal, drawn, {"teacher_weight": WEIGHT})
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
