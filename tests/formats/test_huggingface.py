"""Folders loaded, saved, reopened by transformers; and refused with a remedy."""

import errno
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.errors import ModelError, StorageError
from jaxdistill.formats import huggingface, shards
from tests.models import oracle

LLAMA = oracle.CASES["llama2"]


@pytest.fixture
def folder(tmp_path):
    return oracle.write_folder(tmp_path / "model", LLAMA)


def _words(folder):
    """A tokenizer of three words with a chat template, written as transformers would."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(kinds.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(str(folder))


@pytest.mark.parametrize("name", oracle.CASES)
def test_saving_and_loading_changes_nothing(name, tmp_path):
    raw = oracle.CASES[name]
    model = models.load(oracle.write_folder(tmp_path / "first", raw))
    models.save(model, tmp_path / "second", shard_bytes=10_000)
    again = models.load(tmp_path / "second")
    assert again.config == model.config
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        other = again.params
        for key in path:
            other = other[key.key]
        np.testing.assert_array_equal(other, leaf)
    written = json.loads((tmp_path / "second" / shards.INDEX).read_text())["weight_map"]
    assert written.keys() == oracle.tensors(raw).keys()


@pytest.mark.torch
@pytest.mark.parametrize("name", oracle.CASES)
def test_transformers_opens_a_saved_folder_with_equal_logits(name, tmp_path, transformers_logits):
    raw = oracle.CASES[name]
    model = models.load(oracle.write_folder(tmp_path / "first", raw))
    tokens = oracle.tokens(raw)
    before = transformers_logits(tmp_path / "first", tokens)
    models.save(model, tmp_path / "second", shard_bytes=10_000)
    np.testing.assert_array_equal(transformers_logits(tmp_path / "second", tokens), before)


@pytest.mark.torch
def test_a_random_model_is_opened_by_transformers(tmp_path, transformers_logits):
    config = models.DecoderConfig("qwen2", 61, 32, 40, 2, 4, 2, 8, attention_bias=True)
    model = models.random(config, seed=3)
    models.save(model, tmp_path / "model")
    tokens = oracle.tokens(LLAMA)
    theirs = transformers_logits(tmp_path / "model", tokens)
    assert oracle.distance(model.logits(tokens), theirs) <= 2e-5


def test_dtypes_on_the_way_in_and_out(folder, tmp_path):
    named = oracle.tensors(LLAMA)
    up = "model.layers.1.mlp.up_proj.weight"
    half = models.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    kernel = np.asarray(half.params["layers"]["mlp"]["up"]["kernel"][1])
    np.testing.assert_array_equal(kernel, named[up].T.astype(ml_dtypes.bfloat16))
    models.save(models.load(folder), tmp_path / "half", dtype=jnp.bfloat16)
    again = models.load(tmp_path / "half")
    assert again.params["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.params["layers"]["mlp"]["up"]["kernel"][1], kernel)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ModelError, match="dtype: float64 is not one of"):
        models.save(half, tmp_path / "double", dtype=np.float64)


def test_a_mesh_reads_each_number_once(folder, mesh8, monkeypatch):
    sizes, shapes = {}, {}
    read = shards.Folder.read

    def watched(self, name, index, memory=None):
        values = read(self, name, index, memory)
        sizes[name] = sizes.get(name, 0) + values.size
        shapes[name] = self.entries[name].shape
        return values

    monkeypatch.setattr(shards.Folder, "read", watched)
    spread, whole = models.load(folder, mesh=mesh8), None
    assert any(name.endswith("up_proj.weight") for name in sizes)
    assert sizes == {name: np.prod(shape) for name, shape in shapes.items()}
    monkeypatch.undo()
    whole = models.load(folder)
    jax.tree.map(np.testing.assert_array_equal, spread.params, whole.params)
    place = spread.params["layers"]["attention"]["query"]["kernel"].sharding
    assert place.spec == jax.P(None, "fsdp", "tensor")


def test_a_sharded_model_is_saved_whole(folder, mesh8, tmp_path):
    models.save(models.load(folder, mesh=mesh8), tmp_path / "again")
    again = models.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, models.load(folder).params)


def test_the_tokenizer_travels_with_its_template(folder, tmp_path):
    _words(folder)
    model = models.load(folder)
    models.save(model, tmp_path / "again")
    again = models.load(tmp_path / "again").tokenizer
    assert again("hello").input_ids == [3]
    text = again.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "hello</s>"
    assert models.load(folder, tokenizer=False).tokenizer is None
    config, words = models.spec(folder)
    assert config == model.config and words("hello").input_ids == [3]


def test_a_folder_without_a_tokenizer_has_none(folder):
    assert models.load(folder).tokenizer is None


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer.json: is not JSON"):
        models.load(folder)


def test_generation_settings_have_the_last_word_on_ends(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    model = models.load(folder)
    assert model.config.eos_ids == (2, 7)
    models.save(model, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 7]}


def test_settings_of_generation_survive(folder, tmp_path):
    """Those that Qwen and Llama publish; ends that stand beside them still have the last word."""
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    settings |= {"repetition_penalty": 1.05}
    file = folder / "generation_config.json"
    file.write_text(json.dumps(settings | {"eos_token_id": [2, 7], "transformers_version": "5"}))
    model = models.load(folder)
    assert model.generation == settings
    models.save(model, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 7], **settings}
    file.write_text(json.dumps({"temperature": "warm"}))
    with pytest.raises(ModelError, match='temperature: "warm" must be a number'):
        models.load(folder)


def test_missing_configuration_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config.json: missing; .*download the whole model"):
        models.load(tmp_path / "empty")


def _rewritten(folder, change):
    named = oracle.tensors(LLAMA)
    change(named)
    return oracle.write_folder(folder, LLAMA, named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 missing, such as model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "1 missing, such as lm_head.weight"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": t["model.norm.weight"]}),
            "1 that a llama model of 3 layers does not have, such as model.layers.0.self_attn.q_n",
        ),
        (
            lambda t: t.update({"model.layers.3.input_layernorm.weight": t["model.norm.weight"]}),
            "does not have, such as model.layers.3.input_layernorm.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]}),
            "model.norm.weight has shape [31], expected [32]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    folder = _rewritten(tmp_path / "model", change)
    with pytest.raises(ModelError, match=re.escape(message)):
        models.load(folder)


def test_old_buffers_and_a_stored_tied_head_are_harmless(tmp_path):
    raw = LLAMA | {"tie_word_embeddings": True}
    named = oracle.tensors(raw)
    named["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    named["lm_head.weight"] = named["model.embed_tokens.weight"].copy()
    model = models.load(oracle.write_folder(tmp_path / "model", raw, named))
    assert "head" not in model.params
    named["lm_head.weight"][60, 3] += 1
    with pytest.raises(ModelError, match="lm_head.weight differs from model.embed_tokens.weight"):
        models.load(oracle.write_folder(tmp_path / "other", raw, named))


def test_saving_refuses_to_overwrite(folder, tmp_path):
    model = models.load(folder)
    with pytest.raises(StorageError, match="exists and is not empty; name a new folder"):
        models.save(model, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="exists and is not empty"):
        models.save(model, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    models.save(model, tmp_path / "empty")
    assert models.load(tmp_path / "empty").config == model.config


def test_a_failed_save_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = models.load(folder)
    monkeypatch.setattr(huggingface.shards, "write", full)
    with pytest.raises(StorageError, match="No space left on device"):
        models.save(model, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []
