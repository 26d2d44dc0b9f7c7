"""Attention with soft caps against float64, the TPU's kernel against both, and who may be named."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import sharding
from jaxdistill.errors import ConfigError
from jaxdistill.models import DecoderConfig, attention, attention_tpu

CONFIG = DecoderConfig("llama", 50, 16, 24, 2, 4, 2, 128, windows=(None, 40), query_scalar=96)
CAPPED = dataclasses.replace(CONFIG, attention_softcap=1.5)
LENGTH = 256


def _arrays(rows=2):
    draw = np.random.default_rng(0)
    shapes = ((rows, LENGTH, 4, 128), (rows, LENGTH, 2, 128), (rows, LENGTH, 2, 128))
    query, key, value = (draw.standard_normal(shape).astype(np.float32) for shape in shapes)
    segments = np.sort(draw.integers(1, 4, (rows, LENGTH))).astype(np.int32)
    return query, key, value, segments


def _expected(config, layer, query, key, value, segments):
    """Float64, one head of one row at a time."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    age = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None, :]
    window = config.windows[layer] or LENGTH
    mixed = np.zeros_like(query)
    for row in range(len(query)):
        seen = (age >= 0) & (age < window) & (segments[row][:, None] == segments[row][None, :])
        for head in range(4):
            scores = query[row, :, head] @ key[row, :, head // 2].T / np.sqrt(96)
            if config.attention_softcap:
                scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
            scores = np.where(seen, scores, -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[row, :, head] = shares / shares.sum(-1, keepdims=True) @ value[row, :, head // 2]
    return mixed


@pytest.mark.usefixtures("contracted")
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("config", [CONFIG, CAPPED], ids=["plain", "capped"])
def test_xla_and_splash_equal_the_definition(config, layer):
    query, key, value, segments = _arrays()
    expected = _expected(config, layer, query, key, value, segments)
    _, found = attention.causal(config, LENGTH, jnp.asarray(segments), None)(
        None, layer, *map(jnp.asarray, (query, key, value))
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    splash = attention_tpu.attention(config, LENGTH, 96**-0.5, interpret=True)
    found = splash(jnp.int32(layer), *map(jnp.asarray, (query, key, value, segments)))
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.usefixtures("contracted")
def test_splash_has_the_gradient_of_xla_also_on_a_mesh():
    query, key, value, segments = map(jnp.asarray, _arrays(4))
    weight = jnp.cos(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)
    reference = attention.causal(CAPPED, LENGTH, segments, None)
    splash = attention_tpu.attention(CAPPED, LENGTH, 96**-0.5, interpret=True)
    plain = lambda *qkv: jnp.sum(weight * reference(None, 1, *qkv)[1])
    fused = lambda *qkv: jnp.sum(weight * splash(jnp.int32(1), *qkv, segments))
    expected = jax.grad(plain, (0, 1, 2))(query, key, value)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(fused, (0, 1, 2)))(query, key, value)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


REFUSED = {
    "attention = 'flash': must be one of auto, xla, cudnn, splash": ("flash", "tpu", CONFIG, 256),
    "attention = 'splash': runs on a tpu, and this is a cpu": ("splash", "cpu", CONFIG, 256),
    "attention = 'cudnn': runs on a gpu, and this is a tpu": ("cudnn", "tpu", CONFIG, 256),
    "rows of 200 tokens are no multiple of 128": ("splash", "tpu", CONFIG, 200),
    "attention = 'cudnn': has no soft cap": ("cudnn", "gpu", CAPPED, 256),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_run_is_named_and_nothing_takes_its_place(message):
    name, platform, config, length = REFUSED[message]
    with pytest.raises(ConfigError, match=re.escape(message)):
        attention.check(name, config, length, platform)
    for fine in ("auto", "xla"):
        attention.check(fine, config, length, platform)


def test_splash_wants_whole_rows_and_heads_that_divide():
    with pytest.raises(ConfigError, match=r"mesh.context = 2 divides rows"):
        attention_tpu.check(CONFIG, 256, context=2)
    with pytest.raises(ConfigError, match=r"2 key heads do not divide over mesh.tensor = 4"):
        attention_tpu.check(CONFIG, 256, tensor=4)
