"""Pruned models: masked equals sliced, dead units change nothing, groups stay whole."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.compress import importance, prune, targets
from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.models import architecture, count_parameters
from jaxdistill.sharding import make_mesh
from tests.also import also
from tests.compress.conftest import FAMILIES
from tests.models import oracle


def measured(model, batches):
    return importance.measure(model.config, model.params, batches, compute_dtype="float32")


def sizes_for(config):
    """About half of everything, and fewer heads in fewer groups."""
    per_group = config.heads // config.kv_heads
    groups = max(config.kv_heads - 1, 1)
    heads = groups * max(per_group - 1, 1)
    return {"mlp": 24, "kv_heads": groups, "heads": heads, "embed": 20, "layers": 2}


def masked(raw, named, kept):
    """The large model in Hugging Face's tensors with everything not kept set to zero.

    Neurons and heads are silenced where they enter `down` and `out`; channels wherever they are
    written (embeddings, outputs of both blocks) and read again. Layers that go are taken out.
    """
    size = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    off = np.setdiff1d(np.arange(raw["hidden_size"]), kept.channels)
    new = {k: v.copy() for k, v in named.items() if ".layers." not in k}
    new["model.embed_tokens.weight"][:, off] = 0
    for place, layer in enumerate(kept.layers):
        for name, value in named.items():
            at = f"model.layers.{layer}."
            if name.startswith(at):
                new[f"model.layers.{place}." + name.removeprefix(at)] = value.copy()
        at = f"model.layers.{place}."
        dead = np.setdiff1d(np.arange(raw["intermediate_size"]), kept.neurons[place])
        new[at + "mlp.down_proj.weight"][:, dead] = 0
        heads = np.setdiff1d(np.arange(raw["num_attention_heads"]), kept.heads[place])
        for head in heads:
            new[at + "self_attn.o_proj.weight"][:, head * size : (head + 1) * size] = 0
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            new[at + name + ".weight"][off] = 0
            if at + name + ".bias" in new:
                new[at + name + ".bias"][off] = 0
    return raw | {"num_hidden_layers": len(kept.layers)} | _layer_types(raw, kept), new


def _layer_types(raw, kept):
    if not raw.get("use_sliding_window"):
        return {}
    windows = oracle._windows(raw)
    kinds = ["full_attention" if windows[i] is None else "sliding_attention" for i in kept.layers]
    return {"layer_types": kinds}


@pytest.mark.parametrize("case", [*FAMILIES[:2], *also(*FAMILIES[2:])])
def test_masked_equals_sliced(case, load, batches, tmp_path, one_device):
    """The oracle runs the large model with zeros; ours runs the small one."""
    model, named = load(case)
    raw = oracle.CASES[case]
    scores = measured(model, batches(case))
    small = targets.resize(model.config, sizes_for(model.config))
    kept = prune.choose(model.config, small, scores, layers=[0, 2])
    # Where the channels left out are zero, all energy lies in those that stay.
    share = np.zeros((3, model.config.embed))
    share[:, kept.channels] = model.config.embed / len(kept.channels)
    shares = {"layers.attention_norm": share, "layers.mlp_norm": share, "final_norm": share[0]}
    config, params = prune.cut(model.config, model.params, kept, shares=shares)
    tokens = oracle.tokens(raw)
    ours = models.Model(config, params).logits(tokens)
    want = oracle.logits(*masked(raw, named, kept), tokens)
    assert oracle.distance(ours, want) < 3e-5
    # windows stay with their layers, everything else is as the sizes say
    assert dataclasses.replace(config, windows=None) == dataclasses.replace(small, windows=None)
    folder = models.save(models.Model(config, params), tmp_path / "student")
    again = models.load(folder, tokenizer=False, mesh=one_device)
    np.testing.assert_array_equal(again.params["embedding"], params["embedding"])
    assert count_parameters(again.config) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.torch
@pytest.mark.parametrize("case", ["llama3", "smollm2", "mistral_window", "qwen2_windows", "qwen3"])
def test_transformers_opens_the_student(case, load, batches, tmp_path, transformers_logits):
    model, _ = load(case)
    small = targets.resize(model.config, sizes_for(model.config))
    kept = prune.choose(model.config, small, measured(model, batches(case)))
    config, params = prune.cut(model.config, model.params, kept)
    student = models.Model(config, params)
    tokens = oracle.tokens(oracle.CASES[case])
    folder = models.save(student, tmp_path / "student")
    assert oracle.distance(student.logits(tokens), transformers_logits(folder, tokens)) < 3e-5


def kill_a_group(raw, named):
    """One group of heads of every layer whose values are always zero; which one, per layer."""
    size = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    groups = [layer % raw["num_key_value_heads"] for layer in range(raw["num_hidden_layers"])]
    for layer, group in enumerate(groups):
        for part in ("weight", "bias"):
            name = f"model.layers.{layer}.self_attn.v_proj.{part}"
            if name in named:
                named[name][group * size : (group + 1) * size] = 0
    return groups


@pytest.mark.parametrize("case", FAMILIES)
def test_dead_units_prune_to_equal_logits(case, load, batches, one_device, tmp_path):
    """Neurons, channels and a group of heads are dead: the scores must find them."""
    raw = oracle.CASES[case]
    model, named = load(case)
    rng = np.random.default_rng(5)
    config = model.config
    dead = {k: v.copy() for k, v in named.items()}
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        neurons = rng.permutation(config.mlp)[:16]
        dead[at + "mlp.up_proj.weight"][neurons] = 0
        if at + "mlp.up_proj.bias" in dead:
            dead[at + "mlp.up_proj.bias"][neurons] = 0
    groups = kill_a_group(raw, dead)
    channels = rng.permutation(config.embed)[:8]
    for name in dead:
        if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            dead[name][channels] = 0
    dead["model.embed_tokens.weight"][:, channels] = 0
    folder = oracle.write_folder(tmp_path / "dead", raw, dead)
    model = models.load(folder, mesh=one_device, dtype="float32", tokenizer=False)
    scores = measured(model, batches(case))
    sizes = {"mlp": config.mlp - 16, "embed": config.embed - 8, "kv_heads": config.kv_heads - 1}
    kept = prune.choose(config, targets.resize(config, sizes), scores)
    assert all(group not in own for group, own in zip(groups, kept.groups, strict=True))
    assert not set(kept.channels) & set(channels)
    config, params = prune.cut(config, model.params, kept, shares=scores.shares)
    tokens = oracle.tokens(raw)
    assert (
        oracle.distance(
            models.Model(config, params).logits(tokens), oracle.logits(raw, dead, tokens)
        )
        < 3e-5
    )


def shaped(layers=2, embed=8, mlp=8, heads=6, kv_heads=3, head_dim=4):
    return models.DecoderConfig(
        "llama",
        vocab_size=11,
        embed=embed,
        mlp=mlp,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def scores_of(config, heads):
    return importance.ImportanceScores(
        neurons=np.ones((config.layers, config.mlp)),
        heads=np.asarray(heads, float),
        channels=np.ones(config.embed),
        shares={},
        cosines=np.eye(config.layers + 1),
        facts={"shape": importance.shape_of(config)},
    )


def test_groups_stay_whole():
    config = shaped()
    scores = scores_of(config, [[9, 9, 1, 0, 2, 3], [0, 1, 5, 6, 6, 5]])
    kept = prune.choose(config, targets.resize(config, {"kv_heads": 2}), scores)
    assert kept.groups.tolist() == [[0, 2], [1, 2]]
    assert kept.heads.tolist() == [[0, 1, 4, 5], [2, 3, 4, 5]]
    # Heads compete within their group only: 2 loses against 3 though group 1 is the weakest.
    kept = prune.choose(config, targets.resize(config, {"heads": 3}), scores)
    assert kept.groups.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert kept.heads.tolist() == [[0, 2, 5], [1, 3, 4]]


def test_keys_and_queries_of_a_group_move_together(load, batches):
    model, named = load("qwen3")
    config = model.config
    small = targets.resize(config, {"kv_heads": 1})
    kept = prune.choose(config, small, measured(model, batches("qwen3")))
    _, params = prune.cut(config, model.params, kept)
    group, size = int(kept.groups[1, 0]), config.head_dim
    theirs = named["model.layers.1.self_attn.k_proj.weight"].T
    ours = params["layers"]["attention"]["key"]["kernel"][1]
    np.testing.assert_array_equal(ours, theirs[:, group * size : (group + 1) * size])


@pytest.mark.parametrize("case", ["llama_biases", "qwen2", "qwen3"])
def test_the_number_of_parameters_is_the_formulas(case, load, batches):
    """Counted by hand from the shape, family by family."""
    model, _ = load(case)
    small = targets.resize(model.config, sizes_for(model.config))
    scores = measured(model, batches(case))
    config, params = prune.cut(
        model.config, model.params, prune.choose(model.config, small, scores)
    )
    D, F, L, V = 20, 24, 2, 61
    q, k = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = D * (q + 2 * k) + q * D + 3 * D * F + 2 * D
    layer += {"llama_biases": q + 2 * k + D + 2 * F + D, "qwen2": q + 2 * k}.get(case, 0)
    layer += 2 * config.head_dim if case == "qwen3" else 0
    total = L * layer + D + V * D * (1 if config.tied_head else 2)
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == total == count_parameters(config)


def test_pruning_on_eight_devices_gives_the_same_model(load, batches):
    model, _ = load("llama3")
    scores = measured(model, batches("llama3"))
    small = targets.resize(model.config, {"mlp": 24, "embed": 20, "layers": 2})
    kept = prune.choose(model.config, small, scores)
    _, alone = prune.cut(model.config, model.params, kept, shares=scores.shares)
    spread, _ = load("llama3", make_mesh(data=2, fsdp=2, tensor=2))
    _, params = prune.cut(spread.config, spread.params, kept, shares=scores.shares)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size < up.size


def test_scores_of_another_model_are_refused():
    config = shaped()
    with pytest.raises(ConfigError, match="another model .mlp 8 for 9"):
        prune.choose(shaped(mlp=9), shaped(mlp=4), scores_of(config, np.ones((2, 6))))


def test_an_axis_that_is_not_understood_is_refused(load, monkeypatch):
    model, _ = load("smollm2")
    table = architecture.weights(model.config)
    row = table["layers"]["mlp"]["up"]["kernel"]
    table["layers"]["mlp"]["up"]["kernel"] = row._replace(axes=("layers", "embed", "planes"))
    monkeypatch.setattr(prune, "weights", lambda config: table)
    with pytest.raises(ModelError, match="does not understand the axis 'planes'"):
        prune.keep_layers(model.config, model.params, [0])
