"""Adapters against merged kernels, against the package peft, and where they cannot be."""

import dataclasses
import importlib.util
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models, sharding
from jaxdistill.errors import ConfigError, ModelError, StorageError
from jaxdistill.formats import peft
from jaxdistill.models import decoder, lora
from jaxdistill.models.lora import Lora
from tests.also import also
from tests.models import oracle, variants

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs the package peft"
)


def _llama(folder):
    return models.load(oracle.write_folder(folder / "model", oracle.CASES["llama3"]))


def _trained(config, adapters, seed=3):
    """Adapters that change something."""
    made = lora.init(config, adapters, jax.random.key(seed))
    key = jax.random.key(seed + 1)
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(key, leaf.shape), made)


def _logits(config, params, tokens):
    outputs = decoder.apply(config, params, jnp.asarray(tokens), compute_dtype="float32")
    return decoder.logits(outputs)


def test_new_adapters_change_nothing(tmp_path):
    model, tokens = _llama(tmp_path), variants.tokens()
    adapters = Lora(4, 8.0)
    params = lora.attach(
        model.params, lora.init(model.config, adapters, jax.random.key(0)), adapters
    )
    np.testing.assert_array_equal(
        _logits(model.config, params, tokens), _logits(model.config, model.params, tokens)
    )


@pytest.mark.parametrize("name", ["mixtral", *also("gemma2", "pythia")])
def test_beside_is_the_same_as_merged_by_hand(name):
    model, tokens, adapters = variants.model(name), variants.tokens(), Lora(3, 5.0, ("value", "up"))
    trained = _trained(model.config, adapters)
    found = _logits(model.config, lora.attach(model.params, trained, adapters), tokens)
    by_hand = jax.tree.map(np.array, model.params)
    for block, target in (("attention", "value"), ("mlp", "up")):
        pair = jax.tree.map(np.asarray, trained["layers"][block][target]["kernel"])
        by_hand["layers"][block][target]["kernel"] += 5.0 / 3 * pair["down"] @ pair["up"]
    expected = _logits(model.config, jax.tree.map(jnp.asarray, by_hand), tokens)
    assert oracle.distance(found, expected) <= 1e-5
    assert oracle.distance(expected, _logits(model.config, model.params, tokens)) > 1e-2
    merged = lora.merge(model.params, trained, adapters)
    assert oracle.distance(_logits(model.config, merged, tokens), expected) <= 1e-5
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)


def test_gradients_reach_adapters_alone_and_equal_the_merged_kernels(tmp_path):
    """d loss / d up = scale down^T (d loss / d kernel)."""
    model, tokens, adapters = _llama(tmp_path), variants.tokens(), Lora(3, 6.0, ("key",))
    trained = _trained(model.config, adapters)
    loss = lambda params: jnp.mean(jnp.square(_logits(model.config, params, tokens)))
    beside = lambda own: loss(lora.attach(model.params, own, adapters))
    found = jax.grad(beside)(trained)["layers"]["attention"]["key"]["kernel"]
    merged = lora.merge(model.params, trained, adapters)
    whole = jax.grad(loss)(merged)["layers"]["attention"]["key"]["kernel"]
    pair = trained["layers"]["attention"]["key"]["kernel"]
    expected = {
        "up": 2.0 * jnp.swapaxes(pair["down"], 1, 2) @ whole,
        "down": 2.0 * whole @ jnp.swapaxes(pair["up"], 1, 2),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5 * float(jnp.abs(value).max()))


def test_a_mesh_changes_nothing(mesh8):
    model, adapters = variants.model("olmo2"), Lora(4, 4.0)
    trained = _trained(model.config, adapters)
    axes, shapes = lora.logical_axes(model.config, adapters), lora.shapes(model.config, adapters)
    beside = jax.device_put(trained, sharding.shardings(mesh8, axes, shapes))
    assert beside["layers"]["mlp"]["up"]["kernel"]["up"].sharding.spec == jax.P(
        None, None, "tensor"
    )
    places = sharding.shardings(
        mesh8, decoder.logical_axes(model.config), decoder.shapes(model.config)
    )
    spread = jax.device_put(model.params, places)
    tokens = variants.tokens(rows=4)
    with jax.set_mesh(mesh8):
        found = jax.jit(lambda p, a: _logits(model.config, lora.attach(p, a, adapters), tokens))(
            spread, beside
        )
    expected = _logits(model.config, lora.attach(model.params, trained, adapters), tokens)
    assert oracle.distance(found, expected) < 1e-5


def test_generation_sees_adapters_that_change_beside_one_model(tmp_path):
    model, adapters = _llama(tmp_path), Lora(4, 40.0)
    rows = []
    for seed in (3, 9):
        trained = _trained(model.config, adapters, seed)
        beside = dataclasses.replace(model, params=lora.attach(model.params, trained, adapters))
        merged = dataclasses.replace(model, params=lora.merge(model.params, trained, adapters))
        rows.append(beside.generate([[5, 9, 11]], max_new_tokens=8))
        assert rows[-1] == merged.generate([[5, 9, 11]], max_new_tokens=8)
    assert rows[0] != rows[1]


