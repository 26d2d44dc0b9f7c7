"""The decoder against transformers and a float64 numpy decoder; packing, remat, casting, meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdistill import models, sharding
from jaxdistill.errors import ModelError
from jaxdistill.models import DecoderConfig, decoder
from tests.models import oracle

TOLERANCE = 2e-5


@pytest.fixture(params=oracle.CASES)
def case(request, tmp_path):
    raw = oracle.CASES[request.param]
    return raw, oracle.write_folder(tmp_path / "model", raw)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    raw = oracle.CASES["qwen3_layer_types"]
    return models.load(oracle.write_folder(tmp_path_factory.mktemp("small"), raw))


def test_logits_equal_the_numpy_decoder(case):
    raw, folder = case
    tokens = oracle.tokens(raw)
    expected = oracle.logits(raw, oracle.tensors(raw), tokens)
    assert oracle.distance(models.load(folder).logits(tokens), expected) <= TOLERANCE


@pytest.mark.torch
def test_logits_equal_transformers(case, transformers_logits):
    raw, folder = case
    tokens = oracle.tokens(raw)
    expected = transformers_logits(folder, tokens)
    assert oracle.distance(models.load(folder).logits(tokens), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama3", "mistral_window", "qwen2_windows", "qwen3"])
def test_packed_documents_equal_their_own_forwards(name, tmp_path):
    raw = oracle.CASES[name]
    model = models.load(oracle.write_folder(tmp_path / "model", raw))
    named = oracle.tensors(raw)
    row = oracle.tokens(raw, rows=1, length=24)
    segments = np.asarray([[1] * 9 + [2] * 11 + [0] * 4])
    packed = model.logits(row, segments)
    for start, stop in ((0, 9), (9, 20)):
        alone = oracle.logits(raw, named, row[:, start:stop])
        assert oracle.distance(packed[:, start:stop], alone) <= TOLERANCE


def test_padding_is_finite_in_value_and_gradient(small):
    tokens = jnp.asarray(oracle.tokens(oracle.CASES["qwen3"]))
    segments = jnp.zeros_like(tokens).at[0, :3].set(1)

    def total(params):
        outputs = decoder.apply(
            small.config, params, tokens, segments * 0, segments, compute_dtype=jnp.float32
        )
        return decoder.logits(outputs).sum()

    value, gradient = jax.value_and_grad(total)(small.params)
    assert jnp.isfinite(value)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def _loss(model, params, **options):
    tokens = jnp.asarray(oracle.tokens(oracle.CASES["qwen3"]))
    outputs = decoder.apply(model.config, params, tokens, **options)
    return jnp.mean(jnp.square(decoder.logits(outputs)))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(small, remat):
    def gradient(how):
        return jax.grad(lambda p: _loss(small, p, compute_dtype="float32", remat=how))(small.params)

    gradients = [gradient("none"), gradient(remat)]
    for plain, again in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(again, plain, rtol=2e-4, atol=1e-4 * np.abs(plain).max())


def test_remat_keeps_less(small):
    def kept(remat):
        loss = lambda p: _loss(small, p, compute_dtype=jnp.float32, remat=remat)
        _, pullback = jax.vjp(loss, small.params)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))

    assert kept("full") < kept("dots") < kept("none")


def test_element_wise_values_of_the_mlp_are_not_kept(small):
    loss = lambda params: _loss(small, params, compute_dtype="float32")
    _, pullback = jax.vjp(loss, small.params)
    wide = small.config.layers * 2 * 24 * small.config.mlp
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == wide]
    assert len(kept) == 2  # gate and up; not their silu, its derivative, or the product


def test_unknown_remat_is_named(small):
    with pytest.raises(ModelError, match="remat: 'some' is not one of none, dots, full"):
        _loss(small, small.params, remat="some")


def test_bfloat16_casts_one_layer_at_a_time_and_keeps_the_masters(small):
    tokens = jnp.asarray(oracle.tokens(oracle.CASES["qwen3"]))
    run = lambda params: decoder.apply(small.config, params, tokens)
    outputs = run(small.params)
    assert outputs.hidden.dtype == jnp.bfloat16 and outputs.head.dtype == jnp.float32
    exact = decoder.logits(
        decoder.apply(small.config, small.params, tokens, compute_dtype="float32")
    )
    assert oracle.distance(decoder.logits(outputs), exact) < 0.05
    up = small.params["layers"]["mlp"]["up"]["kernel"].shape
    program = str(jax.make_jaxpr(run)(small.params))
    stacked, one = (f"bf16[{','.join(map(str, shape))}]" for shape in (up, up[1:]))
    assert one in program
    assert stacked not in program


def test_gradients_reach_the_masters_in_their_dtype(small):
    gradient = jax.grad(lambda p: _loss(small, p))(small.params)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32 and bool(jnp.any(leaf != 0))


@pytest.fixture
def spread(small, mesh8):
    """The small model with its parameters laid out on eight devices."""
    places = sharding.shardings(
        mesh8, decoder.logical_axes(small.config), decoder.shapes(small.config)
    )
    return models.Model(small.config, jax.device_put(small.params, places))


def test_a_mesh_changes_nothing(small, spread):
    tokens = oracle.tokens(oracle.CASES["qwen3"], rows=4)
    segments = np.asarray([[1] * 10 + [2] * 14] * 4)
    kernel = spread.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert oracle.distance(spread.logits(tokens, segments), small.logits(tokens, segments)) < 1e-5


def test_activations_follow_the_table(spread, mesh8):
    tokens = jnp.zeros((4, 8), jnp.int32)
    run = jax.jit(lambda p: decoder.apply(spread.config, p, tokens, compute_dtype="float32").hidden)
    with jax.set_mesh(mesh8):
        program = run.lower(spread.params).as_text()
    for shape, axes in {
        "4x8x40": '[{"data", "fsdp"}, {"context"}, {"tensor"}]',
        "4x8x4x8": '[{"data", "fsdp"}, {"context"}, {"tensor"}, {}]',
        "4x8x32": '[{"data", "fsdp"}, {"context"}, {}]',
    }.items():
        pattern = f"sharding_constraint .*<@mesh, {re.escape(axes)}> : tensor<{shape}xf32>"
        assert re.search(pattern, program), shape


def test_weights_are_cast_before_they_are_gathered(spread, mesh8):
    tokens = jnp.zeros((4, 8), jnp.int32)
    run = jax.jit(lambda p: decoder.apply(spread.config, p, tokens).hidden)
    with jax.set_mesh(mesh8):
        program = run.lower(spread.params).as_text()
    for shape, axes in {
        "32x40": '[{"fsdp"}, {"tensor"}]',
        "40x32": '[{"tensor"}, {"fsdp"}]',
    }.items():
        pattern = f"sharding_constraint .*<@mesh, {re.escape(axes)}> : tensor<{shape}xbf16>"
        assert re.search(pattern, program), shape


def test_the_structure_is_made_once_per_configuration(small):
    structure = decoder.layer_structure(small.config)
    assert decoder.layer_structure(small.config) is structure
    layer = nnx.merge(structure, small.params["layers"])
    pure = nnx.to_pure_dict(nnx.split(layer)[1])
    assert jax.tree.structure(pure) == jax.tree.structure(small.params["layers"])


def test_shapes_axes_and_init_agree(small):
    shapes = decoder.shapes(small.config, jnp.bfloat16)
    made = decoder.init(small.config, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    jax.tree.map(lambda shape, axes: None, shapes, decoder.logical_axes(small.config))
    for shape, axes in zip(
        jax.tree.leaves(shapes),
        jax.tree.leaves(decoder.logical_axes(small.config), is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    ):
        assert len(shape.shape) == len(axes)


def test_random_weights_have_the_stated_spread(small):
    wide = models.DecoderConfig("llama", 500, 64, 128, 2, 4, 2, 16, initializer_range=0.07)
    params = decoder.init(wide, jax.random.key(3))
    up = np.asarray(params["layers"]["mlp"]["up"]["kernel"])
    assert abs(up.std() - 0.07) < 0.002 and abs(up.mean()) < 0.002
    assert not np.array_equal(up, np.asarray(params["layers"]["mlp"]["gate"]["kernel"]))
    assert np.all(np.asarray(params["final_norm"]["scale"]) == 1)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_taps_are_the_outputs_of_their_layers(remat):
    """A tap of layer i equals the last hidden state of a model that ends there, before its norm."""
    config = DecoderConfig(
        family="llama", vocab_size=31, embed=16, mlp=24, layers=4, heads=2, kv_heads=2, head_dim=8
    )
    params = decoder.init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 31)
    run = functools.partial(decoder.apply, tokens=tokens, compute_dtype="float32", remat=remat)
    outputs = run(config, params, taps=(3, 1))
    assert outputs.taps.shape == (2, 2, 6, 16)
    for tap, layers in zip(outputs.taps, (4, 2), strict=True):
        short = params | {"layers": jax.tree.map(lambda x, n=layers: x[:n], params["layers"])}
        ends = run(dataclasses.replace(config, layers=layers), short)
        normed = tap / jnp.sqrt(jnp.mean(tap**2, -1, keepdims=True) + config.norm_eps)
        np.testing.assert_allclose(
            normed * params["final_norm"]["scale"][None, None], ends.hidden, atol=1e-5
        )
    with pytest.raises(ModelError, match="taps"):
        run(config, params, taps=(4,))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_relations_are_what_their_layers_project(remat, qk_norm):
    """Written out from the layers' inputs; taps beside them stay what they are."""
    config = DecoderConfig(
        family="llama", vocab_size=31, embed=16, mlp=24, layers=4, heads=4, kv_heads=2, head_dim=8,
        qk_norm=qk_norm,
    )  # fmt: skip
    params = decoder.init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 31)
    run = functools.partial(decoder.apply, config, tokens=tokens, compute_dtype="float32")
    outputs = run(params, remat=remat, taps=(1,), relations=(3, 0, 2))
    inputs = run(params, taps=(2, 1)).taps
    np.testing.assert_allclose(outputs.taps, inputs[1:], atol=1e-6)
    entering = {3: inputs[0], 0: params["embedding"][tokens], 2: inputs[1]}
    norm = lambda x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_eps)
    for layer, found in zip((3, 0, 2), outputs.relations, strict=True):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        normed = norm(entering[layer]) * own["attention_norm"]["scale"][None, None]
        for name, values in zip(("query", "key", "value"), found, strict=True):
            expected = normed @ own["attention"][name]["kernel"]
            if qk_norm and name != "value":
                scale = own["attention"][f"{name}_norm"]["scale"][None, None, None]
                expected = norm(expected.reshape(2, 6, -1, 8)) * scale
            np.testing.assert_allclose(values, expected.reshape(2, 6, -1), atol=1e-5)
    with pytest.raises(ModelError, match="relations"):
        run(params, relations=(4,))


