"""Rows of the divergence table: derivatives against finite differences, and impossible entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import rows

CASES = [
    ("forward_kl",),
    ("reverse_kl",),
    ("symmetric_kl", 0.3),
    ("generalized_jsd", 0.2),
    ("generalized_jsd", 0.0),
    ("generalized_jsd", 1.0),
    ("skew_forward_kl", 0.1),
    ("skew_forward_kl", 0.0),
    ("skew_forward_kl", 1.0),
    ("skew_reverse_kl", 0.1),
    ("total_variation",),
    ("alpha_divergence", 0.3),
    ("alpha_divergence", 0.0),
    ("alpha_divergence", 1.0),
    ("alpha_beta_divergence", 0.2, 0.7),
    ("alpha_beta_divergence", 0.6, 0.9),
    ("alpha_beta_divergence", 0.0, 0.7),
    ("alpha_beta_divergence", 0.5, 0.0),
]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives_are_finite_differences_of_the_value(case, traced):
    kind, *parameters = case
    generator = np.random.default_rng(0)
    probabilities = generator.uniform(0.01, 1.0, size=(2, 50))
    step = 1e-6
    with jax.enable_x64(True):
        log_p, log_q = jnp.log(jnp.asarray(probabilities))
        if traced:
            parameters = [jnp.asarray(parameter) for parameter in parameters]
        row = rows.make(kind, *parameters)
        by_q = (row.value(log_p, log_q + step) - row.value(log_p, log_q - step)) / (2 * step)
        by_p = (row.value(log_p + step, log_q) - row.value(log_p - step, log_q)) / (2 * step)
        np.testing.assert_allclose(row.dlogq(log_p, log_q), by_q, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(row.dlogp(log_p, log_q), by_p, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_entry_impossible_for_both_counts_nothing_and_nan_never_appears(case):
    row = rows.make(*case)
    impossible = jnp.array([-jnp.inf])
    for function in row[:3]:
        np.testing.assert_array_equal(function(impossible, impossible), 0.0)
    # Possible for one side only: infinite where the divergence is, but never NaN.
    for log_p, log_q in ((impossible, jnp.array([-1.0])), (jnp.array([-1.0]), impossible)):
        for function in row[:3]:
            assert not jnp.isnan(function(log_p, log_q)).any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_keep_the_dtype(case):
    row = rows.make(*case)
    half = jnp.full(3, -1.0, jnp.bfloat16)
    assert {function(half, half).dtype for function in row[:3]} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("beta, end", [(0.0, rows.FORWARD_KL), (1.0, rows.REVERSE_KL)])
@pytest.mark.parametrize("traced", [False, True])
def test_the_generalized_jsd_ends_in_the_plain_directions(beta, end, traced):
    log_p, log_q = jnp.array([-1.0, -0.5, -jnp.inf]), jnp.array([-0.7, -3.0, -jnp.inf])
    row = rows.make("generalized_jsd", jnp.float32(beta) if traced else beta)
    for ours, wanted in zip(row[:3], end[:3], strict=True):
        np.testing.assert_array_equal(ours(log_p, log_q), wanted(log_p, log_q))


def test_every_kind_is_tested():
    assert {kind for kind, *_ in CASES} == set(rows.KINDS)


def test_an_unknown_kind_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match='must be one of forward_kl, .*did you mean "reverse_kl"'):
        rows.make("revers_kl")
    with pytest.raises(ConfigError, match=r"skew = 2.0: must be in \[0, 1\]"):
        rows.make("skew_reverse_kl", 2.0)
