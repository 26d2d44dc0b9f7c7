"""Configurations read in both spellings, written back, and refused where they cannot be met."""

import dataclasses
import re

import pytest

from jaxdistill.errors import ModelError
from jaxdistill.formats.config_json import read_config, write_config
from jaxdistill.models.rope import Rope
from tests.models.oracle import CASES

LLAMA, QWEN2 = CASES["llama2"], CASES["qwen2_windows"]


@pytest.mark.parametrize("name", CASES)
def test_writing_and_reading_returns_the_configuration(name):
    config = read_config(CASES[name])
    again = read_config(write_config(config, "float32"))
    assert again == config


def test_both_spellings_of_positions_mean_the_same():
    table = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    old = read_config(LLAMA | {"rope_theta": 7.0, "rope_scaling": table})
    oldest_table = {"type" if key == "rope_type" else key: value for key, value in table.items()}
    oldest = read_config(LLAMA | {"rope_theta": 7.0, "rope_scaling": oldest_table})
    new = read_config(
        {key: value for key, value in LLAMA.items() if key != "rope_theta"}
        | {"rope_parameters": {**table, "rope_theta": 7.0}}
    )
    assert old == oldest == new
    assert new.rope == Rope(7.0, "yarn", 4.0, 32)


@pytest.mark.parametrize(
    ("family", "missing", "expected"),
    [
        ("mistral", "num_key_value_heads", None),
        ("llama", "num_key_value_heads", 4),
        ("qwen3", "head_dim", 128),
        ("llama", "head_dim", 8),
    ],
)
def test_absent_fields_take_the_defaults_of_their_class(family, missing, expected):
    raw = {**CASES["qwen3" if family == "qwen3" else "llama2"], "model_type": family}
    raw["architectures"] = None
    raw.pop(missing, None)
    if expected is None:  # 8 does not divide the 4 heads: seen in the message
        with pytest.raises(ModelError, match="num_key_value_heads: 8 must divide"):
            read_config(raw)
    else:
        config = read_config(raw)
        assert {"num_key_value_heads": config.kv_heads, "head_dim": config.head_dim}[
            missing
        ] == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_equal_those_of_transformers(family):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family)
    smallest = {"model_type": family, "vocab_size": 32000, "hidden_size": 4096}
    smallest |= {
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    config = read_config(smallest)
    assert config.kv_heads == theirs.num_key_value_heads
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.max_positions == theirs.max_position_embeddings
    assert config.tied_head == theirs.tie_word_embeddings
    assert config.bos_id == theirs.bos_token_id
    assert config.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert config.rope.theta == theirs.default_theta
    window = getattr(theirs, "sliding_window", None)
    assert config.windows == (None if window is None else (window,) * 32)
    if getattr(theirs, "head_dim", None):
        assert config.head_dim == theirs.head_dim


def test_layers_above_max_window_layers_have_a_window():
    assert read_config(QWEN2).windows == (None, 4, 4)
    assert read_config(QWEN2 | {"use_sliding_window": False}).windows is None
    assert read_config(QWEN2 | {"max_window_layers": 3}).windows is None


def test_end_tokens_may_be_several():
    assert read_config(LLAMA | {"eos_token_id": [2, 5]}).eos_ids == (2, 5)
    assert read_config(LLAMA | {"eos_token_id": None}).eos_ids == ()
    config = read_config(LLAMA | {"eos_token_id": [2, 5]})
    assert write_config(config, "float32")["eos_token_id"] == [2, 5]


REFUSED = {
    'model_type: "bloom" is not supported': {"model_type": "bloom"},
    "model_type: null": {"model_type": None},
    'architectures: ["LlamaModel"]': {"architectures": ["LlamaModel"]},
    'hidden_act: "relu" is not supported': {"hidden_act": "relu"},
    "attention_dropout: 0.1": {"attention_dropout": 0.1},
    "quantization_config: {": {"quantization_config": {"quant_method": "gptq"}},
    "rope_interleaved: true": {"rope_interleaved": True},
    'rope_type: "dynamic" is not supported': {"rope_scaling": {"type": "dynamic", "factor": 2}},
    'rope_type: "longrope"': {"rope_parameters": {"rope_type": "longrope"}},
    "rope_scaling.factor: missing": {"rope_scaling": {"type": "linear"}},
    'rope_scaling.factor: "4" must be a number': {
        "rope_scaling": {"type": "linear", "factor": "4"}
    },
    "rope_scaling.original_max_position_embeddings: 8192.5 must be a whole number of tokens": {
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8192.5}
    },
    "rope_scaling.low_freq_factor: missing": {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
    "rope_parameters.partial_rotary_factor: 0.5": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}
    },
    "partial_rotary_factor: 0.25": {"partial_rotary_factor": 0.25},
    "expected one table for all layers": {"rope_parameters": {"full_attention": {"rope_theta": 1}}},
    "rope_theta: 0 must be a number above 0": {"rope_theta": 0},
    "num_hidden_layers: 1001 must be a whole number, 1 to 1000": {"num_hidden_layers": 1001},
    "vocab_size: 2000001 must be": {"vocab_size": 2_000_001},
    'hidden_size: "64" must be': {"hidden_size": "64"},
    "num_attention_heads: 0 must be": {"num_attention_heads": 0},
    "num_attention_heads: true must be": {"num_attention_heads": True},
    "num_key_value_heads: 3 must divide num_attention_heads: 4": {"num_key_value_heads": 3},
    "head_dim: 7 must be even": {"head_dim": 7},
    'rms_norm_eps: "1e-5" must be a number': {"rms_norm_eps": "1e-5"},
    "tie_word_embeddings: 1 must be true or false": {"tie_word_embeddings": 1},
    'eos_token_id: "</s>" must be a token id': {"eos_token_id": "</s>"},
    'layer_types: ["full_attention"] must name': {"layer_types": ["full_attention"]},
    'layer_types: ["sliding_attention", "full_attention", "full_attention"] differs': {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"]
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_met_is_named(message):
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        read_config(LLAMA | REFUSED[message], "there/config.json")
    assert str(caught.value).startswith("there/config.json: ")


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_missing_size_is_named(field):
    with pytest.raises(ModelError, match=f"{field}: null must be a whole number"):
        read_config({key: value for key, value in LLAMA.items() if key != field})


def test_a_family_that_lacks_a_feature_says_so():
    config = dataclasses.replace(read_config(LLAMA), qk_norm=True)
    with pytest.raises(ModelError, match="qk_norm: True cannot be written as a llama config"):
        write_config(config, "float32")
    config = dataclasses.replace(read_config(QWEN2), windows=(3, None, 4))
    with pytest.raises(ModelError, match="different windows"):
        write_config(config, "float32")
    config = dataclasses.replace(read_config(LLAMA), family="bloom")
    with pytest.raises(ModelError, match="family: 'bloom' is not one of llama, mistral"):
        write_config(config, "float32")


JUNK = [None, -1, 0, 3, 1e308, float("nan"), float("inf"), "x", "", [], [None], {}, {"a": 1}, True]


@pytest.mark.parametrize(
    "name", ["llama3", "llama_new_spelling", "qwen3_layer_types", "qwen2_yarn"]
)
def test_junk_in_any_field_is_a_model_error_or_read(name):
    """Every field, and every field of the position table, replaced by every kind of junk."""
    raw = CASES[name]
    tables = [key for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    for junk in JUNK:
        changed = [raw | {field: junk} for field in raw]
        changed += [raw | {key: raw[key] | {field: junk}} for key in tables for field in raw[key]]
        for one in changed:
            try:
                read_config(one)
            except ModelError:
                pass
