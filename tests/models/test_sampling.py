"""Top-k and top-p against their definitions, and draws against their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import sampling

LOGITS = np.random.default_rng(0).standard_normal((4, 23)).astype(np.float32) * 2
LOGITS[3] = LOGITS[3].round()  # with ties


def _expected(row, temperature, top_k, top_p):
    """The definition, token by token: which stay."""
    scaled = row.astype(np.float64) / temperature
    order = sorted(range(len(row)), key=lambda token: -scaled[token])
    kept = set(order)
    if top_k is not None:
        kept = {token for token in order if scaled[token] >= scaled[order[top_k - 1]]}
    if top_p is not None:
        weights = {token: np.exp(scaled[token]) for token in order if token in kept}
        total, reached, chosen = sum(weights.values()), 0.0, set()
        for token in order:
            if token in kept and reached < top_p:
                chosen.add(token)
                reached += weights[token] / total
        lowest = min(scaled[token] for token in chosen)
        kept = {token for token in kept if scaled[token] >= lowest}
    return np.where([token in kept for token in range(len(row))], scaled, -np.inf)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 5, 23])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.7, 0.95, 1.0])
def test_filters_keep_what_their_definitions_keep(temperature, top_k, top_p):
    ours = sampling.filter_logits(jnp.asarray(LOGITS), temperature, top_k, top_p)
    for row, kept in zip(LOGITS, np.asarray(ours), strict=True):
        np.testing.assert_allclose(kept, _expected(row, temperature, top_k, top_p), rtol=1e-5)


def test_draws_follow_their_probabilities():
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]])), (20_000, 4))
    settings = {"temperature": jnp.asarray(1.0), "top_p": jnp.asarray(0.9)}
    drawn, log_mu = sampling.pick(logits, keys, settings)
    share = np.bincount(np.asarray(drawn), minlength=4) / 20_000
    np.testing.assert_allclose(share, np.asarray([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.012)
    assert share[3] == 0
    kept = np.log(np.asarray([0.5, 0.3, 0.15]) / 0.95)
    np.testing.assert_allclose(log_mu, kept[np.asarray(drawn)], atol=1e-6)


def test_no_settings_take_the_largest():
    keys = jax.random.split(jax.random.key(0), 4)
    token, log_mu = sampling.pick(jnp.asarray(LOGITS), keys, {})
    assert token.tolist() == LOGITS.argmax(-1).tolist() and not np.asarray(log_mu).any()


def test_the_largest_is_the_first_of_equals():
    rows = np.random.default_rng(1).integers(0, 4, (50, 300)).astype(np.float32)
    rows[0], rows[1, :], rows[2, 1:] = -np.inf, 3.0, -np.inf
    found = sampling.largest(jnp.asarray(rows))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, rows.argmax(axis=-1))
    broken = sampling.largest(jnp.full((2, 7), jnp.nan))
    assert all(0 <= token < 7 for token in broken)
