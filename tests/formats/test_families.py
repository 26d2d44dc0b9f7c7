"""Families beyond Llama's form against transformers, on a mesh, in generation; what is refused."""

import dataclasses
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses, models, sharding
from jaxdistill.compress import prune
from jaxdistill.errors import ModelError
from jaxdistill.formats import sums
from jaxdistill.formats.config_json import read_config, write_config
from jaxdistill.formats.families import FAMILIES
from jaxdistill.methods import kd
from jaxdistill.models import decoder, experts
from jaxdistill.models.architecture import Experts
from jaxdistill.types import Batch, TeacherSignal
from tests.also import also
from tests.models import oracle, variants

TOLERANCE = 2e-5
# Tokens and segments. Tests share these shapes, and so the compiled programs.
PACKED = variants.tokens(rows=4, length=36), np.asarray([[1] * 16 + [2] * 16 + [0] * 4] * 4)
PROMPTS = [[5, 9, 11, 30, 2, 8, 17], [40], [3, 3, 3, 21, 22, 23, 24, 25, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module", params=variants.CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return variants.model(name)


# Between them they have every part of a decoder.
_FIRST = ("gemma3", "gpt2", "phi3_longrope", "qwen3_moe", "smollm3")
_OTHERS = sorted(variants.CASES.keys() - variants.LIKE_OTHERS - set(_FIRST))


@pytest.fixture(scope="module", params=[*_FIRST, *also(*_OTHERS)])
def own(request):
    """Of families with a part that no other has: these run everywhere, all are compared."""
    return variants.model(request.param)


@pytest.fixture(scope="module")
def theirs(name, tmp_path_factory):
    """A folder that transformers wrote."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return variants.transformers_folder(name, tmp_path_factory.mktemp("theirs") / name)


@pytest.mark.torch
def test_logits_equal_transformers(theirs, transformers_logits):
    tokens = variants.tokens()
    expected = transformers_logits(theirs, tokens)
    assert oracle.distance(models.load(theirs).logits(tokens), expected) <= TOLERANCE


@pytest.mark.torch
def test_transformers_opens_what_is_saved_with_equal_weights(theirs, tmp_path, transformers_model):
    import torch

    models.save(models.load(theirs), tmp_path / "again")
    before, after = (dict(transformers_model(folder).named_parameters())
                     for folder in (theirs, tmp_path / "again"))  # fmt: skip
    assert before.keys() == after.keys()
    for path, weight in before.items():
        assert torch.equal(weight, after[path]), path


@pytest.mark.torch
def test_gradients_equal_transformers(theirs, tmp_path, transformers_model):
    """Of cross-entropy, by every weight: our gradient, saved as a model, is one that they open."""
    import torch

    tokens, ours = variants.tokens(), models.load(theirs)

    def loss(params):
        outputs = decoder.apply(ours.config, params, jnp.asarray(tokens), compute_dtype="float32")
        scores = jax.nn.log_softmax(decoder.logits(outputs)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], -1))

    gradient = dataclasses.replace(ours, params=jax.grad(loss)(ours.params))
    found = transformers_model(models.save(gradient, tmp_path / "gradient"))
    reference = transformers_model(theirs)
    reference(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
    got = dict(found.named_parameters())
    for path, weight in reference.named_parameters():
        expected = weight.grad.numpy()
        error = np.abs(got[path].detach().numpy() - expected).max()
        assert error <= 2e-5 * np.abs(expected).max() + 1e-7, (path, error)


@pytest.mark.torch
def test_greedy_equals_transformers(theirs, transformers_model):
    import torch

    ours, reference = models.load(theirs), transformers_model(theirs)
    ours = dataclasses.replace(ours, config=dataclasses.replace(ours.config, eos_ids=()))
    new = ours.generate(PROMPTS, max_new_tokens=16)
    for prompt, found in zip(PROMPTS, new, strict=True):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = reference.generate(
                torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None
            )
        assert found == expected[0, len(prompt) :].tolist()


def test_greedy_equals_a_loop_without_a_cache(own):
    free = dataclasses.replace(own, config=dataclasses.replace(own.config, eos_ids=()))
    found = free.generate(PROMPTS[:1], max_new_tokens=9)[0]
    row = [*PROMPTS[0], *found]
    best = np.asarray(own.logits(np.asarray([row]))[0]).argmax(-1)
    assert found == best[len(PROMPTS[0]) - 1 : -1].tolist()


def test_saving_and_loading_changes_nothing(model, name, tmp_path):
    models.save(model, tmp_path / "once", shard_bytes=20_000)
    again = models.load(tmp_path / "once")
    assert again.config == model.config == read_config(variants.CASES[name])
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_a_mesh_changes_nothing(own, mesh8, tmp_path):
    """Read slice by slice into its places, fused tensors too; packed rows, all axes in use."""
    models.save(own, tmp_path / "model")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    if own.config.heads % 2:
        mesh = sharding.make_mesh(data=1, fsdp=4, context=2)
    spread = models.load(tmp_path / "model", mesh=mesh)
    assert oracle.distance(spread.logits(*PACKED), own.logits(*PACKED)) < 1e-5
    kernel = spread.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_packed_documents_equal_their_own_forwards(own):
    packed = own.logits(*PACKED)
    for start in (0, 16):
        alone = own.logits(PACKED[0][:1, start : start + 16])
        assert oracle.distance(packed[:1, start : start + 16], alone) <= TOLERANCE


@pytest.mark.torch
@pytest.mark.parametrize("length", [31, 32, 33, 48])
def test_longrope_equals_transformers_on_both_sides(length, tmp_path, transformers_logits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = variants.transformers_folder("phi3_longrope", tmp_path / "theirs")
    tokens, ours = variants.tokens(length=length), models.load(folder)
    expected = transformers_logits(folder, tokens)
    assert oracle.distance(ours.logits(tokens), expected) <= TOLERANCE
    border = 64 if length > 32 else 16
    rope = dataclasses.replace(ours.config.rope, original_max_positions=border)
    other = dataclasses.replace(ours, config=dataclasses.replace(ours.config, rope=rope))
    assert oracle.distance(other.logits(tokens), expected) > 1e-2


def test_longrope_does_not_depend_on_neighbours():
    """A long and two short documents in a row, and a short row beside a long one."""
    model = variants.model("phi3_longrope")
    rows, segments = variants.tokens(length=56), np.zeros((2, 56), np.int32)
    segments[0] = [1] * 12 + [2] * 36 + [3] * 8
    segments[1, :20] = 1  # and padding
    together = model.logits(rows, segments)
    for row, start, stop in ((0, 0, 12), (0, 12, 48), (0, 48, 56), (1, 0, 20)):
        alone = model.logits(rows[row : row + 1, start:stop])
        assert oracle.distance(together[row : row + 1, start:stop], alone) <= TOLERANCE


def test_longrope_generates_on_either_side_of_its_border():
    model = variants.model("phi3_longrope")
    free = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=()))
    prompts = [variants.tokens(rows=1, length=size)[0].tolist() for size in (33, 20, 36)]
    for prompt, found in zip(prompts, free.generate(prompts, max_new_tokens=13), strict=True):
        row = [*prompt, *found]
        best = np.asarray(model.logits(np.asarray([row[:-1]]))[0]).argmax(-1)
        assert found == best[len(prompt) - 1 :].tolist()
    message = "prompt 0 has 20 tokens, and with max_new_tokens = 14 it would grow past the 32"
    with pytest.raises(ModelError, match=message + ".*: ask for at most 13"):
        free.generate(prompts[1:2], max_new_tokens=14)


@pytest.mark.parametrize("capped", [None, 2.0])
def test_losses_see_capped_logits(capped):
    """KD of a Gemma from its fused head against the formula on its logits, both models capped."""
    model = variants.model("gemma2")
    config = dataclasses.replace(model.config, logits_softcap=capped)
    tokens = jnp.asarray(variants.tokens())
    batch = Batch(tokens, tokens, jnp.ones(tokens.shape, bool), tokens, tokens)
    outputs = decoder.apply(config, model.params, tokens, compute_dtype="float32")
    worse = jax.tree.map(lambda leaf: 0.9 * leaf, model.params)
    student = decoder.apply(config, worse, tokens, compute_dtype="float32")
    knobs = {"alpha": jnp.float32(0.3), "temperature": jnp.float32(1.0)}
    signal = TeacherSignal(outputs=outputs)
    means = kd.objective(vocab=61).apply({}, student, signal, batch, knobs)
    q, p = (jax.nn.log_softmax(decoder.logits(one)) for one in (student, outputs))
    ce = -jnp.take_along_axis(q, tokens[..., None], -1)[..., 0]
    expected = 0.3 * ce + 0.7 * jnp.sum(jnp.exp(p) * (p - q), -1)
    np.testing.assert_allclose(means["loss"].value, expected.mean(), rtol=2e-5)
    if capped:
        assert jnp.abs(decoder.logits(outputs)).max() <= capped


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("favour", [0.0, 50.0])
def test_routed_experts_equal_a_loop_over_tokens(normalised, favour):
    """Also where the router sends every token to the same experts: none is dropped."""
    draw = np.random.default_rng(3)
    x = draw.standard_normal((2, 7, 8)).astype(np.float32)
    x[..., 0] = 1.0
    router = draw.standard_normal((8, 5)).astype(np.float32)
    router[0, :2] += favour
    kernels = {
        name: draw.standard_normal((5, *shape)).astype(np.float32)
        for name, shape in {"gate": (8, 6), "up": (8, 6), "down": (6, 8)}.items()
    }
    params = {name: {"kernel": jnp.asarray(k)} for name, k in {"router": router, **kernels}.items()}
    layer = experts.RoutedMLP(Experts(5, 2, normalised), jax.nn.silu, params)
    found = layer(jnp.asarray(x), sharding.RULES)
    np.testing.assert_allclose(layer.scores(jnp.asarray(x)), x @ router, atol=1e-4)
    wide = {name: kernel.astype(np.float64) for name, kernel in kernels.items()}
    for place in np.ndindex(2, 7):
        token = x[place].astype(np.float64)
        scores = np.exp(token @ router - (token @ router).max())
        shares, expected = scores / scores.sum(), np.zeros(8)
        best = np.argsort(-shares)[:2]
        for one in best:
            gate = token @ wide["gate"][one]
            hidden = gate / (1 + np.exp(-gate)) * (token @ wide["up"][one])
            weight = shares[one] / shares[best].sum() if normalised else shares[one]
            expected += weight * (hidden @ wide["down"][one])
        np.testing.assert_allclose(found[place], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe_unnormalised"])
def test_load_balancing_equals_transformers(name, tmp_path, transformers_model):
    """Value, and gradient by every weight, of rows with padding."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = variants.transformers_folder(name, tmp_path / "theirs")
    ours, tokens, mask = models.load(folder), variants.tokens(), np.ones((2, 24), np.int32)
    mask[1, 15:] = 0

    def loss(params):
        outputs = decoder.apply(
            ours.config, params, jnp.asarray(tokens), None, jnp.asarray(mask),
            compute_dtype="float32", routing=True,
        )  # fmt: skip
        return losses.load_balancing(outputs.routing, ours.config.experts.chosen, mask)

    value, gradient = jax.value_and_grad(loss)(ours.params)
    reference = transformers_model(folder)
    told = reference(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), output_router_logits=True
    )
    assert float(value) == pytest.approx(float(told.aux_loss.detach()), rel=1e-5)
    told.aux_loss.backward()
    made = dataclasses.replace(ours, params=gradient)
    found = dict(transformers_model(models.save(made, tmp_path / "made")).named_parameters())
    for path, weight in reference.named_parameters():
        expected = 0 * weight if weight.grad is None else weight.grad
        error = float((found[path].detach() - expected.detach()).abs().max())
        assert error <= 2e-5 * float(expected.detach().abs().max()) + 1e-7, (path, error)


def test_a_model_without_experts_has_no_routing():
    model = variants.model("olmo2")
    with pytest.raises(ModelError, match="routing: a olmo2 model has no routed experts"):
        decoder.apply(model.config, model.params, jnp.zeros((1, 4), jnp.int32), routing=True)


def test_experts_lie_on_the_mesh_and_learn_the_same(mesh8):
    model = variants.model("qwen3_moe")
    places = sharding.shardings(
        mesh8, decoder.logical_axes(model.config), decoder.shapes(model.config)
    )
    spread = jax.device_put(model.params, places)
    kernel = spread["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "tensor", "fsdp", None)
    tokens = jnp.asarray(variants.tokens(rows=4))

    def loss(params):
        outputs = decoder.apply(model.config, params, tokens, compute_dtype="float32", remat="full")
        return jnp.mean(jnp.square(decoder.logits(outputs)))

    alone = jax.grad(loss)(model.params)
    with jax.set_mesh(mesh8):
        together = jax.jit(jax.grad(loss))(spread)
    for one, other in zip(*map(jax.tree.leaves, (alone, together)), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-5 * float(jnp.abs(one).max()))


def test_the_router_is_float32_in_a_bfloat16_model():
    """A near tie that bfloat16 would turn around."""
    x, router = jnp.ones((1, 2), jnp.bfloat16), jnp.asarray([[1.0, 1.001], [0.0, 0.0]])
    assert jnp.asarray(router, jnp.bfloat16)[0, 0] == jnp.asarray(router, jnp.bfloat16)[0, 1]
    _, chosen = experts.route(Experts(2, 1), x, router)
    assert chosen.tolist() == [[1]]
    config = variants.model("mixtral").config
    params = decoder.shapes(config, jnp.float32)
    run = lambda params, tokens: decoder.apply(config, params, tokens).hidden
    program = str(jax.make_jaxpr(run)(params, jax.ShapeDtypeStruct((1, 4), jnp.int32)))
    assert "bf16[32,4]" not in program  # the router's kernel, cast


def test_a_gpt2_saved_without_its_head_is_read(tmp_path):
    """The Hub's gpt2 has no `transformer.` before its names, and its causal masks as buffers."""
    from safetensors.numpy import load_file, save_file

    model = variants.model("gpt2")
    models.save(model, tmp_path / "model")
    (tmp_path / "model" / sums.FILE).unlink()
    file = tmp_path / "model" / "model.safetensors"
    named = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    named["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(named, file)
    again = models.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_fused_tensors_are_laid_out_as_published(tmp_path):
    """Row by row: GPT-NeoX head by head, Phi-3 one behind the other, GPT-2 [in, out]."""
    from safetensors.numpy import load_file

    def tensor(name, key):
        models.save(model := variants.model(name), tmp_path / name)
        layer = jax.tree.map(lambda leaf: np.asarray(leaf[1]), model.params["layers"])
        kernels = [layer["attention"][part]["kernel"] for part in ("query", "key", "value")]
        return load_file(tmp_path / name / "model.safetensors")[key], kernels

    fused, (query, key, value) = tensor(
        "pythia", "gpt_neox.layers.1.attention.query_key_value.weight"
    )
    for head in range(4):
        for number, kernel in enumerate((query, key, value)):
            rows = fused[head * 24 + number * 8 : head * 24 + number * 8 + 8]
            np.testing.assert_array_equal(rows, kernel.T[head * 8 : head * 8 + 8])
    fused, kernels = tensor("phi3", "model.layers.1.self_attn.qkv_proj.weight")
    np.testing.assert_array_equal(fused, np.concatenate([kernel.T for kernel in kernels]))
    fused, kernels = tensor("gpt2", "transformer.h.1.attn.c_attn.weight")
    np.testing.assert_array_equal(fused, np.concatenate(kernels, axis=1))


def _renamed(folder, name, rename, beside=()):
    """A saved model whose tensors have other names; its configuration, and the file of that."""
    from safetensors.numpy import load_file, save_file

    models.save(variants.model(name), folder)
    (folder / sums.FILE).unlink()
    (folder / "generation_config.json").unlink()
    file, config = folder / "model.safetensors", folder / "config.json"
    named = {rename(key): value for key, value in load_file(file).items()}
    save_file(named | {key: np.ones(3, np.float32) for key in beside}, file)
    return json.loads(config.read_text()), config


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_folder_that_sees_is_read(prefix, tmp_path):
    """Old and new names of Gemma 3's folders of 4B and more; what sees is left where it is."""
    folder, tower = tmp_path / "model", ("vision_tower.x.weight", "multi_modal_projector.y")
    rename = lambda key: prefix + key.removeprefix("model.")
    text, file = _renamed(folder, "gemma3", rename, tower)
    ends = {"eos_token_id": [1, 2]}
    text.pop("eos_token_id")
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    whole |= {"architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256}
    file.write_text(json.dumps(whole | ends))
    found, made = models.load(folder), variants.model("gemma3")
    assert found.config == dataclasses.replace(made.config, eos_ids=(1, 2))
    jax.tree.map(np.testing.assert_array_equal, found.params, made.params)
    models.save(found, tmp_path / "alone")
    assert models.load(tmp_path / "alone").config == found.config
    file.write_text(json.dumps(whole | {"text_config": None}))
    with pytest.raises(ModelError, match="text_config: null must hold the text model"):
        models.load(folder)


@pytest.mark.torch
def test_gemma_3_that_sees_equals_transformers(tmp_path):
    """Its language model, from a folder that transformers wrote."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    raw = {key: value for key, value in variants.CASES["gemma3"].items() if key != "model_type"}
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sees |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = Gemma3Config(text_config=raw, vision_config=sees, mm_tokens_per_image=4)
        theirs = Gemma3ForConditionalGeneration(config).eval()
        with torch.no_grad():
            for weight in theirs.parameters():
                weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.2))
        theirs.save_pretrained(str(tmp_path / "model"))
        tokens = variants.tokens()
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor(tokens)).logits.numpy()
    found = models.load(tmp_path / "model")
    assert oracle.distance(found.logits(tokens), expected) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["_orig_mod.", "policy.module."])
def test_weights_under_a_prefix_are_named(prefix, tmp_path):
    _renamed(tmp_path / "model", "olmo2", lambda key: prefix + key)
    by = ", which torch.compile puts there" if prefix == "_orig_mod." else ""
    hint = f"names that begin with '{prefix}'{by}: save the state of the model inside"
    with pytest.raises(ModelError, match=re.escape(hint)):
        models.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "FineGrainedFP8Config(dequantize=True)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "Mxfp4Config(dequantize=True)"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            'weights of "awq" are not read: use the',
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx_lm.convert"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "model.dequantize()"),
    ],
)
def test_weights_of_other_tools_have_a_way_back(fields, remedy, tmp_path):
    folder = models.save(variants.model("olmo2"), tmp_path / "model")
    (folder / sums.FILE).unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ModelError, match=re.escape(remedy)):
        models.load(folder)


def test_layers_that_positions_do_not_turn_stay_so_when_others_go():
    model = variants.model("smollm3")
    config, params = prune.keep_layers(model.config, model.params, [1, 2])
    assert (config.turned, config.layers) == ((False, True), 2)
    assert prune.keep_layers(model.config, model.params, [0, 2])[0].turned is None
    rope = dataclasses.replace(model.config.rope, theta=100.0)  # of no consequence to layer 1
    tokens = variants.tokens()
    first = prune.keep_layers(model.config, model.params, [1])
    other = dataclasses.replace(first[0], rope=rope)
    logits = [models.Model(one, first[1]).logits(tokens) for one in (first[0], other)]
    np.testing.assert_array_equal(*logits)
    changed = dataclasses.replace(config, rope=rope)
    logits = [models.Model(one, params).logits(tokens) for one in (config, changed)]
    assert oracle.distance(*logits) > 1e-2


REFUSED = {
    ("llama2", "rope_theta_extra: 3 is not a field that llama models"): {"rope_theta_extra": 3},
    ("gemma2", "final_logit_softcapping: 0 must be a number above 0"): {
        "final_logit_softcapping": 0
    },
    ("gemma2", "sliding_window: null must be at least 1"): {"sliding_window": None},
    ("gemma2", "sliding_window_pattern: 3 is not supported"): {"sliding_window_pattern": 3},
    ("gemma2", "query_pre_attn_scalar: 0 must be a whole number"): {"query_pre_attn_scalar": 0},
    ("gemma2", "use_bidirectional_attention: true is not supported"): {
        "use_bidirectional_attention": True
    },
    ("gemma2", 'hidden_activation: "relu" is not supported'): {"hidden_activation": "relu"},
    ("gemma3", "expected a table for full_attention and one for sliding_attention"): {
        "rope_parameters": {"full_attention": {"rope_theta": 1e6}}
    },
    ("gemma3", "sliding_attention.rope_theta: 0 must be a number above 0"): {
        "rope_local_base_freq": 0
    },
    ("phi3", "rope_scaling.short_factor: [1.0] must list 4 numbers above 0"): {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
    },
    ("phi3", "rope_scaling.long_factor: [1, 1, 1, true] must list 4 numbers above 0"): {
        "rope_scaling": {"type": "su", "short_factor": [1] * 4, "long_factor": [1, 1, 1, True]}
    },
    ("phi3", "rope_scaling.short_factor: missing; rope_type longrope needs it"): {
        "rope_scaling": {"type": "longrope"}
    },
    ("phi3", "original_max_position_embeddings: 1 must be a whole number of tokens, at least 2"): {
        "original_max_position_embeddings": 1,
        "rope_scaling": {"type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 4},
    },
    ("phi3", 'rope_scaling.rope_type: "yarn" is not supported'): {"rope_scaling": {"type": "yarn"}},
    ("phi3", "partial_rotary_factor: 0.4 must turn an even number of the 8 dims"): {
        "partial_rotary_factor": 0.4
    },
    ("phi3", "resid_pdrop: 0.1 is not supported"): {"resid_pdrop": 0.1},
    ("gpt2", "scale_attn_by_inverse_layer_idx: true is not supported"): {
        "scale_attn_by_inverse_layer_idx": True
    },
    ("gpt2", "rope_scaling: {"): {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ("gpt2", "n_embd: 37 must be a multiple of n_head: 3"): {"n_embd": 37},
    ("gpt2", "n_layer: 0 must be a whole number, 1 to 1000"): {"n_layer": 0},
    ("pythia", "use_parallel_residual: 1 must be true or false"): {"use_parallel_residual": 1},
    ("pythia", "rotary_pct: 0.1 must turn an even number"): {"rotary_pct": 0.1},
    ("pythia", "num_key_value_heads: 2 differs from 4"): {"num_key_value_heads": 2},
    ("olmo2", "clip_qkv: 8.0 is not a field that olmo2 models"): {"clip_qkv": 8.0},
    ("smollm3", "no_rope_layers: [1, 0] must have a 1 for each of the 3 layers"): {
        "no_rope_layers": [1, 0]
    },
    ("smollm3", "use_sliding_window: true is not supported"): {"use_sliding_window": True},
    ("granite", "logits_scaling: 0 must be a number above 0"): {"logits_scaling": 0},
    ("gemma", 'hidden_act: "silu" is not supported'): {"hidden_act": "silu"},
    ("olmo3", "sliding_window_pattern: 3 is not supported"): {"sliding_window_pattern": 3},
    ("mixtral", "num_experts_per_tok: 5 must be a whole number, 1 to 4"): {
        "num_experts_per_tok": 5
    },
    ("mixtral", "router_jitter_noise: 0.1 is not supported"): {"router_jitter_noise": 0.1},
    ("qwen3_moe", "decoder_sparse_step: 2 is not supported"): {"decoder_sparse_step": 2},
    ("qwen3_moe", "mlp_only_layers: [0] is not supported"): {"mlp_only_layers": [0]},
    ("qwen3_moe", "norm_topk_prob: 1 must be true or false"): {"norm_topk_prob": 1},
}


@pytest.mark.parametrize(("family", "message"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(family, message):
    raw = variants.CASES.get(family) or oracle.CASES[family]
    with pytest.raises(ModelError, match=re.escape(message)):
        read_config(raw | REFUSED[family, message])


def test_both_spellings_of_gemma_3_mean_the_same():
    old = {key: value for key, value in variants.CASES["gemma3"].items() if "rope" not in key}
    new = old | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
    }
    config = read_config(new)
    assert config == read_config(variants.CASES["gemma3"])
    assert config.windows == (5, 5, None, 5) and config.local_rope.theta == 100.0


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama", "mistral", "qwen2", "qwen3"}))
def test_defaults_equal_those_of_transformers(family):
    from transformers import AutoConfig

    row, theirs = FAMILIES[family], AutoConfig.for_model(family)
    sizes = {"vocab_size": 320, "hidden_size": 4096, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 32}
    if family not in ("gpt2", "qwen3_moe"):  # where it has a default of its own
        sizes["intermediate_size"] = 11008
    config = read_config(
        {"model_type": family} | {row.field(key): value for key, value in sizes.items()}
    )
    their = lambda name: getattr(theirs, row.field(name), None)
    assert config.norm_eps == their("rms_norm_eps")
    assert config.max_positions == their("max_position_embeddings")
    assert config.tied_head == theirs.tie_word_embeddings
    assert (config.bos_id, config.pad_id) == (theirs.bos_token_id, theirs.pad_token_id)
    ends = theirs.eos_token_id
    assert config.eos_ids == tuple(ends if isinstance(ends, list) else [ends] if ends else [])
    assert config.kv_heads == (their("num_key_value_heads") or 32)
    for ours, field in row.read.items():
        assert getattr(config, ours) == getattr(theirs, field), field
    if config.experts is not None:
        assert config.experts.chosen == theirs.num_experts_per_tok
        assert config.experts.count == theirs.num_local_experts
        assert config.experts.normalised == getattr(theirs, "norm_topk_prob", True)
    if row.windowed == "pattern":
        small = AutoConfig.for_model(family, num_hidden_layers=8)
        types = [name == "sliding_attention" for name in small.layer_types]
        assert config.windows == tuple(theirs.sliding_window if one else None for one in types)
    parameters = getattr(theirs, "rope_parameters", None) or {}
    if "full_attention" in parameters:
        assert config.local_rope.theta == parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    if parameters:
        assert config.rope.theta == parameters["rope_theta"]
        assert config.rope.share == parameters.get("partial_rotary_factor", 1.0)


JUNK = [None, -1, 0, 3, 1e308, float("nan"), float("inf"), "x", "", [], [None], {}, {"a": 1}, True]


def test_junk_in_any_field_is_a_model_error_or_read(name):
    raw = variants.CASES[name]
    for junk in JUNK:
        for field in raw:
            try:
                read_config(raw | {field: junk})
            except ModelError:
                pass


def test_what_is_written_is_what_transformers_takes(name):
    """Every field that is written is one of its class, or of the common ones, of its type."""
    from transformers import AutoConfig

    written = json.loads(json.dumps(write_config(read_config(variants.CASES[name]), "float32")))
    theirs = AutoConfig.for_model(written.pop("model_type"), **written)
    assert read_config(theirs.to_dict()) == read_config(variants.CASES[name])
