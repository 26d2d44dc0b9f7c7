"""Tiny tokenizers, built here: bytes, trained merges, words, and a SentencePiece look-alike."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
ENGLISH = [
    "the cat sat on the mat and the dog sat on the log",
    "assistant user system hello there, how are you today?",
    "a model that learns from another model is called a student",
    "<|x|> <|y|>",
] * 4


def _chat(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **options,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _byte_level(vocab_size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(ENGLISH, trainer)
    return backend


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte of UTF-8 is one token; 3 special tokens come first."""
    return _chat(_byte_level(256 + len(SPECIAL)))


@pytest.fixture(scope="session")
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges."""
    return _chat(_byte_level(360))


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces; the special strings are words of the vocabulary too."""
    words = ["<unk>", *SPECIAL, "a", "b", "c", "user", "assistant", "<", "|im_end|>", "|end|>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _chat(backend, unk_token="<unk>")


@pytest.fixture(scope="session")
def prefix_tokenizer() -> PreTrainedTokenizerFast:
    """Puts <s> before a text and a space before its first word, as SentencePiece models do."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", *SPECIAL], show_progress=False
    )
    backend.train_from_iterator([*ENGLISH, "<|im_end|>\n|_"], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return _chat(backend, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def folding_tokenizer() -> PreTrainedTokenizerFast:
    """Its normaliser turns full-width characters into ASCII before it looks for special tokens."""
    backend = _byte_level(256 + len(SPECIAL))
    backend.normalizer = normalizers.NFKC()
    # Rebuilt, because tokens added by the trainer are looked for before normalisation.
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["normalized"] = True
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=AddedToken("<|end|>", normalized=True, special=True),
        additional_special_tokens=[
            AddedToken(name, normalized=True, special=True) for name in SPECIAL[1:]
        ],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def jsonl(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Writes objects, or raw bytes, one a line."""

    def write(lines: list[Any], name: str = "data.jsonl") -> pathlib.Path:
        path = tmp_path / name
        encoded = [
            line if isinstance(line, bytes) else json.dumps(line).encode("utf-8") for line in lines
        ]
        path.write_bytes(b"".join(line + b"\n" for line in encoded))
        return path

    return write
