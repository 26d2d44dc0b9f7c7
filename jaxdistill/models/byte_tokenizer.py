"""A tokenizer with one token per byte, for random models and for trying things out."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxdistill.quiet_transformers import transformers

END = "<end>"


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """257 tokens: the 256 bytes, then the end of a text; decodes to exactly what it read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
