"""Families beyond Llama's form, experts among them: measured, cut, opened by transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.compress import importance, prune, targets
from jaxdistill.errors import ConfigError
from jaxdistill.models import count_parameters
from jaxdistill.models.architecture import flat_weights, nest, weights
from jaxdistill.sharding import make_mesh
from jaxdistill.train.step import place
from tests.also import also
from tests.compress.conftest import batch_of
from tests.compress.test_importance import close
from tests.models import oracle, variants

EXPERTS = ("mixtral", "qwen3_moe", "qwen3_moe_unnormalised")
LAYERS = [0, 2]


def batches():
    whole = batch_of(variants.tokens(4, 12, seed=3))
    short = batch_of(variants.tokens(4, 12, seed=4), [12, 7, 3, 0])
    return [jax.tree.map(jnp.asarray, batch) for batch in (whole, short)]


def measured(model):
    return importance.measure(model.config, model.params, batches(), compute_dtype="float32")


def flat(params, prefix=""):
    found = {}
    for name, value in params.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: np.array(value)}
    return found


def with_params(model, named):
    return dataclasses.replace(model, params=jax.tree.map(jnp.asarray, nest(named)))


def sizes_for(config):
    """Less of everything that can be cut out of this family."""
    sizes = {"layers": len(LAYERS), "mlp": 16}
    if config.norm == "layer" or (config.rope and config.rope.kind == "longrope"):
        return sizes
    sizes |= {"embed": 20, "kv_heads": 1, "heads": 1}
    return sizes | ({} if config.experts is None else {"experts": config.experts.count - 1})


def at_random(config):
    """Scores drawn at random; channel 0 stays."""
    draw = np.random.default_rng(7).uniform
    count = () if config.experts is None else (config.experts.count,)
    channels = draw(1, 2, config.embed)
    channels[0] = 9
    return importance.ImportanceScores(
        neurons=draw(1, 2, (config.layers, *count, config.mlp)),
        heads=draw(1, 2, (config.layers, config.heads)),
        channels=channels,
        shares={},
        cosines=np.eye(config.layers + 1),
        experts=draw(1, 2, (config.layers, *count)) if count else None,
        facts={"shape": importance.shape_of(config)},
    )


def steady(model):
    """The model with a channel 0 that is above 0 in every token, whatever the layers do.

    A router can then leave an expert out for every token: its weight for this channel.
    """
    named = flat(model.params)
    named["embedding"][:, 0] = 4.0
    named["layers.attention.out.kernel"][..., 0] = 0
    named["layers.mlp.down.kernel"][..., 0] = 0
    named["layers.mlp_norm.scale"][:, 0] = 1.0
    return with_params(model, named)


def masked(model, kept):
    """The kept layers with every other unit silenced: its weights zero, an expert's routes shut."""
    config, layers = model.config, kept.layers
    inside = np.arange(config.head_dim)
    blocks = lambda index: (index[..., None] * config.head_dim + inside).reshape(len(index), -1)
    stay = {"heads": blocks(kept.heads), "kv_heads": blocks(kept.groups), "mlp": kept.neurons}
    named = {}
    for name, row in flat_weights(weights(config)).items():
        leaf = flat(model.params)[name]
        leaf = leaf[layers] if row.axes[0] == "layers" else leaf
        for dim, axis in enumerate(row.axes):
            if axis == "embed":
                off = np.setdiff1d(np.arange(config.embed), kept.channels)
                leaf[(slice(None),) * dim + (off,)] = 0
            for layer in range(len(layers)) if axis in stay else ():
                off = np.setdiff1d(np.arange(row.shape[dim]), stay[axis][layer])
                leaf[(layer, *(slice(None),) * (dim - 1), off)] = 0
        if name == "layers.mlp.down.kernel" and config.experts:
            for place in np.ndindex(*kept.experts.shape):
                off = np.setdiff1d(np.arange(config.mlp), kept.neurons[place])
                leaf[place[0], kept.experts[place], off] = 0
        if name == "layers.mlp.router.kernel":
            for layer in range(len(layers)):
                off = np.setdiff1d(np.arange(config.experts.count), kept.experts[layer])
                leaf[layer, 0, off] = -1e6
        named[name] = leaf
    own = {
        name: values and tuple(values[layer] for layer in layers)
        for name, values in (("windows", config.windows), ("turned", config.turned))
    }
    if own["turned"] and all(own["turned"]):
        own["turned"] = None  # as a configuration says it
    small = dataclasses.replace(config, layers=len(layers), **own)
    return with_params(dataclasses.replace(model, config=small), named)


