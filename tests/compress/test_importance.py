"""Importance against float64 NumPy written from the paper, on one device and on eight."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxdistill.compress import activations, importance, sparsify
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.models import decoder
from jaxdistill.sharding import make_mesh
from tests.compress.conftest import FAMILIES
from tests.models import oracle

CASE = "smollm2"


def measure(model, batches):
    return importance.measure(model.config, model.params, batches, compute_dtype="float32")


def layer_values(raw, named, row):
    """What the paper's scores are made of, for one row, in float64: [tokens, size] per layer.

    The hidden states come from the oracle model itself, cut off after each layer.
    """
    named = {name: value.astype(np.float64) for name, value in named.items()}
    eps, size = raw["rms_norm_eps"], raw["hidden_size"] // raw["num_attention_heads"]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * named[name]

    steps, _ = oracle._frequencies(raw, size)
    angles = np.arange(len(row))[:, None] * np.asarray(steps)

    def turn(x):
        first, second = x[:, : size // 2], x[:, size // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], 1)

    x = named["model.embed_tokens.weight"][row]
    heads, groups = raw["num_attention_heads"], raw["num_key_value_heads"]
    found = []
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        weight = lambda name, at=at: named[at + name + ".weight"]
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (y @ weight(f"self_attn.{one}_proj").T for one in "qkv")
        mixed = np.zeros((len(row), heads * size))
        for head in range(heads):
            group = head // (heads // groups)
            of = lambda a, n: a[:, n * size : (n + 1) * size]
            scores = turn(of(q, head)) @ turn(of(k, group)).T / np.sqrt(size)
            scores[np.triu_indices(len(row), 1)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            mixed[:, head * size : (head + 1) * size] = share @ of(v, group)
        between = x + mixed @ weight("self_attn.o_proj").T
        z = norm(between, at + "post_attention_layernorm.weight")
        gate = z @ weight("mlp.gate_proj").T
        neurons = gate / (1 + np.exp(-gate)) * (z @ weight("mlp.up_proj").T)
        after = between + neurons @ weight("mlp.down_proj").T
        found.append({"x": x, "y": y, "z": z, "mixed": mixed, "neurons": neurons})
        found[-1] |= {"between": between, "after": after}
        x = after
    return found


@pytest.fixture(scope="module")
def rows(batches):
    """The real tokens of every row that has some."""
    return [
        np.asarray(batch.tokens[i])[: int(n)]
        for batch in batches(CASE)
        for i, n in enumerate(np.asarray(batch.segment_ids).sum(1))
        if n
    ]


def test_scores_equal_the_papers_formulas_in_float64(load, batches, rows):
    model, named = load(CASE)
    raw = oracle.CASES[CASE]
    found = measure(model, batches(CASE))
    values = [layer_values(raw, named, row) for row in rows]

    def l2(name, layer):
        return np.sqrt(sum(np.abs(v[layer][name]).mean(0) ** 2 for v in values))

    channels = 0.0
    for layer in range(raw["num_hidden_layers"]):
        np.testing.assert_allclose(found.neurons[layer], l2("neurons", layer), rtol=2e-5)
        per_channel = l2("mixed", layer).reshape(raw["num_attention_heads"], -1)
        heads = np.sqrt((per_channel**2).sum(1))
        np.testing.assert_allclose(found.heads[layer], heads, rtol=2e-5)
        channels = channels + l2("y", layer) + l2("z", layer)
    np.testing.assert_allclose(found.channels, channels, rtol=2e-5)


def test_norms_of_inputs_are_those_over_all_tokens_in_float64(load, batches, rows, tmp_path):
    """What Wanda weighs a weight with; a file keeps them."""
    model, named = load(CASE)
    raw = oracle.CASES[CASE]
    found = importance.load(importance.save(measure(model, batches(CASE)), tmp_path / "scores"))
    values = [layer_values(raw, named, row) for row in rows]
    reads = {"attention": "y", "out": "mixed", "mlp": "z", "down": "neurons"}
    for name, seen in reads.items():
        for layer in range(raw["num_hidden_layers"]):
            tokens = np.concatenate([v[layer][seen] for v in values])
            expected = np.sqrt((tokens**2).sum(0))
            np.testing.assert_allclose(found.inputs[name][layer], expected, rtol=2e-5)
    norms = sparsify.input_norms(found, model.config)
    np.testing.assert_array_equal(
        norms["layers/mlp/gate/kernel"], found.inputs["mlp"].astype(np.float32)
    )
    old = dataclasses.replace(found, inputs={})
    with pytest.raises(ConfigError, match="no norms of inputs"):
        sparsify.input_norms(old, model.config)


def test_cosines_and_shares_equal_float64(load, batches, rows):
    model, named = load(CASE)
    found = measure(model, batches(CASE))
    values = [layer_values(oracle.CASES[CASE], named, row) for row in rows]
    tokens = sum(map(len, rows))
    states = [np.concatenate([v[0]["x"] for v in values])]
    states += [np.concatenate([v[layer]["after"] for v in values]) for layer in range(3)]
    unit = [s / np.linalg.norm(s, axis=1, keepdims=True) for s in states]
    cosines = [[(a * b).sum() / tokens for b in unit] for a in unit]
    np.testing.assert_allclose(found.cosines, cosines, atol=2e-6)
    between = np.concatenate([v[1]["between"] for v in values])
    share = (between**2 / (between**2).mean(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found.shares["layers.mlp_norm"][1], share, rtol=2e-5)
    last = states[-1]
    share = (last**2 / (last**2).mean(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found.shares["final_norm"], share, rtol=2e-5)
    assert found.facts["rows"] == len(rows) and found.facts["tokens"] == tokens


@pytest.mark.parametrize("case", FAMILIES)
def test_the_pass_that_looks_is_the_decoder(case, load, batches):
    model, _ = load(case)
    for batch in batches(case):
        want = decoder.apply(
            model.config,
            model.params,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            compute_dtype="float32",
        )
        visit = functools.partial(activations._look, lambda mlp, seen: {})
        got, _ = activations._forward(model.config, "float32", model.params, batch, visit)
        np.testing.assert_allclose(got.hidden, want.hidden, rtol=1e-5, atol=1e-5)


def close(ours, theirs):
    """All scores are equal, but for the order of sums."""
    for name in ("neurons", "heads", "channels", "cosines", "experts", "shares"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(
                a, b, rtol=1e-5, atol=1e-6, err_msg=name
            ),
            one,
            other,
        )


def test_scores_are_the_same_on_one_device_and_on_eight(load, batches):
    alone = measure(load("llama3")[0], batches("llama3"))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        spread = measure(load("llama3", mesh)[0], batches("llama3", mesh))
    close(spread, alone)


def test_how_rows_are_batched_does_not_matter(load, batches):
    model, _ = load(CASE)
    found = measure(model, batches(CASE))
    halves = [
        jax.tree.map(lambda a, part=part: a[part], batch)
        for batch in batches(CASE)
        for part in (slice(0, 1), slice(1, 4))
    ]
    again = measure(model, halves)
    np.testing.assert_allclose(again.neurons, found.neurons, rtol=1e-5)
    np.testing.assert_allclose(again.channels, found.channels, rtol=1e-5)


def test_a_layer_that_changes_nothing_has_no_influence(load, batches):
    model, _ = load(CASE)
    layers = dict(model.params["layers"])
    for block in ("attention", "mlp"):
        last = "out" if block == "attention" else "down"
        parts = dict(layers[block])
        parts[last] = {"kernel": parts[last]["kernel"].at[1].set(0.0)}
        layers[block] = parts
    params = dict(model.params) | {"layers": layers}
    changed = dataclasses.replace(model, params=params)
    found = measure(changed, batches(CASE))
    assert abs(found.influence[1]) < 1e-6
    assert min(found.influence[0], found.influence[2]) > 1e-2
    assert found.kept_layers(2, "influence") == [0, 2] == found.kept_layers(2, "range")
    with_loss = importance.with_losses(
        found, model.config, params, lambda: batches(CASE), vocab=61, compute_dtype="float32"
    )
    assert abs(with_loss.loss[1]) < 1e-5 < abs(with_loss.loss[0])


def test_losses_without_layers_equal_the_oracles(load, batches):
    """The oracle simply gets fewer layers."""
    model, named = load(CASE)
    raw = oracle.CASES[CASE]
    batch = batches(CASE)[0]
    found = importance.with_losses(
        measure(model, [batch]),
        model.config,
        model.params,
        lambda: [batch],
        vocab=61,
        counts=(1, 2),
        compute_dtype="float32",
    )

    def loss(kept):
        small = {k: v for k, v in named.items() if ".layers." not in k}
        for new, old in enumerate(kept):
            at = f"model.layers.{old}."
            small |= {k.replace(at, f"model.layers.{new}."): v for k, v in named.items() if at in k}
        z = oracle.logits(raw | {"num_hidden_layers": len(kept)}, small, batch.tokens)
        z = z - z.max(-1, keepdims=True)
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        picked = np.take_along_axis(logp, np.asarray(batch.targets)[..., None], -1)[..., 0]
        return -picked[np.asarray(batch.mask)].mean()

    whole = loss([0, 1, 2])
    np.testing.assert_allclose(found.facts["loss"], whole, rtol=1e-5)
    ones = [loss(kept) - whole for kept in ([1, 2], [0, 2], [0, 1])]
    np.testing.assert_allclose(found.loss, ones, atol=3e-5)
    np.testing.assert_allclose(
        found.range_loss[2], [loss([2]) - whole, loss([0]) - whole], atol=3e-5
    )


def scored(**fields):
    shape = {"layers": 4, "embed": 6, "mlp": 8, "heads": 4, "kv_heads": 2, "head_dim": 4}
    states = np.eye(5)
    return importance.ImportanceScores(
        neurons=np.ones((4, 8)),
        heads=np.ones((4, 4)),
        channels=np.ones(6),
        shares={"layers.mlp_norm": np.ones((4, 6)), "final_norm": np.arange(6.0)},
        cosines=states,
        facts={"shape": shape},
        **fields,
    )


def test_how_layers_are_chosen():
    one = scored(loss=np.array([3.0, 0.1, 2.0, 0.2]), range_loss={2: np.array([5.0, 1.0, 4.0])})
    assert one.kept_layers(2, "loss") == [0, 2]  # the two that cost least may lie apart
    assert one.kept_layers(2, "range_loss") == [0, 3]  # one block, from layer 1 on
    assert one.kept_layers(4, "loss") == [0, 1, 2, 3]
    cosines = np.eye(5)
    cosines[0, 1] = cosines[2, 3] = 0.9  # layers 0 and 2 change the direction least
    cosines[1, 3] = 0.5
    two = dataclasses.replace(one, cosines=cosines)
    assert two.kept_layers(2, "influence") == [1, 3]
    assert two.kept_layers(2, "range") == [0, 3]  # from state 1 to state 3


@pytest.mark.parametrize(
    ("keep", "by", "words"),
    [
        (0, "range", "the model has 4"),
        (5, "range", "at most 4"),
        (2, "colour", "must be one of"),
        (2, "loss", "was not measured"),
        (3, "range_loss", "ranges that were: none"),
    ],
)
def test_what_cannot_be_chosen_is_said(keep, by, words):
    with pytest.raises(ConfigError, match=words):
        scored().kept_layers(keep, by)


def test_scores_survive_a_file_and_a_damaged_one_is_told(tmp_path):
    one = scored(loss=np.arange(4.0), range_loss={2: np.array([5.0, 1.0, 4.0])})
    file = importance.save(one, tmp_path / "deep" / importance.FILE)
    back = importance.load(file)
    assert back.facts == one.facts
    np.testing.assert_array_equal(back.loss, one.loss)
    assert back.experts is None and back.shares.keys() == one.shares.keys()
    np.testing.assert_array_equal(back.shares["final_norm"], one.shares["final_norm"])
    np.testing.assert_array_equal(back.range_loss[2], one.range_loss[2])
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ConfigError, match="damaged"):
        importance.load(file)
    with pytest.raises(ConfigError, match="no such file"):
        importance.load(tmp_path / "none")


def test_empty_and_broken_calibration_is_told(load, batches):
    model, _ = load(CASE)
    with pytest.raises(DataError, match="no tokens"):
        measure(model, [])
    params = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), model.params)
    with pytest.raises(DataError, match="not finite"):
        measure(dataclasses.replace(model, params=params), batches(CASE))
    with pytest.raises(DataError, match="has 3 rows, 8 are wanted"):
        importance.check_enough(3, 8, "calib.txt")