@pytest.mark.parametrize("what", ["taps", "relations"])
def test_memory_grows_with_taps_and_not_with_depth(what):
    def temporary(layers, taps):
        config = DecoderConfig(
            family="llama", vocab_size=64, embed=64, mlp=64, layers=layers, heads=2, kv_heads=2,
            head_dim=8,
        )  # fmt: skip
        params = decoder.shapes(config)
        tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

        def loss(params, tokens):
            outputs = decoder.apply(
                config, params, tokens, compute_dtype="float32", remat="full", **{what: taps}
            )
            return outputs.hidden.sum() + sum(
                (x**2).sum() for x in jax.tree.leaves((outputs.taps, outputs.relations))
            )

        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = 4 * 64 * 64 * 4
    extra = temporary(16, (3, 9)) - temporary(16, ())
    assert extra < 8 * one, extra / one  # two taps, their gradients and little else; not 16 layers


def test_between_blocks_each_device_of_tensor_keeps_a_part_of_every_row():
    shape = DecoderConfig("llama", 64, embed=64, mlp=128, layers=3, heads=8, kv_heads=8, head_dim=8)
    mesh = sharding.make_mesh(fsdp=1, tensor=8)
    abstract = decoder.shapes(shape)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        sharding.shardings(mesh, decoder.logical_axes(shape), abstract),
    )
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def compiled(rules):
        options = {"compute_dtype": "float32", "remat": "full", "rules": rules}
        total = lambda *given: jnp.sum(decoder.apply(shape, *given, **options).hidden ** 2)
        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(total)).lower(params, tokens).compile()

    parts = compiled(sharding.RULES)
    whole = compiled({**sharding.RULES, "length_between": "context"})
    entering = lambda length: f"f32[3,4,{length},64]"  # what full rematerialization keeps of layers
    assert entering(32) in parts.as_text() and entering(256) not in parts.as_text()
    assert entering(256) in whole.as_text()
    memory = [one.memory_analysis().temp_size_in_bytes for one in (parts, whole)]
    assert memory[0] < 0.9 * memory[1]