FIRST = ("gemma3", "gpt2", "phi3_longrope", "qwen3_moe", "smollm3")


@pytest.fixture(scope="module", params=[*FIRST, *also(*sorted(variants.CASES.keys() - FIRST))])
def pair(request):
    """A model of which units are silenced, and the model that lacks them."""
    model = variants.model(request.param)
    # With fewer units another epsilon would be the same: here next to none.
    config = dataclasses.replace(model.config, norm_eps=1e-12)
    model = dataclasses.replace(model, config=config)
    model = steady(model) if config.experts else model
    small = targets.resize(config, sizes_for(config))
    kept = prune.choose(config, small, at_random(config), layers=LAYERS)
    silent = masked(model, kept)
    shares = dict(measured(silent).shares)
    for name, share in shares.items():  # of the silent model's layers: put where they were
        if share.ndim == 2:
            shares[name] = np.zeros((config.layers, share.shape[1]))
            shares[name][LAYERS] = share
    sliced, params = prune.cut(config, model.params, kept, shares=shares)
    # Which layers stay decides what each has of its own; `small` has the first ones'.
    of_layers = {"windows": None, "turned": None}
    assert dataclasses.replace(sliced, **of_layers) == dataclasses.replace(small, **of_layers)
    return silent, models.Model(sliced, params)


def test_silenced_equals_sliced(pair):
    silent, sliced = pair
    tokens = variants.tokens()
    assert oracle.distance(sliced.logits(tokens), silent.logits(tokens)) < 3e-5
    assert count_parameters(sliced.config) == sum(map(np.size, jax.tree.leaves(sliced.params)))


@pytest.mark.torch
def test_transformers_opens_the_student_and_finds_the_same(pair, tmp_path, transformers_logits):
    """Both folders are run by transformers: ours takes no part in what is compared."""
    tokens = variants.tokens()
    silent, sliced = (
        transformers_logits(models.save(model, tmp_path / name), tokens)
        for model, name in zip(pair, ("silent", "sliced"), strict=True)
    )
    assert oracle.distance(sliced, silent) < 3e-5
    assert oracle.distance(pair[1].logits(tokens), sliced) < 3e-5


