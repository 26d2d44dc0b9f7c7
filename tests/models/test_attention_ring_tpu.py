"""A ring whose hops meet in the TPU's kernel, interpreted, against float64 and the plain ring."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import sharding
from jaxdistill.errors import ConfigError
from jaxdistill.models import (
    DecoderConfig,
    attention,
    attention_check,
    attention_ring,
    attention_ring_tpu,
)
from jaxdistill.types import Outputs
from tests.also import also

CONFIG = DecoderConfig("llama", 50, 16, 24, 2, 4, 2, 16)
CAPPED = dataclasses.replace(CONFIG, attention_softcap=1.5)
WINDOWED = dataclasses.replace(CONFIG, windows=(None, 40))


def _arrays(rows, length):
    """Query, key, value, the slope of the mixed values, and segments: documents, then padding."""
    draw = np.random.default_rng(0)
    query, key, value, slope = (
        draw.standard_normal((rows, length, heads, 16)).astype(np.float32) for heads in (4, 2, 2, 4)
    )
    segments = np.sort(draw.integers(1, 6, (rows, length))).astype(np.int32)
    segments[0, -100:] = 0
    return query, key, value, slope, segments


def _expected(cap, query, key, value, slope, segments):
    """Mixed values and gradients of query, key and value, float64, a head of a row at a time."""
    length = query.shape[1]
    found = [np.zeros(array.shape) for array in (query, query, key, value)]
    for row, head in np.ndindex(query.shape[0], query.shape[2]):
        q, k, v, above = (
            array[row, :, head // (query.shape[2] // array.shape[2])].astype(np.float64)
            for array in (query, key, value, slope)
        )
        seen = np.tri(length, dtype=bool) & (segments[row][:, None] == segments[row][None, :])
        turned = np.tanh(q @ k.T / 4 / cap) if cap else None
        scores = np.where(seen, q @ k.T / 4 if turned is None else cap * turned, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        by_share = above @ v.T
        by_score = shares * (by_share - (by_share * shares).sum(-1, keepdims=True)) / 4
        by_score *= 1 if turned is None else 1 - turned**2
        at = (row, slice(None), head), (row, slice(None), head // 2)
        parts = shares @ v, by_score @ k, by_score.T @ q, shares.T @ above
        for total, place, part in zip(found, (at[0], at[0], at[1], at[1]), parts, strict=True):
            total[place] += part
    return found


@pytest.mark.usefixtures("contracted")
@pytest.mark.parametrize(
    ("config", "sizes", "length"),
    [
        (CONFIG, {"fsdp": 2, "context": 4}, 1024),
        # 2 key heads: whole on each device
        *also((CAPPED, {"fsdp": 1, "tensor": 4, "context": 2}, 512)),
    ],
    ids=["four devices", "capped"],
)
def test_a_ring_of_kernels_equals_the_definition_and_the_plain_ring(config, sizes, length):
    *arrays, slope, segments = _arrays(2, length)

    def ring(form, *arrays):
        balance, restore = attention_ring.order(length)
        *qkv, segments = map(balance, arrays)
        attend = attention.of_form(form, config, length, segments, interpret=True)
        mixed = attend(jnp.int32(0), *qkv, segments)
        hidden = restore(Outputs(mixed.reshape(*mixed.shape[:2], -1), None)).hidden
        mixed = hidden.reshape(slope.shape)
        return jnp.sum(slope * mixed), mixed

    mesh = sharding.make_mesh(**sizes)
    rows = jax.NamedSharding(mesh, sharding.spec(("batch", "length"), mesh=mesh))
    spread = [jax.device_put(array, rows) for array in (*arrays, segments)]
    found = {}
    with jax.set_mesh(mesh):
        for form in ("ring", "ring-splash"):
            program = jax.value_and_grad(functools.partial(ring, form), (0, 1, 2), has_aux=True)
            (_, mixed), slopes = jax.jit(program)(*spread)
            found[form] = mixed, *slopes
    expected = _expected(config.attention_softcap, *arrays, slope, segments)
    for kernel, plain, true in zip(found["ring-splash"], found["ring"], expected, strict=True):
        np.testing.assert_allclose(kernel, true, atol=2e-5)
        np.testing.assert_allclose(kernel, plain, atol=2e-5)


def test_the_check_at_the_start_runs_the_ring_on_one_device_and_refuses_another(monkeypatch):
    told = attention_check.errors("ring-splash", CAPPED, 512, "float32", interpret=True)
    assert all(off < allowed / 5 for off, allowed in told.values())
    check = functools.partial(
        attention_check.self_check, "student", "ring-splash", CONFIG, 8192, "float32"
    )

    def off(config, length, *rest):
        right = attention.of_form("blocks", config, length, None)
        return lambda index, query, *rest: right(index, 1.01 * query, *rest)

    monkeypatch.setattr(attention_ring_tpu, "on_one_device", off)
    with pytest.raises(ConfigError, match=r"student's attention ring-splash .* values is off by"):
        check()
    assert attention_check.self_check("student", "ring", CONFIG, 8192) == "ring"  # plain JAX


@pytest.fixture
def tpu(monkeypatch):
    device = types.SimpleNamespace(platform="tpu")
    monkeypatch.setattr(attention.choice, "current_device", lambda: device)
    with jax.set_mesh(sharding.make_mesh(fsdp=2, context=4)):
        yield


@pytest.mark.usefixtures("tpu")
@pytest.mark.parametrize(
    ("name", "config", "length", "form"),
    [
        ("auto", CAPPED, 2048, "ring-splash"),
        ("splash", CONFIG, 2048, "ring-splash"),
        ("xla", CONFIG, 2048, "ring"),
        ("auto", WINDOWED, 2048, "ring"),
        ("auto", dataclasses.replace(CONFIG, windows=(None, 2048)), 2048, "ring-splash"),
        ("auto", CONFIG, 1536, "ring"),
    ],
)
def test_a_ring_takes_the_kernel_where_it_can_compute_it(name, config, length, form):
    assert attention.chosen(name, config, length, "bfloat16") == form


@pytest.mark.usefixtures("tpu")
def test_auto_passes_the_kernel_by_where_key_heads_do_not_divide():
    three = dataclasses.replace(CONFIG, heads=6, kv_heads=3)
    for context, form in ((2, "ring"), (1, "blocks")):
        with jax.set_mesh(sharding.make_mesh(tensor=2, context=context)):
            assert attention.chosen("auto", three, 2048, "bfloat16") == form


@pytest.mark.usefixtures("tpu")
@pytest.mark.parametrize(
    ("config", "length", "message"),
    [
        (CONFIG, 1536, "rows of 1536 tokens are no multiple of 1024, 2 * 128 for each of mesh.con"),
        (WINDOWED, 2048, "mesh.context = 4 divides rows, and this model has windows: change it"),
    ],
)
def test_a_named_kernel_that_cannot_run_in_the_ring_is_refused(config, length, message):
    with pytest.raises(ConfigError, match=re.escape(f"attention = 'splash': {message}")):
        attention.check("splash", config, length, "tpu")
    with pytest.raises(ConfigError, match=re.escape(message)):
        attention.of_form("ring-splash", config, length, None)
    attention.check("auto", config, length, "tpu")


@pytest.mark.usefixtures("tpu")
def test_rows_in_their_own_order_meet_in_no_ring(monkeypatch):
    made = []
    monkeypatch.setattr(attention, "of_form", lambda form, *rest: made.append(form))
    for balanced in (True, False):
        attention.causal(CONFIG, 2048, None, None, balanced=balanced)
    attention.causal(CONFIG, 2048, None, "splash")
    assert made == ["ring-splash", "xla", "splash"]  # the last is refused where it is called
