"""Sizes and FLOPs against published parameter counts and a count by hand."""

import jax
import pytest

from jaxdistill.models import architecture, decoder
from jaxdistill.models.architecture import DecoderConfig

# Published models: the numbers are those of their checkpoints on the Hub.
PUBLISHED = {
    "SmolLM2-135M": (
        DecoderConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, tied_head=True),
        134_515_008,
    ),
    "Llama-3.2-1B": (
        DecoderConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, tied_head=True),
        1_235_814_400,
    ),
    "Llama-3.1-8B": (DecoderConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128), 8_030_261_248),
    "Mistral-7B-v0.1": (
        DecoderConfig("mistral", 32000, 4096, 14336, 32, 32, 8, 128),
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        DecoderConfig(
            "qwen2", 151936, 896, 4864, 24, 14, 2, 64, attention_bias=True, tied_head=True
        ),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        DecoderConfig("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, qk_norm=True, tied_head=True),
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    config, expected = PUBLISHED[name]
    assert architecture.count_parameters(config) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_the_tree(tied):
    config = DecoderConfig("llama", 50, 16, 24, 2, 4, 2, 4, mlp_bias=True, tied_head=tied)
    leaves = jax.tree.leaves(decoder.shapes(config))
    assert architecture.count_parameters(config) == sum(leaf.size for leaf in leaves)
    tables = 50 * 16 * (1 if tied else 2)
    expected = architecture.count_parameters(config) - tables
    assert architecture.count_non_embedding_parameters(config) == expected


def test_flops_equal_a_count_by_hand():
    config = DecoderConfig("mistral", 50, 16, 24, 2, 4, 2, 4, windows=(3, None))
    length, total = 7, 0
    for place in range(length):
        for window in config.windows:
            seen = min(place + 1, window or length)
            total += 2 * 16 * (16 + 8 + 8) + 2 * 16 * 16 + 3 * 2 * 16 * 24  # q, k, v; out; mlp
            total += 4 * seen * (2 * 4 + 2 * 4)  # heads; scores and mixing over head dim 4
        total += 2 * 50 * 16
    assert architecture.forward_flops_per_token(config, length) == pytest.approx(total / length)


def test_biases_and_norms_are_no_flops():
    plain = DecoderConfig("llama", 50, 16, 24, 2, 4, 2, 4)
    more = DecoderConfig("llama", 50, 16, 24, 2, 4, 2, 4, mlp_bias=True, qk_norm=True)
    flops = architecture.forward_flops_per_token
    assert flops(plain, 8) == flops(more, 8)


def test_a_configuration_is_a_key():
    first, second = (DecoderConfig("llama", 50, 16, 24, 2, 4, 2, 4) for _ in range(2))
    assert first == second and hash(first) == hash(second)