PEFT = {
    "llama3": Lora(4, 6.0),
    "gpt2": Lora(3, 7.0, ("out", "down")),
    "pythia": Lora(2, 5.0, ("out", "up", "down")),
    "mixtral": Lora(4, 4.0, ("query", "key", "value", "out")),
}


@pytest.mark.torch
@needs_peft
@pytest.mark.parametrize("name", PEFT)
def test_peft_opens_what_is_written(name, tmp_path, transformers_model):
    import torch
    from peft import PeftModel

    model = _llama(tmp_path) if name == "llama3" else variants.model(name)
    models.save(model, tmp_path / "base")
    trained, tokens = _trained(model.config, PEFT[name]), variants.tokens()
    folder = peft.save(model.config, trained, PEFT[name], tmp_path / "adapter", "there")
    base = transformers_model(tmp_path / "base")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's and transformers' own deprecations
        theirs = PeftModel.from_pretrained(base, str(folder)).eval()
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = _logits(model.config, lora.attach(model.params, trained, PEFT[name]), tokens)
    assert oracle.distance(ours, expected) <= 2e-5
    assert oracle.distance(_logits(model.config, model.params, tokens), expected) > 1e-2


def test_dropout_leaves_out_a_share_of_what_the_adapter_reads():
    """With identities for down and up, what is added is what the adapter read."""
    eye, x = jnp.eye(64), jnp.asarray(np.random.default_rng(0).normal(size=(500, 64)) + 9)
    kernel = lora.LoraKernel(jnp.zeros((64, 64)), eye, eye, 1.0, 0.3, jnp.uint32([5, 6]))
    read = np.asarray(kernel.dot(x))
    np.testing.assert_allclose(read[read != 0], np.asarray(x / 0.7)[read != 0], rtol=1e-5)
    spread = np.sqrt(0.3 * 0.7 / read.size)
    assert abs((read == 0).mean() - 0.3) < 5 * spread
    again = lora.LoraKernel(jnp.zeros((64, 64)), eye, eye, 1.0, 0.3, jnp.uint32([5, 6]))
    np.testing.assert_array_equal(again.dot(x), read)
    half = kernel.astype("bfloat16").dot(x.astype("bfloat16"))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(half) == 0, read == 0)
    plain = lora.LoraKernel(jnp.eye(64), eye, 0 * eye, 1.0, 0.9, jnp.uint32([5, 6]))
    np.testing.assert_allclose(plain.dot(x), x, rtol=1e-6)  # the kernel reads all


def test_every_kernel_of_every_layer_has_a_key_of_its_own():
    config, adapters = variants.model("olmo2").config, Lora(2, 2.0, dropout=0.5)
    made = lora.init(config, adapters, jax.random.key(0))
    params = variants.model("olmo2").params
    kernels = lambda key: [
        leaf
        for leaf in jax.tree.leaves(
            lora.attach(params, made, adapters, key),
            is_leaf=lambda leaf: isinstance(leaf, lora.LoraKernel),
        )
        if isinstance(leaf, lora.LoraKernel)
    ]
    keys = np.concatenate([leaf.key for leaf in kernels(jax.random.key(1))])
    assert len(keys) == 7 * config.layers and len(np.unique(keys, axis=0)) == len(keys)
    assert all(leaf.key is None for leaf in kernels(None))


def test_a_runs_own_description_is_read_back(tmp_path):
    config, file = variants.model("olmo2").config, tmp_path / lora.FILE
    adapters = Lora(4, 6.5, ("query", "down"), 0.25)
    described = lora.described(adapters, "there")
    file.write_text(json.dumps(described))
    assert lora.read(file, config) == (adapters, "there")
    del described["dropout"]  # as earlier runs wrote it
    file.write_text(json.dumps(described))
    assert lora.read(file, config) == (dataclasses.replace(adapters, dropout=0.0), "there")
    for damaged in ('{"rank": 4}', '{"rank": 0, "alpha": 1, "targets": ["up"]}', "[]"):
        file.write_text(damaged)
        with pytest.raises(ModelError, match=lora.FILE):
            lora.read(file, config)


def test_what_cannot_be_is_named(tmp_path):
    gpt2, phi3 = variants.model("gpt2").config, variants.model("phi3").config
    with pytest.raises(ConfigError, match="targets: gate: a gpt2 model has no such projection; it"):
        lora.rows(gpt2, Lora(2, 2.0))
    mixtral = variants.model("mixtral").config
    with pytest.raises(ConfigError, match=r"dropout = 0.1: gate belongs to experts, whose adapter"):
        lora.rows(mixtral, Lora(2, 2.0, dropout=0.1))
    adapters = Lora(2, 2.0, ("query",))
    made = lora.init(phi3, adapters, jax.random.key(0))
    message = "phi3: layers.attention.query.kernel is part of a tensor"
    with pytest.raises(ModelError, match=re.escape(message)):
        peft.save(phi3, made, adapters, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    olmo = variants.model("olmo2").config
    with pytest.raises(StorageError, match="exists and is not empty"):
        made = lora.init(olmo, adapters, jax.random.key(0))
        peft.save(olmo, made, adapters, tmp_path / "full")
