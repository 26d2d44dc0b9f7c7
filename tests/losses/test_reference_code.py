"""Losses and gradient norms of the methods' own code, in the form that each of them returns."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "divergences.json"


def _softmax(logits):
    logits = np.asarray(logits, np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _golden_inputs():
    b, t, v = np.meshgrid(np.arange(2), np.arange(5), np.arange(7), indexing="ij")
    student = 2.5 * np.sin(0.9 * v + 0.5 * t + 1.1 * b)
    teacher = 3 * np.cos(0.7 * v - 0.4 * t + 0.6 * b) + 0.5 * np.sin(2 * v)
    labels = np.array([[-100, -100, 3, 1, 6], [-100, 2, 5, 0, -100]])
    return student.astype(np.float32), teacher.astype(np.float32), labels != -100


# Published code returns some losses in the cross-entropy form: ours plus this much of the teacher's
# entropy, which has the same gradient.
@pytest.mark.parametrize(
    "row, name, arguments, entropy_weight",
    [
        ("true forward KL T=1", "forward_kl", {}, 0.0),
        ("true forward KL T=2 times T^2", "forward_kl", {"temperature": 2.0}, 0.0),
        ("distillm.forward_kl(CE form)", "forward_kl", {}, 1.0),
        ("distillm.reverse_kl", "reverse_kl", {}, 0.0),
        (
            "distillm.symmetric_kl lam=0.9 (FKL part in CE form)",
            "symmetric_kl",
            {"weight": 0.9},
            0.1,
        ),
        ("distillm.js_distance lam=0.9", "generalized_jsd", {"beta": 1 - 0.9}, 0.0),
        ("distillm.js_distance lam=0.5", "generalized_jsd", {"beta": 0.5}, 0.0),
        (
            "TRL generalized_jsd beta=0.1 (beta multiplies teacher)",
            "generalized_jsd",
            {"beta": 0.1},
            0.0,
        ),
        (
            "TRL generalized_jsd beta=0.5 (beta multiplies teacher)",
            "generalized_jsd",
            {"beta": 0.5},
            0.0,
        ),
        ("distillm.skewed_forward_kl lam=0.1 (CE form)", "skew_forward_kl", {"skew": 0.1}, 1.0),
        ("distillm.skewed_reverse_kl lam=0.1", "skew_reverse_kl", {"skew": 0.1}, 0.0),
        ("distillm.tv_distance", "total_variation", {}, 0.0),
        (
            "ABKD ab_div alpha=0.5 beta=0.5",
            "alpha_beta_divergence",
            {"alpha": 0.5, "beta": 0.5},
            0.0,
        ),
        (
            "ABKD ab_div alpha=1.0 beta=0.0",
            "alpha_beta_divergence",
            {"alpha": 1.0, "beta": 0.0},
            0.0,
        ),
        (
            "ABKD ab_div alpha=0.0 beta=1.0",
            "alpha_beta_divergence",
            {"alpha": 0.0, "beta": 1.0},
            0.0,
        ),
        ("TAID true-KL form t=0.4", "taid", {"taid_t": 0.4}, 0.0),
        ("TAID true-KL form t=1.0", "taid", {"taid_t": 1.0}, 0.0),
        (
            "AlphaNet adaptive alpha in {-1,1} clip 5 "
            "(surrogate loss value not meaningful; grad is)",
            "alphanet",
            {},
            0.0,
        ),
    ],
)
def test_reference_code_gives_the_same_loss_and_gradient(row, name, arguments, entropy_weight):
    student, teacher, mask = _golden_inputs()
    p = _softmax(teacher)
    entropy = (-(p * np.log(p)).sum(-1))[mask].mean()

    def loss(logits):
        values = getattr(losses, name)(logits, teacher, **arguments)
        return losses.masked_mean(values, mask).value

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(student))
    wanted = json.loads(GOLDEN.read_text())["values"][row]
    np.testing.assert_allclose(value + entropy_weight * entropy, wanted["loss"], rtol=2e-6)
    np.testing.assert_allclose(jnp.linalg.norm(gradient), wanted["grad_l2"], rtol=1e-5)
    np.testing.assert_array_equal(gradient[~mask], 0.0)


@pytest.mark.parametrize("taid_t", [0.0, 0.4, 1.0])
def test_the_reference_code_of_taid_has_the_targets_entropy_above_its_divergence(taid_t):
    student, teacher, mask = _golden_inputs()
    rows = json.loads(GOLDEN.read_text())["values"]
    value, gradient = jax.value_and_grad(
        lambda s: losses.masked_mean(losses.taid(s, teacher, taid_t), mask).value
    )(jnp.asarray(student))
    target = _softmax((1 - taid_t) * np.float64(student) + taid_t * np.float64(teacher))
    entropy = (-(target * np.log(target)).sum(-1))[mask].mean()
    for name, above in (("true-KL form", 0.0), ("official compute_loss", entropy)):
        row = next(rows[key] for key in rows if name in key and f"t={taid_t}" in key)
        np.testing.assert_allclose(value + above, row["loss"], rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(jnp.linalg.norm(gradient), row["grad_l2"], rtol=1e-5, atol=1e-7)
    if taid_t == 0:
        np.testing.assert_allclose(gradient, 0, atol=1e-8)
    if taid_t == 1:
        plain = jax.grad(lambda s: losses.masked_mean(losses.forward_kl(s, teacher), mask).value)
        np.testing.assert_allclose(gradient, plain(jnp.asarray(student)), atol=1e-7)
