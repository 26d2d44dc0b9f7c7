"""How small: sizes that divide, and budgets met as nearly as the steps allow."""

import dataclasses

import pytest

from jaxdistill import budgets
from jaxdistill.compress import targets
from jaxdistill.errors import ConfigError
from jaxdistill.models import DecoderConfig, count_parameters

SMOLLM2 = DecoderConfig(
    "llama",
    vocab_size=49152,
    embed=576,
    mlp=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    tied_head=True,
)
LLAMA_8B = DecoderConfig(
    "llama",
    vocab_size=128256,
    embed=4096,
    mlp=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
)


def test_the_sizes_of_the_minitron_paper_give_its_parameters():
    """Llama-3.1-Minitron-4B: width 3072/9216 has 4.5 B parameters, depth 16 layers has 4.5 B."""
    assert round(count_parameters(LLAMA_8B) / 1e9, 2) == 8.03
    width = targets.resize(LLAMA_8B, {"embed": 3072, "mlp": 9216})
    depth = targets.resize(LLAMA_8B, {"layers": 16})
    assert round(count_parameters(width) / 1e9, 2) == 4.51
    assert round(count_parameters(depth) / 1e9, 2) == 4.54


def test_a_budget_is_met_and_hardly_missed():
    for budget, axes in (("60%", ("embed", "mlp")), ("100M", ("layers",)), ("75%", ("mlp",))):
        small = targets.fit(SMOLLM2, parameters=budget, axes=axes)
        limit = budgets.amount(budget, count_parameters(SMOLLM2))
        assert count_parameters(small) <= limit
        left = (
            dataclasses.replace(small, mlp=small.mlp + 64)
            if "mlp" in axes
            else dataclasses.replace(small, layers=small.layers + 1)
        )
        assert count_parameters(left) > limit
        untouched = {"embed", "mlp", "layers"} - set(axes)
        assert all(getattr(small, a) == getattr(SMOLLM2, a) for a in untouched)
        assert small.embed % 64 == 0 and small.mlp % 64 == 0


def test_memory_counts_bytes_of_the_dtype():
    half = targets.fit(SMOLLM2, memory="150MiB", axes=("layers",))
    whole = targets.fit(SMOLLM2, memory="300MiB", axes=("layers",), dtype="float32")
    assert half == whole
    assert 2 * count_parameters(half) <= 150 * 2**20 < 2 * count_parameters(half) + 2 * 3_600_000


def test_everything_may_stay():
    assert targets.fit(SMOLLM2, parameters="100%") == SMOLLM2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"embed": 600}, "prune.embed = 600: the model has 576"),
        ({"layers": 0}, "prune.layers = 0: the model has 30"),
        ({"heads": 7}, "must be a multiple of kv_heads .3."),
        ({"heads": 6, "kv_heads": 1}, "at most 3"),
        ({"kv_heads": 4}, "prune.kv_heads = 4: the model has 3"),
    ],
)
def test_sizes_that_cannot_be_cut_are_refused(sizes, words):
    with pytest.raises(ConfigError, match=words):
        targets.resize(SMOLLM2, sizes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parameters": "1M"}, "the smallest such model has 6,467,392 parameters"),
        ({"parameters": "10M", "axes": ("layers",)}, "the smallest such model has 31,"),
        ({"parameters": "6 apples"}, "write 60%, 80M or 1.5B"),
        ({"parameters": "160%"}, "write 60%"),
        ({"memory": "4GB"}, "write 4GiB"),
        ({"parameters": "60%", "memory": "1GiB"}, "give one budget"),
        ({"parameters": "60%", "axes": ("vocab",)}, "must be some of layers"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        targets.fit(SMOLLM2, **options)


def test_a_latency_is_met_by_the_largest_model_that_is_fast_enough():
    asked = []

    def measured(config):  # 1 us for a million parameters
        asked.append(count_parameters(config))
        return asked[-1] / 1e6

    small, took = targets.fit_latency(SMOLLM2, "60%", measured, axes=("layers",))
    whole = count_parameters(SMOLLM2) / 1e6
    assert took == {"before": whole, "budget": int(whole * 0.6), "after": asked_of(small)}
    larger = targets.resize(SMOLLM2, {"layers": small.layers + 1})
    assert asked_of(small) <= took["budget"] < asked_of(larger)
    assert len(asked) <= 8


def asked_of(config):
    return count_parameters(config) / 1e6


def test_a_latency_that_is_there_already_changes_nothing():
    assert targets.fit_latency(SMOLLM2, "5s", lambda _: 3.0)[0] == SMOLLM2


@pytest.mark.parametrize(
    ("latency", "words"),
    [("1%", "the smallest such model takes 0.09 ms here"), ("4 apples", "write 60%, 12ms")],
)
def test_latencies_that_cannot_be_met_are_refused(latency, words):
    with pytest.raises(ConfigError, match=words):
        targets.fit_latency(SMOLLM2, latency, lambda config: 90.0 + config.mlp / SMOLLM2.mlp)
