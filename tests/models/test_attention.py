"""Attention with soft caps against float64, the TPU's kernel against both, and who may be named."""

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
    attention_blocks,
    attention_check,
    attention_ring,
    attention_tpu,
)
from jaxdistill.plan import hlo
from jaxdistill.types import Outputs
from tests.also import also

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
@pytest.mark.parametrize("layer", [1, *also(0)])
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


BLOCKS = {
    "plain": CONFIG,
    "capped": CAPPED,
    "two windows": dataclasses.replace(CONFIG, windows=(100, 40)),
}


@pytest.mark.usefixtures("contracted")
@pytest.mark.parametrize("name", ["plain", *also("capped", "two windows")])
def test_blocks_equal_the_definition_and_have_its_gradient_also_on_a_mesh(name, monkeypatch):
    """Rows of 256 tokens in blocks of 96: three, of which the last is filled up."""
    config = BLOCKS[name]
    monkeypatch.setattr(
        attention_blocks.BlockSettings, "__new__", _small(attention_blocks.BlockSettings)
    )
    query, key, value, segments = _arrays(4)
    arrays = tuple(map(jnp.asarray, (query, key, value)))
    weight = jnp.cos(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)
    forms = {
        form: attention.causal(config, LENGTH, jnp.asarray(segments), form)
        for form in ("xla", "blocks")
    }
    run = lambda form: lambda index, *qkv: forms[form](None, index, *qkv)[1]
    total = lambda form: lambda index, *qkv: jnp.sum(weight * run(form)(index, *qkv))
    for layer in (0, 1):
        expected = _expected(config, layer, query, key, value, segments)
        index = jnp.int32(layer)  # as a scan over layers has it
        np.testing.assert_allclose(jax.jit(run("blocks"))(index, *arrays), expected, atol=2e-5)
        slopes = jax.jit(jax.grad(total("xla"), (1, 2, 3)))(index, *arrays)
        blocks = jax.jit(jax.grad(total("blocks"), (1, 2, 3)))
        for one, other in zip(blocks(index, *arrays), slopes, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}):
        with jax.set_mesh(sharding.make_mesh(**sizes)):  # 2 key heads on 4 devices: repeated
            found = jax.jit(jax.grad(total("blocks"), (1, 2, 3)))(index, *arrays)
        for one, other in zip(found, slopes, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.usefixtures("contracted")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("capped", {"fsdp": 1, "tensor": 4, "context": 2}),
        *also(
            ("plain", {"fsdp": 2, "context": 4}),
            ("two windows", {"fsdp": 1, "context": 8}),
        ),
    ],
)
def test_a_ring_equals_the_definition_and_gathers_no_keys(name, sizes, monkeypatch):
    """Chunks of 32, 64 and 16 tokens in blocks of 20, of which the last is filled up."""
    config = BLOCKS[name]
    monkeypatch.setattr(attention_ring, "BLOCK", 20)
    query, key, value, segments = _arrays(4)
    weight = jnp.cos(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)
    plain = attention.causal(config, LENGTH, jnp.asarray(segments), "xla")

    def ring(index, *arrays):
        balance, restore = attention_ring.order(LENGTH)
        *qkv, segments = map(balance, arrays)
        assert attention.chosen("auto", config, LENGTH, "float32") == "ring"
        attend = attention.causal(config, LENGTH, segments, None, balanced=True)
        mixed = attend(None, index, *qkv)[1]
        hidden = restore(Outputs(mixed.reshape(*mixed.shape[:2], -1), None)).hidden
        mixed = hidden.reshape(query.shape)
        return jnp.sum(weight * mixed), mixed

    mesh = sharding.make_mesh(**sizes)
    rows = jax.NamedSharding(mesh, sharding.spec(("batch", "length"), mesh=mesh))
    spread = [jax.device_put(array, rows) for array in (query, key, value, segments)]
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(ring, (1, 2, 3), has_aux=True))
        program = program.lower(jnp.int32(0), *spread).compile()
    sent = hlo.collectives(program.as_text())
    kinds = {one.kind for one in sent if "context" in one.axes(mesh.shape)}
    assert "collective-permute" in kinds and "all-gather" not in kinds
    total = lambda index, *qkv: jnp.sum(weight * plain(None, index, *qkv)[1])
    slopes = jax.jit(jax.grad(total, (1, 2, 3)))
    for layer in (0, 1):
        (_, mixed), found = program(jnp.int32(layer), *spread)
        expected = _expected(config, layer, query, key, value, segments)
        np.testing.assert_allclose(mixed, expected, atol=2e-5)
        for one, other in zip(found, slopes(jnp.int32(layer), query, key, value), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_each_device_of_a_ring_meets_as_many_blocks_in_every_step():
    static = attention_ring._RingSettings(
        1.0, None, 4, chunk=3, tokens=30, block=10, windowed=False
    )
    place = lambda device, block: (
        (device if block < 3 else 7 - device) * 3 + block % 3  # of 24 blocks in the row
    )
    own, _ = attention_ring._own_pairs(static)
    earlier, later = attention_ring._pairs(static)
    assert len(earlier) == len(later)
    met = []
    for here in range(4):
        for there in range(4):
            pairs = own if here == there else earlier if there < here else later
            met += [(place(here, i), place(there, j)) for i, j in pairs]
            starts = attention_ring._start(static, jnp.int32(here), jnp.asarray(pairs[:, 0]))
            assert starts.tolist() == [10 * place(here, i) for i, _ in pairs]
    assert sorted(met) == [(i, j) for i in range(24) for j in range(i + 1)]


def _small(kind):
    made = kind.__new__
    return lambda cls, scale, cap, window, block=96: made(cls, scale, cap, window, block)


def test_memory_of_blocks_grows_with_the_row_and_work_with_what_is_seen():
    def compiled(length, window=None):
        config = dataclasses.replace(CONFIG, windows=None if window is None else (window, window))
        attend = attention.causal(config, length, None, "blocks")
        total = lambda *qkv: jnp.sum(attend(None, 0, *qkv)[1])
        shapes = [jax.ShapeDtypeStruct((1, length, n, 128), jnp.float32) for n in (4, 2, 2)]
        return jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()

    memory = {n: compiled(n).memory_analysis().temp_size_in_bytes for n in (1024, 2048, 4096)}
    assert memory[4096] < 2.1 * memory[2048] < 4.5 * memory[1024]
    block = attention_blocks.BLOCK
    assert len(attention_blocks.pairs(16, block, 16 * block)) == 16 * 17 / 2
    assert len(attention_blocks.pairs(16, block, block + 1)) == 1 + 15 * 2


def test_long_rows_are_in_blocks_and_short_ones_keep_their_bits():
    short = attention_blocks.SHORT
    of = lambda length, name="auto", dtype="float32", config=CONFIG: attention.chosen(
        name, config, length, dtype
    )
    assert (of(short), of(short + 1), of(4096, "xla")) == ("xla", "blocks", "blocks")
    with jax.set_mesh(sharding.make_mesh(fsdp=4, context=2)):
        assert (of(4096), of(48)) == ("ring", "ring")
        assert of(4098) == "xla"  # no two parts for each device: all keys are brought together


@pytest.mark.parametrize(
    ("platform", "dtype", "config", "length", "form"),
    [
        ("gpu", "bfloat16", CONFIG, 2048, "cudnn"),
        ("gpu", "float32", CONFIG, 2048, "blocks"),
        ("gpu", "bfloat16", CAPPED, 2048, "blocks"),
        ("gpu", "bfloat16", CONFIG, 16384, "blocks"),
        ("gpu", "bfloat16", dataclasses.replace(CONFIG, head_dim=256), 512, "xla"),
        ("tpu", "float32", CAPPED, 2048, "splash"),
        ("tpu", "float32", CONFIG, 2000, "blocks"),
    ],
)
def test_auto_takes_the_devices_kernel_where_it_can_compute_it(
    platform, dtype, config, length, form, monkeypatch
):
    device = types.SimpleNamespace(platform=platform)
    monkeypatch.setattr(attention.choice, "current_device", lambda: device)
    assert attention.chosen("auto", config, length, dtype) == form
    assert attention.chosen("xla", config, length, dtype) in ("xla", "blocks")


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(
        attention, "chosen", lambda name, *rest: "xla" if name == "xla" else "splash"
    )
    monkeypatch.setattr(attention, "check", lambda *arguments: None)
    kernel = attention_tpu.attention
    right = lambda config, length, scale, interpret: kernel(config, length, scale, interpret=True)
    monkeypatch.setattr(attention_tpu, "attention", right)
    check = functools.partial(attention_check.self_check, "student", "auto", CAPPED, 256)
    assert check("float32") == "splash"

    def off(*arguments):
        return lambda index, query, *rest: right(*arguments)(index, 1.01 * query, *rest)

    monkeypatch.setattr(attention_tpu, "attention", off)
    with pytest.raises(ConfigError, match=r"student's attention splash .* its values is off by"):
        check("float32")


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
    with pytest.raises(ConfigError, match=r"2 key heads do not divide over mesh.tensor = 3"):
        attention_tpu.check(CONFIG, 256, tensor=3)
