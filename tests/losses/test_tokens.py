"""Log-probability, entropy and mass of plain logits, against NumPy and the chunked form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.kernels import linear_logprobs


def test_plain_logits_say_what_the_head_does_in_chunks():
    logits = jax.random.normal(jax.random.key(0), (5, 7)) * 3
    ids = jnp.array([[0, 6], [1, -1], [2, 2], [3, 4], [5, 0]])
    said = linear_logprobs(logits, jnp.eye(7), ids, sets=[[0, 3], [6]], temperature=2.0, chunk=2)
    picked = losses.token_log_probability(logits / 2, ids)
    np.testing.assert_allclose(said.logprobs, picked, atol=1e-6)
    np.testing.assert_allclose(picked[:, 0], losses.token_log_probability(logits / 2, ids[:, 0]))
    np.testing.assert_allclose(said.entropy, losses.entropy(logits, temperature=2.0), rtol=1e-5)
    masses = losses.log_mass(logits, [[0, 3], [6]], temperature=2.0)
    np.testing.assert_allclose(said.log_masses, masses, atol=2e-6)
    q = np.exp(np.float64(logits) / 2)
    want = np.log(q[:, [0, 3]].sum(1) / q.sum(1))
    np.testing.assert_allclose(masses[:, 0], want, rtol=1e-6)


def test_an_impossible_token_has_no_entropy_and_no_slope():
    logits = jnp.array([0.0, 0.0, -jnp.inf])
    value, slope = jax.value_and_grad(losses.entropy)(logits)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.zeros(2), "tokens are float"),
        (np.zeros((2, 0), int), "K at least 1"),
        (np.zeros(3, int), r"tokens \[3\]: must be \[2\] or \[2, 'K'\]"),
    ],
)
def test_tokens_that_are_none_are_named(tokens, words):
    with pytest.raises(ValueError, match=words):
        losses.token_log_probability(jnp.zeros((2, 5)), tokens)


@pytest.mark.parametrize("sets", [[], [[1, 0]], [[0, 3]]])
def test_sets_that_are_none_are_named(sets):
    with pytest.raises(ValueError, match="sets"):
        losses.log_mass(jnp.zeros(3), sets)


@pytest.mark.parametrize(
    "loss",
    [
        losses.entropy,
        lambda rows: losses.forward_kl(rows, rows),
        lambda rows: losses.cross_entropy(rows, jnp.zeros(2, int)),
        lambda rows: losses.token_log_probability(rows, jnp.zeros(2, int)),
        lambda rows: losses.topk_kl(rows, jnp.zeros((2, 1), int), jnp.zeros((2, 1))),
    ],
)
def test_rows_of_no_token_are_named(loss):
    with pytest.raises(ValueError, match=r"logits \[2, 0\]: must be .* V of at least 1"):
        loss(jnp.zeros((2, 0)))
