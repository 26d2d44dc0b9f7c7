"""Losses between hidden states: layer maps, distances in NumPy, padding, relations by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses, optim


def test_layer_maps():
    assert losses.layer_map(2, 6) == ((0, 1), (2, 5))
    assert losses.layer_map(4, 4) == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert losses.layer_map(3, 10, "last") == ((2,), (9,))
    assert losses.layer_map(3, 10, 2) == ((0, 2), (4, 9))
    assert losses.layer_map(4, 2, 2) == ((1, 3), (0, 1))
    assert losses.layer_map(3, 10, [(0, 4), (2, 9)]) == ((0, 2), (4, 9))
    for kind, words in (
        ([(0, 10)], "no layer 10"),
        ([(3, 0)], "student has no layer 3"),
        ([(0, 1), (0, 2)], "twice"),
        ("odd", "even, last"),
        (4, "from 1 to the smaller depth, 3"),
        (0, "from 1"),
    ):
        with pytest.raises(ValueError, match=words):
            losses.layer_map(3, 10, kind)
    with pytest.raises(ValueError, match="more than the teacher"):
        losses.layer_map(5, 3)


def states(seed=0, shape=(2, 5, 8)):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_distances_equal_numpy_and_scale_does_not_matter():
    s, t = np.float64(states(0)), np.float64(states(1))
    unit = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(
        losses.hidden_mse(s, t), ((unit(s) - unit(t)) ** 2).mean(-1), rtol=1e-5
    )
    plain = losses.hidden_mse(s, t, normalise=False)
    np.testing.assert_allclose(plain, ((s - t) ** 2).mean(-1), rtol=1e-5)
    cos = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(losses.hidden_cosine(s, t), 1 - cos, rtol=1e-5)
    np.testing.assert_allclose(
        losses.hidden_cosine(100 * s, t), losses.hidden_cosine(s, t), rtol=1e-5
    )


@pytest.mark.parametrize("distance", [losses.hidden_mse, losses.hidden_cosine])
def test_the_teacher_is_a_constant_and_nothing_is_nan(distance):
    s, t = states(0), states(1)
    np.testing.assert_array_equal(jax.grad(lambda t: distance(s, t).sum())(t), 0)
    np.testing.assert_allclose(distance(t, t), 0, atol=1e-6)
    slope = jax.grad(lambda s: distance(s, t).sum())(jnp.zeros_like(s))
    assert np.isfinite(slope).all()
    with pytest.raises(ValueError, match="one shape"):
        distance(s, t[..., :4])


def test_relations_are_the_loop_over_queries():
    s, t = states(0, (2, 5, 8)), states(1, (2, 5, 12))
    segments = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    found = losses.relation_kl(s, t, segments, heads=2)

    def relations(x, b, q, h):
        x = np.float64(x).reshape(2, 5, 2, -1)
        keys = [k for k in range(q + 1) if segments[b, k] == segments[b, q]]
        scores = np.array([x[b, q, h] @ x[b, k, h] for k in keys]) / np.sqrt(x.shape[-1])
        e = np.exp(scores - scores.max())
        return e / e.sum()

    for b in range(2):
        for q in range(5):
            heads = [(relations(t, b, q, h), relations(s, b, q, h)) for h in range(2)]
            want = np.mean([(p * np.log(p / r)).sum() for p, r in heads])
            np.testing.assert_allclose(found[b, q], want if segments[b, q] else 0, atol=2e-6)
    padding = s.at[0, 4].set(1e6)
    np.testing.assert_allclose(losses.relation_kl(padding, t, segments, heads=2), found, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of heads"):
        losses.relation_kl(s, t, segments, heads=3)


def test_a_balanced_weight_follows_the_means_of_earlier_steps():
    tx = optim.balance("w", "a", "b", beta=0.5)
    state, found = tx.init({}), []
    for a, b in ((2.0, 4.0), (2.0, 1.0), (np.nan, 1.0), (1.0, 0.0)):
        found.append(float(optim.knobs(state)["w"]))
        _, state = tx.update({}, state, {}, metrics={"a": a, "b": b})
    found.append(float(optim.knobs(state)["w"]))
    np.testing.assert_allclose(found, [1.0, 0.5, 1.25, 1.25, 1.25])
    with pytest.raises(ValueError, match="metrics"):
        tx.update({}, tx.init({}), {})