@pytest.mark.parametrize("name", EXPERTS)
def test_scores_of_experts_equal_a_loop_over_tokens(name):
    """One layer whose attention adds nothing: what its experts read is known in closed form."""
    model = variants.model(name)
    config = dataclasses.replace(model.config, layers=1, windows=None)
    named = {k: v[:1] if k.startswith("layers.") else v for k, v in flat(model.params).items()}
    named["layers.attention.out.kernel"] *= 0
    model = with_params(dataclasses.replace(model, config=config), named)
    found = measured(model)
    part = {k.removeprefix("layers.mlp."): v[0].astype(np.float64) for k, v in named.items()
            if k.startswith("layers.mlp.")}  # fmt: skip
    scale = named["layers.mlp_norm.scale"][0].astype(np.float64)
    count = config.experts.count
    given, neurons = [[] for _ in range(count)], np.zeros((count, config.mlp))
    read, passed = np.zeros((count, config.embed)), np.zeros((count, config.mlp))
    for batch in batches():
        for row, real in zip(*map(np.asarray, (batch.tokens, batch.segment_ids)), strict=True):
            sizes = np.zeros((count, config.mlp))
            for token in row[real > 0]:
                x = named["embedding"][token].astype(np.float64)
                y = x / np.sqrt((x**2).mean() + config.norm_eps) * scale
                odds = np.exp(y @ part["router.kernel"])
                best = np.argsort(-odds)[: config.experts.chosen]
                whole = odds[best].sum() if config.experts.normalised else odds.sum()
                for one in best:
                    gate = y @ part["gate.kernel"][one]
                    hidden = gate / (1 + np.exp(-gate)) * (y @ part["up.kernel"][one])
                    gives = hidden @ part["down.kernel"][one]
                    given[one].append(odds[one] / whole * np.sqrt((gives**2).sum()))
                    sizes[one] += np.abs(hidden)
                    read[one] += y**2
                    passed[one] += hidden**2
            neurons += (sizes / max((real > 0).sum(), 1)) ** 2
    want = [np.mean(each) if each else 0.0 for each in given]
    np.testing.assert_allclose(found.experts[0], want, rtol=2e-5)
    np.testing.assert_allclose(found.neurons[0], np.sqrt(neurons), rtol=2e-5)
    np.testing.assert_allclose(found.inputs["mlp"][0], np.sqrt(read), rtol=2e-5)
    np.testing.assert_allclose(found.inputs["down"][0], np.sqrt(passed), rtol=2e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_no_token_passes_go_first_and_change_nothing(name):
    model = steady(variants.model(name))
    count = model.config.experts.count
    idle = [layer % count for layer in range(model.config.layers)]
    named = flat(model.params)
    for layer, one in enumerate(idle):
        named["layers.mlp.router.kernel"][layer, 0, one] = -1e6
    model = with_params(model, named)
    scores = measured(model)
    small = targets.resize(model.config, {"experts": count - 1})
    kept = prune.choose(model.config, small, scores)
    for layer, one in enumerate(idle):
        gone = set(range(count)) - set(kept.experts[layer].tolist())
        assert scores.experts[layer, [one, *gone]].tolist() == [0, 0]
    config, params = prune.cut(model.config, model.params, kept, shares=scores.shares)
    tokens = np.asarray(batches()[0].tokens)
    assert config.experts.count == count - 1
    assert oracle.distance(models.Model(config, params).logits(tokens), model.logits(tokens)) < 1e-5


@pytest.mark.parametrize("name", ["qwen3_moe", "olmo2"])
def test_scores_and_students_are_the_same_on_eight_devices(name, mesh8):
    model = variants.model(name)
    alone = measured(model)
    mesh = make_mesh(data=1, fsdp=2, tensor=2, context=2)
    spread = models.random(model.config, mesh=mesh)
    params = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), model.params, spread.params)
    with jax.set_mesh(mesh):
        found = importance.measure(
            model.config, params, [place(b, mesh) for b in batches()], compute_dtype="float32"
        )
    close(found, alone)
    small = targets.resize(model.config, sizes_for(model.config))
    kept = prune.choose(model.config, small, alone)
    _, ours = prune.cut(model.config, params, kept, shares=alone.shares)
    _, theirs = prune.cut(model.config, model.params, kept, shares=alone.shares)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "pythia"])
def test_layers_alone_are_kept_as_they_are(name):
    model = variants.model(name)
    config, params = prune.keep_layers(model.config, model.params, LAYERS)
    ours = flat(params)
    for key, leaf in flat(model.params).items():
        want = leaf[LAYERS] if key.startswith("layers.") else leaf
        np.testing.assert_array_equal(ours[key], want, err_msg=key)
    assert config.experts == model.config.experts


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("gpt2", {"embed": 24}, "gpt2 models have LayerNorms"),
        (
            "phi3_longrope",
            {"embed": 24},
            "longrope's factors by hidden_size / heads: heads . 8 must stay",
        ),
        ("pythia", {"heads": 2, "kv_heads": 2}, "has no head_dim: heads . 8 must stay embed .32."),
        ("gemma2", {"experts": 2}, "gemma2 models have no routed experts"),
        ("qwen3_moe", {"experts": 2}, "a token passes 3 of them: give 3 to 8"),
        ("mixtral", {"experts": 5}, "prune.experts = 5: the model has 4"),
    ],
)
def test_what_a_family_cannot_lose_is_refused(name, sizes, words):
    with pytest.raises(ConfigError, match=words):
        targets.resize(variants.model(name).config, sizes)


def test_a_budget_of_experts():
    config = variants.model("qwen3_moe").config
    small = targets.fit(config, parameters="70%", axes=("experts",))
    assert small == dataclasses.replace(config, experts=small.experts)
    larger = dataclasses.replace(small.experts, count=small.experts.count + 1)
    larger = dataclasses.replace(config, experts=larger)
    limit = 0.7 * count_parameters(config)
    assert count_parameters(small) <= limit < count_parameters(larger)
    assert targets.sizes_of(small)["experts"] == small.experts.count
    with pytest.raises(ConfigError, match="the smallest such model has"):
        targets.fit(config, parameters="20%", axes=("experts",))
