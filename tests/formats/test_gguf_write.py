"""GGUF files that we write: read back to the bit, tokenizer and template included; refusals."""

import dataclasses
import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest

from jaxdistill import api, commands, models
from jaxdistill.errors import ConfigError, ModelError, StorageError
from jaxdistill.formats import gguf_layout, gguf_tokenizer, gguf_tokenizer_write, gguf_write
from jaxdistill.formats.families import FAMILIES
from jaxdistill.models.architecture import Experts
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.models.rope import Rope
from jaxdistill.safe import beside, manifest
from tests.models import oracle

pytest.importorskip("gguf")
TEXTS = ["Hello, world 2024!", " caf\u00e9 it's\n\n<|eot|>yes", "12345"]


def words(pre="qwen2"):
    """A byte-level BPE with a few merges, cut as a model family does, and special tokens."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("l", "l"), ("h", "e"), ("he", "ll"), ("1", "2"), ("\u0120", "w")]
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    core = Tokenizer(kinds.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    core.pre_tokenizer = gguf_tokenizer.PRE[pre](pre_tokenizers)
    core.normalizer = normalizers.NFC() if pre == "qwen2" else None
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    made.add_tokens(["<think>"])
    made.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    return made


def model(family="llama", **fields):
    """A random model of a case whose rows the tokenizer fits, its ends two tokens."""
    heads = fields.pop("kv_heads", 2)
    shape = models.DecoderConfig(
        family, 288, 64, 96, 2, 4, heads, 16, max_positions=128, norm_eps=1e-5, **fields
    )
    made = models.random(shape, dtype="float32")
    tokenizer = words()
    ends = (tokenizer.eos_token_id, tokenizer.get_vocab()["<|eot|>"])
    ids = {"eos_ids": ends, "bos_id": tokenizer.bos_token_id, "pad_id": tokenizer.pad_token_id}
    return dataclasses.replace(made, config=dataclasses.replace(shape, **ids), tokenizer=tokenizer)


GEMMA = {
    "norm": "rms_offset",
    "post_norm": True,
    "embedding_scaled": True,
    "activation": "gelu_tanh",
    "tied_head": True,
}
OLMO = {"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_whole": True}
PLAIN = {
    "norm": "layer",
    "gated": False,
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
}
CASES = {
    "llama": {"rope": Rope(500_000.0, "llama3", 8.0, 8192, 1.0, 4.0), "tied_head": True},
    "mistral": {},
    "qwen2": {"attention_bias": True, "rope": Rope(1e6, "yarn", 4.0, 32)},
    "qwen3": {"qk_norm": True, "rope": Rope(1e4, "linear", 2.0)},
    "mixtral": {"experts": Experts(3, 2)},
    "qwen3_moe": {"qk_norm": True, "experts": Experts(4, 2)},
    "gemma": {**GEMMA, "post_norm": False},
    "gemma2": {
        **GEMMA,
        "query_scalar": 16,
        "attention_softcap": 50.0,
        "logits_softcap": 30.0,
        "windows": (8, None),
    },
    "gemma3_text": {
        **GEMMA,
        "qk_norm": True,
        "query_scalar": 16,
        "windows": (8, 8),
        "rope": Rope(1e6, "linear", 8.0),
        "local_rope": Rope(1e4),
    },
    "olmo2": OLMO,
    "smollm3": {"rope": Rope(2e6), "tied_head": True},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_divisor": 8.0,
    },
    "olmo3": {
        **OLMO,
        "rope": Rope(5e5),
        "local_rope": Rope(5e5),
        "windows": (8, 8),
    },
    "phi3": {"rope": Rope(share=0.5)},
    "gpt2": {**PLAIN, "rope": None, "tied_head": True, "activation": "gelu_tanh", "kv_heads": 4},
    "gpt_neox": {
        **PLAIN,
        "rope": Rope(share=0.5),
        "parallel": True,
        "activation": "gelu",
        "kv_heads": 4,
    },
    "arcee": {"activation": "relu2", "gated": False},
    "glm4": {
        "post_norm": True,
        "attention_bias": True,
        "rope": Rope(share=0.5, interleaved=True),
    },
}


@pytest.mark.parametrize("family", CASES)
def test_what_is_written_is_read_back_to_the_bit(family, tmp_path):
    """Configuration, weights, tokens of texts, chat template; no trace of the way there."""
    made = model(family, **CASES[family])
    file = gguf_write.save(made, tmp_path / "model.gguf", "F32")
    again = models.load(file)
    # Mistral without a window is the architecture llama, which is the family it is read as.
    fixed = {"family": again.config.family, "initializer_range": 0.02}
    assert again.config == dataclasses.replace(made.config, **fixed)
    # Norms are held as 1 + scale there, and every model with such norms loses their last bits.
    scales = (
        {"atol": 6e-8, "rtol": 0} if made.config.norm == "rms_offset" else {"atol": 0, "rtol": 0}
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **scales), again.params, made.params)
    assert again.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    for text in TEXTS:
        ids = made.tokenizer(text)["input_ids"]
        assert again.tokenizer(text)["input_ids"] == ids
        assert again.tokenizer.decode(ids) == made.tokenizer.decode(ids)
    assert again.tokenizer.chat_template == made.tokenizer.chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(("kind", "bound"), [("BF16", 4e-3), ("F16", 5e-4), ("Q8_0", 8e-3)])
def test_smaller_types_stay_close(kind, bound, tmp_path):
    made = model()
    again = models.load(gguf_write.save(made, tmp_path / "model.gguf", kind))
    for path in ("gate", "up", "down"):
        want = np.asarray(made.params["layers"]["mlp"][path]["kernel"])
        got = np.asarray(again.params["layers"]["mlp"][path]["kernel"])
        assert 0 < np.abs(got - want).max() <= bound * np.abs(want).max()
    np.testing.assert_array_equal(
        again.params["final_norm"]["scale"], made.params["final_norm"]["scale"]
    )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_every_way_to_cut_text_has_its_name(pre):
    assert gguf_tokenizer_write.described(words(pre), 288).pre == pre


REFUSED = {
    "windows": ({"windows": (8, None)}, "has windows (8 tokens)"),
    "family": ({"family": "ministral"}, "ministral models are not written as GGUF here"),
    "activation": ({"activation": "gelu"}, "activation: 'gelu' has no words in a GGUF file"),
    "rope": ({"rope": Rope(1e4, "llama3", 8.0, 64, 1.0, 4.0)}, "band of llama3"),
    "yarn": ({"rope": Rope(1e4, "yarn", 8.0, 64, attention_factor=2.0)}, "settings of yarn"),
    "ends": ({"eos_ids": (1, 2, 3, 4)}, "4 tokens that end a text"),
    "rows": ({"vocab_size": 200}, "the model has 200 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_file_cannot_say_is_refused_and_leaves_nothing(name, tmp_path):
    fields, message = REFUSED[name]
    made = model()
    wrong = dataclasses.replace(made, config=dataclasses.replace(made.config, **fields))
    with pytest.raises(ModelError) as caught:
        gguf_write.save(wrong, tmp_path / "model.gguf", "F32")
    assert message in str(caught.value) and not list(tmp_path.iterdir())


def test_places_types_and_tokenizers_are_checked(tmp_path):
    made = model()
    with pytest.raises(StorageError, match="NAME.gguf"):
        gguf_write.save(made, tmp_path / "model")
    (tmp_path / "there.gguf").write_text("")
    with pytest.raises(StorageError, match="exists already"):
        gguf_write.save(made, tmp_path / "there.gguf")
    with pytest.raises(ConfigError, match="gs:// is no folder"):
        gguf_write.save(made, "gs://bucket/x.gguf")
    with pytest.raises(ModelError, match="no tokenizer"):
        gguf_write.save(dataclasses.replace(made, tokenizer=None), tmp_path / "x.gguf")
    other = words()
    from tokenizers import pre_tokenizers

    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="none of default, gpt-2"):
        gguf_write.save(dataclasses.replace(made, tokenizer=other), tmp_path / "x.gguf")
    narrow = models.random(models.DecoderConfig("llama", 288, 36, 40, 1, 2, 2, 18))
    with pytest.raises(ModelError, match="Q8_0 packs 32 numbers"):
        gguf_write.save(dataclasses.replace(narrow, tokenizer=words()), tmp_path / "x.gguf", "Q8_0")


def test_the_command_writes_it_too(tmp_path):
    folder = models.save(model(), tmp_path / "folder")
    options = commands.Export(format="gguf", gguf_type="F32")
    file = api.export(str(folder), tmp_path / "model.gguf", options)
    logits = [
        models.load(one).logits(oracle.tokens(oracle.CASES["llama2"])) for one in (folder, file)
    ]
    np.testing.assert_array_equal(*logits)
    for wrong in ({"format": "gguf", "dtype": "bfloat16"}, {"gguf_type": "Q8_0"}):
        with pytest.raises(ValueError, match="gguf"):
            commands.Export(**wrong)


def sentences(space=True):
    """SentencePiece's BPE: an order of tokens, bytes to fall back on, spaces that are seen."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    byte = [f"<0x{number:02X}>" for number in range(256)]
    made = ["he", "ll", "llo", "hell", "hello", "\u2581w", "\u2581wo", "or", "ld", "\u2581h", "lo"]
    letters = sorted({*"".join(made), "a", "\n"})
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *byte, *letters, *made])}
    cuts = [
        (token[:at], token[at:])
        for token in made
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    core = Tokenizer(
        kinds.BPE(vocab=vocab, merges=cuts, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("\u2581")] if space else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(content=" ", left=1)] if space else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    core.add_special_tokens([AddedToken(one, normalized=False) for one in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_goes_there_and_back(space, tmp_path):
    tokenizer, made = sentences(space), model()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "bos_id": tokenizer.bos_token_id, "pad_id": None}
    shape = dataclasses.replace(made.config, **ids)
    plain = models.random(dataclasses.replace(shape, vocab_size=300), dtype="float32")
    file = gguf_write.save(dataclasses.replace(plain, tokenizer=tokenizer), tmp_path / "x.gguf")
    again = models.load(file).tokenizer
    for text in ("hello world", " hello  hello", "he ll\nor \u20ac <s>", ""):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == tokenizer.decode(again(text)["input_ids"])


def test_a_space_that_depends_on_the_text_is_refused():
    from tokenizers import normalizers, pre_tokenizers

    for scheme in ("never", "first", "always"):
        tokenizer = sentences()
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=scheme, split=False
        )
        if scheme == "never":
            assert gguf_tokenizer_write.described(tokenizer, 300).space is False
            continue
        with pytest.raises(ModelError, match="writes spaces in a way that llama.cpp has not"):
            gguf_tokenizer_write.described(tokenizer, 300)


def test_merges_that_are_no_order_of_tokens_are_refused():
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(sentences().backend_tokenizer.to_str())
    merges = state["model"]["merges"]
    # A cut that is no merge; the cuts of one token at two places.
    for wrong in (merges[1:], [["hell", "o"], *(one for one in merges if one != ["hell", "o"])]):
        core = Tokenizer.from_str(json.dumps(state | {"model": state["model"] | {"merges": wrong}}))
        with pytest.raises(ModelError, match="merges are not SentencePiece's"):
            gguf_tokenizer_write.described(PreTrainedTokenizerFast(tokenizer_object=core), 300)


def test_bytes_alone_need_no_way_to_cut(tmp_path):
    assert gguf_tokenizer_write.described(byte_tokenizer(), 257).pre == "gpt-2"


def test_the_table_of_families_says_what_is_built():
    page = (pathlib.Path(__file__).parents[2] / "configs" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (yes)? ?\| (yes)? ?\|$", page, re.MULTILINE)
    assert {family for family, _, _ in rows} == set(FAMILIES)
    for place in (1, 2):
        assert {row[0] for row in rows if row[place]} == set(gguf_layout.LAYOUTS)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, caplog):
    left = tmp_path / ".model.gguf-0123456789ab"  # of a killed export
    (left / beside.CONTENT).mkdir(parents=True)
    (left / beside.CONTENT / "model.gguf").write_bytes(b"GGUF")
    (left / "LOCK").touch()
    order, replace, sync = [], os.replace, manifest.sync

    def synced(path):
        order.append((path.name, [one.suffix for one in tmp_path.iterdir()]))
        sync(path)

    def moved(source, target):
        order.append(os.fspath(target))
        replace(source, target)

    monkeypatch.setattr(manifest, "sync", synced)
    monkeypatch.setattr(os, "replace", moved)
    file = gguf_write.save(model(), tmp_path / "model.gguf")
    (name, before), target, (_, after) = order
    assert name == file.name and target == str(file) and after.count(".gguf") == 1
    assert len(before) == 1 and ".gguf" not in before  # nothing that a reader takes for a file
    assert list(tmp_path.iterdir()) == [file] and str(left) in caplog.text
