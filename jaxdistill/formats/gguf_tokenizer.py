"""Builds a tokenizer from the metadata of a GGUF file."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxdistill.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_TOKEN = 2048  # characters; the longest in use are runs of spaces
SPACE = "\u2581"  # SentencePiece's visible space

# How text is cut before byte-level BPE, by `tokenizer.ggml.pre`.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _plain(pre):
    return pre.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits(pre):
    return pre.Sequence([pre.Digits(individual_digits=True), _plain(pre)])


def _split(pattern: str) -> Callable:
    def build(pre):
        from tokenizers import Regex

        return pre.Sequence(
            [
                pre.Split(Regex(pattern), behavior="isolated", invert=False),
                pre.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


PRE: Mapping[str, Callable] = {
    "default": _plain,
    "gpt-2": _plain,
    "smollm": _digits,
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
}


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> Any:
    """The transformers tokenizer that the metadata describes, chat template included.

    Args:
      metadata: values by GGUF key.
      where: the file, for messages.

    Returns:
      A `PreTrainedTokenizerFast`, which `save_pretrained` writes as tokenizer.json.

    Raises:
      ModelError: for a tokenizer model or pre-tokenizer that is not known here, or missing lists.
    """
    from jaxdistill.quiet_transformers import transformers

    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        raise ModelError(
            f"{where}: tokenizer.ggml.model: {str(kind)[:40]!r} is not supported; supported: "
            f"{', '.join(builders)}; load with tokenizer=False, or use the model's folder"
        )
    tokens, kinds = _words(metadata, where)
    try:
        backend = builders[kind](metadata, tokens, kinds, where)
        _add_special(backend, tokens, kinds)
        _add_ends(backend, metadata, tokens, kind)
    except (ModelError, KeyboardInterrupt):
        raise
    # The tokenizers library raises plain Exceptions, or panics, which Python sees as BaseException.
    except BaseException as error:
        raise ModelError(
            f"{where}: its tokenizer metadata cannot be used ({str(error)[:300]}); load with "
            "tokenizer=False, or use the model's folder"
        ) from error
    names = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {
            "bos_token": "bos",
            "eos_token": "eos",
            "unk_token": "unknown",
            "pad_token": "padding",
        }.items()
        if _valid(metadata.get(f"tokenizer.ggml.{key}_token_id"), tokens)
    }
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ModelError(f"{where}: tokenizer.chat_template: must be a text")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **names,
    )


def _words(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    """Tokens and their kinds, of sane lengths: merges are found by cutting every token."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    lists = isinstance(tokens, list) and isinstance(kinds, list)
    if not lists or not tokens or len(tokens) != len(kinds):
        raise ModelError(
            f"{where}: tokenizer.ggml.tokens and token_type must be lists of one length"
        )
    if not all(isinstance(token, str) and len(token) <= MAX_TOKEN for token in tokens):
        raise ModelError(
            f"{where}: tokenizer.ggml.tokens: must be texts of at most {MAX_TOKEN} characters"
        )
    return tokens, kinds


def tokens_of(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    """Token -> id, without what only fills the embedding up: such rows are no tokens."""
    pairs = enumerate(zip(tokens, kinds, strict=True))
    return {token: number for number, (token, kind) in pairs if kind != UNUSED}


def _valid(token: Any, tokens: list[str]) -> bool:
    whole = isinstance(token, int) and not isinstance(token, bool)
    return whole and 0 <= token < len(tokens)


def _byte_level(metadata, tokens, kinds, where):
    """Byte-level BPE with the file's merges (GPT-2, SmolLM2, Llama 3, Qwen)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE:
        raise ModelError(
            f"{where}: tokenizer.ggml.pre: {pre!r} is not known here; known: {', '.join(PRE)}; "
            "load with tokenizer=False, or use the model's folder"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = tokens_of(tokens, kinds)
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE[pre](pre_tokenizers)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata, tokens, kinds, where):
    """SentencePiece BPE with byte fallback (Llama 2, Mistral); scores say which merge is first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise ModelError(f"{where}: tokenizer.ggml.scores must be a list as long as the tokens")
    vocabulary = tokens_of(tokens, kinds)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=joins_of(tokens, kinds, scores, vocabulary),
            unk_token=tokens[unknown] if _valid(unknown, tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return backend


def joins_of(tokens, kinds, scores, vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best result first, then the earliest parts."""
    merges = []
    for token, kind, score in zip(tokens, kinds, scores, strict=True):
        if kind in (CONTROL, BYTE, UNKNOWN):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    merges.sort(key=lambda row: row[:3])
    return [row[3:] for row in merges]


def _add_special(backend, tokens, kinds) -> None:
    """Control tokens (dropped when decoding plain text) and user-defined ones match as a whole."""
    from tokenizers import AddedToken

    for control in (True, False):
        wanted = CONTROL if control else USER_DEFINED
        added = [
            AddedToken(token, special=control, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == wanted
        ]
        (backend.add_special_tokens if control else backend.add_tokens)(added)


def _add_ends(backend, metadata, tokens, kind) -> None:
    """Puts bos before and eos after a text where the file, or llama.cpp's default, asks for it."""
    from tokenizers import processors

    pre = metadata.get("tokenizer.ggml.pre")
    defaults = {"bos": kind == "llama" or pre == "llama-bpe", "eos": False}
    ends = {}
    for end, default in defaults.items():
        token = metadata.get(f"tokenizer.ggml.{end}_token_id")
        if metadata.get(f"tokenizer.ggml.add_{end}_token", default) and _valid(token, tokens):
            ends[end] = (tokens[token], token)
    if not ends:
        return
    first = f"{ends['bos'][0]} " if "bos" in ends else ""
    last = f" {ends['eos'][0]}" if "eos" in ends else ""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first}$A{last}",
        pair=f"{first}$A{last} {first}$B{last}",
        special_tokens=list(ends.values()),
    )
