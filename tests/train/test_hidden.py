"""Several feature losses in one objective: distances and layers with weights of their own."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.methods import hidden
from jaxdistill.types import Batch, Outputs

B, L, D, V = 2, 5, 6, 11
LAYERS = ((0, 1, 3), (1, 2, 5))


def outputs(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return Outputs(draw(B, L, D), draw(V, D), taps=draw(3, B, L, D))


def batch():
    ones = jnp.ones((B, L), jnp.int32)
    mask = jnp.arange(B * L).reshape(B, L) % 3 > 0
    return Batch(ones, ones, mask, ones, ones)


def features64(student, teacher, mask, distances, layer_weights):
    """The definition, in float64."""
    s, t = (np.asarray(x.taps, np.float64) for x in (student, teacher))
    unit = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True))
    each = {"cosine": 1 - (unit(s) * unit(t)).mean(-1), "mse": ((unit(s) - unit(t)) ** 2).mean(-1)}
    apart = sum(share * each[name] for name, share in distances.items())
    return (np.mean([w * x for w, x in zip(layer_weights, apart, strict=True)], 0) * mask).sum()


@pytest.mark.parametrize(
    ("distances", "weights"),
    [({"cosine": 0.7, "mse": 0.2}, None), ({"mse": 1.0}, [2.0, 0.0, 0.5]), (None, None)],
)
def test_each_distance_and_each_pair_of_layers_has_its_weight(distances, weights):
    student, teacher, rows = outputs(0), outputs(1), batch()
    objective = hidden.objective(
        vocab=V, layers=LAYERS, widths=(D, D), distances=distances, layer_weights=weights
    )
    signal = types.SimpleNamespace(outputs=teacher)
    knobs = {"alpha": jnp.float32(0.2), "temperature": jnp.float32(1.0)}

    def total(taps, weight):
        student_ = Outputs(student.hidden, student.head, taps=taps)
        means = objective.apply(
            {}, student_, signal, rows, knobs | {"feature_weight": jnp.float32(weight)}
        )
        return means["loss"].total, means

    (value, means), slope = jax.value_and_grad(total, has_aux=True)(student.taps, 0.5)
    of = distances or {"cosine": 1.0}
    want = features64(student, teacher, np.asarray(rows.mask), of, weights or [1.0] * 3)
    np.testing.assert_allclose(means["loss/features"].total, want, rtol=1e-5)
    np.testing.assert_allclose(value - total(student.taps, 0.0)[0], 0.5 * want, rtol=1e-4)
    silent = [weight == 0 for weight in weights or [1.0] * 3]
    assert [not layer.any() for layer in slope] == silent


def test_weights_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="layer_weights = .*must be 3 numbers"):
        hidden.objective(vocab=V, layers=LAYERS, widths=(D, D), layer_weights=[1.0])
    with pytest.raises(ValueError, match="distance: has no effect beside distances"):
        hidden.Hidden(name="hidden", distance="mse", distances={"cosine": 1.0})
    with pytest.raises(ValueError, match="distances"):
        hidden.Hidden(name="hidden", distances={"l7": 1.0})
