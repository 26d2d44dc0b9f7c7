"""Frequencies of every RoPE kind against transformers and the published formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import rope
from jaxdistill.models.rope import Rope
from tests.models import oracle

KINDS = {
    "default": Rope(theta=50_000.0),
    "linear": Rope(theta=10_000.0, kind="linear", factor=3.0),
    "llama3": Rope(500_000.0, "llama3", 8.0, 8192, 1.0, 4.0),
    "llama3_narrow": Rope(10_000.0, "llama3", 32.0, 64, 2.0, 2.5),
    "yarn": Rope(1e6, "yarn", 4.0, 32768),
    "yarn_truncated": Rope(10_000.0, "yarn", 4.0, 256, beta_fast=16.0, beta_slow=2.0),
    "yarn_exact_band": Rope(10_000.0, "yarn", 4.0, 256, truncate=False),
    "yarn_attention": Rope(10_000.0, "yarn", 2.0, 512, attention_factor=1.3),
    "longrope": Rope(
        10_000.0, "longrope", 32.0, 4096,
        short_factors=tuple(1 + 0.01 * pair for pair in range(32)),
        long_factors=tuple(1 + pair**1.5 for pair in range(32)),
    ),
    "longrope_attention": Rope(
        10_000.0, "longrope", 32.0, 4096, attention_factor=1.3,
        short_factors=(1.0,) * 32, long_factors=(3.0,) * 32,
    ),
    "yarn_mscale": Rope(10_000.0, "yarn", 16.0, 512, mscale=1.0, mscale_all_dim=0.7),
}  # fmt: skip


def _their_settings(settings: Rope) -> dict:
    table = {
        "rope_type": settings.kind,
        "rope_theta": settings.theta,
        "factor": settings.factor,
        "original_max_position_embeddings": settings.original_max_positions,
        "low_freq_factor": settings.low_freq_factor,
        "high_freq_factor": settings.high_freq_factor,
        "beta_fast": settings.beta_fast,
        "beta_slow": settings.beta_slow,
        "attention_factor": settings.attention_factor,
        "mscale": settings.mscale,
        "mscale_all_dim": settings.mscale_all_dim,
        "truncate": settings.truncate,
        "short_factor": settings.short_factors and list(settings.short_factors),
        "long_factor": settings.long_factors and list(settings.long_factors),
    }
    return {key: value for key, value in table.items() if value is not None}


@pytest.mark.torch
@pytest.mark.parametrize("name", [name for name in KINDS if name != "default"])
def test_frequencies_equal_transformers(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = KINDS[name]
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=131072)
    config.rope_parameters = _their_settings(settings)
    expected, multiplier = ROPE_INIT_FUNCTIONS[settings.kind](config, "cpu")
    ours, our_multiplier = rope.frequencies(settings, 64)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6)
    assert our_multiplier == pytest.approx(multiplier, rel=1e-6)
    if settings.kind == "longrope":
        expected, multiplier = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=4097)
        ours, our_multiplier = rope.frequencies(settings, 64, long=True)
        np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6)
        assert our_multiplier == pytest.approx(multiplier, rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "llama3", "llama3_narrow", "yarn"])
def test_frequencies_equal_the_published_cases(kind):
    settings = KINDS[kind]
    raw = {"rope_scaling": _their_settings(settings), "max_position_embeddings": 1 << 17}
    expected, multiplier = oracle._frequencies(raw, 64)
    ours, our_multiplier = rope.frequencies(settings, 64)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert our_multiplier == pytest.approx(multiplier)


def test_default_frequencies_are_a_geometric_series():
    ours, multiplier = rope.frequencies(KINDS["default"], 64)
    expected = [math.exp(-math.log(50_000.0) * 2 * pair / 64) for pair in range(32)]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert multiplier == 1.0 and ours.dtype == np.float32


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    plain, _ = rope.frequencies(Rope(500_000.0), 128)
    scaled, _ = rope.frequencies(KINDS["llama3"], 128)
    waves = 2 * math.pi / plain
    assert np.all(scaled[waves < 8192 / 4] == plain[waves < 8192 / 4])
    np.testing.assert_allclose(scaled[waves > 8192], plain[waves > 8192] / 8, rtol=1e-6)
    between = (waves > 8192 / 4) & (waves < 8192)
    assert between.any()
    assert np.all((scaled < plain)[between]) and np.all((scaled > plain / 8)[between])


def test_a_document_has_the_frequencies_of_its_own_length():
    settings = Rope(kind="longrope", factor=4.0, original_max_positions=3,
                    short_factors=(1.0, 1.0), long_factors=(2.0, 5.0))  # fmt: skip
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    lengths = [[3, 3, 3, 4, 4, 4, 4, 1, 1], [9] * 9]
    assert rope.document_lengths(positions).tolist() == lengths
    cos, sin = rope.tables(settings, 4, positions)
    scale = math.sqrt(1 + math.log(4) / math.log(3))
    for place in np.ndindex(2, 9):
        factors = (2.0, 5.0) if lengths[place[0]][place[1]] > 3 else (1.0, 1.0)
        for pair, factor in enumerate(factors):
            angle = float(positions[place]) * 10_000.0 ** (-pair / 2) / factor
            assert float(cos[place][0, pair]) == pytest.approx(scale * math.cos(angle), abs=1e-6)
            assert float(sin[place][0, pair]) == pytest.approx(scale * math.sin(angle), abs=1e-6)


def test_rotation_depends_on_distance_only():
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def product(i, j):
        turned = [
            rope.rotate(jnp.asarray(x), *rope.tables(Rope(100.0), 8, jnp.asarray([[place]])))
            for x, place in ((query, i), (key, j))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_rotation_keeps_the_dtype_and_works_in_float32():
    x = jnp.full((1, 1, 1, 4), 1.0, jnp.bfloat16)
    turned = rope.rotate(x, *rope.tables(Rope(), 4, jnp.asarray([[257]])))
    assert turned.dtype == jnp.bfloat16
    expected = math.cos(257) - math.sin(257)  # bfloat16 would round 257 to 256
    assert float(turned[0, 0, 0, 0]) == pytest.approx(expected, rel=5e-3)
