"""Generation against transformers and against a loop without a cache."""

import dataclasses
import re
import warnings

import jax
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.errors import ModelError
from jaxdistill.models import decoding, generator
from tests.also import also
from tests.models import oracle

NAMES = ["mistral_window", "qwen3", "smollm2", *also("llama3", "qwen2_windows")]
PROMPTS = [
    [5, 9, 11, 30, 2, 8, 17],
    [40],
    [3, 3, 3, 3, 21, 22, 23, 24, 25, 7, 8, 9, 10, 11, 12, 13, 14],
]


def _endless(model):
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=()))


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    raw = oracle.CASES[request.param]
    folder = oracle.write_folder(tmp_path_factory.mktemp("model"), raw)
    return raw, folder, _endless(models.load(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    raw = oracle.CASES["qwen3"]
    return _endless(models.load(oracle.write_folder(tmp_path_factory.mktemp("one"), raw)))


def _without_cache(raw, prompt, count):
    """Greedy continuation by running the numpy decoder on everything so far, again and again."""
    named, row = oracle.tensors(raw), list(prompt)
    for _ in range(count):
        row.append(int(oracle.logits(raw, named, np.asarray([row]))[0, -1].argmax()))
    return row[len(prompt) :]


def test_greedy_equals_a_loop_without_a_cache(case):
    raw, _, model = case
    new = model.generate(PROMPTS, max_new_tokens=12)
    assert new == [_without_cache(raw, prompt, 12) for prompt in PROMPTS]


@pytest.mark.torch
def test_greedy_equals_transformers(case, transformers_model):
    import torch

    _, folder, model = case
    theirs = transformers_model(folder)
    new = model.generate(PROMPTS, max_new_tokens=20)
    for prompt, ours in zip(PROMPTS, new, strict=True):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
            )
        assert ours == expected[0, len(prompt) :].tolist()


def test_a_row_does_not_depend_on_its_neighbours(model):
    together = model.generate(PROMPTS, max_new_tokens=10)
    assert together == [model.generate([prompt], max_new_tokens=10)[0] for prompt in PROMPTS]
    first = model.generate(PROMPTS[:1], max_new_tokens=10, temperature=1.0, seed=3)
    assert first[0] == model.generate(PROMPTS, max_new_tokens=10, temperature=1.0, seed=3)[0]


def test_rows_stop_at_their_own_end(model):
    free = model.generate(PROMPTS, max_new_tokens=12)
    end = free[0][4]
    config = dataclasses.replace(model.config, eos_ids=(59, end))
    ended = dataclasses.replace(model, config=config).generate(PROMPTS, max_new_tokens=12)
    for row, short in zip(free, ended, strict=True):
        assert short == (row[: row.index(end)] if end in row else row)
    assert len(ended[0]) <= 4


def test_draws_are_repeatable_and_differ_by_seed_and_row(model):
    options = {"max_new_tokens": 16, "temperature": 1.5}
    prompts = [[5, 9, 11]] * 3
    first = model.generate(prompts, seed=1, **options)
    assert first == model.generate(prompts, seed=1, **options)
    assert first != model.generate(prompts, seed=2, **options)
    assert len({tuple(row) for row in first}) == 3


def test_one_candidate_is_greedy(model):
    greedy = model.generate(PROMPTS, max_new_tokens=8)
    for setting in ({"top_k": 1}, {"top_p": 1e-6}):
        assert model.generate(PROMPTS, max_new_tokens=8, temperature=2.0, **setting) == greedy


def test_lengths_share_programs(model):
    for program in (decoding.read, decoding.advance):
        program.clear_cache()
    for length, new in ((1, 18), (7, 16), (16, 8)):
        model.generate([list(range(3, 3 + length))], max_new_tokens=new)
    for temperature in (0.5, 0.9):
        for top_k in (3, 7):
            model.generate([[4]], max_new_tokens=20, temperature=temperature, top_k=top_k)
    assert decoding.read._cache_size() == 1
    assert decoding.advance._cache_size() == 2
    lengths = [generator.bucket(length) for length in (1, 16, 17, 25, 33, 49, 65)]
    assert lengths == [16, 16, 24, 32, 48, 64, 96]


def test_a_mesh_generates_the_same(model, mesh8, tmp_path):
    models.save(model, tmp_path / "model")
    spread = _endless(models.load(tmp_path / "model", mesh=mesh8))
    assert spread.generate(PROMPTS, max_new_tokens=6) == model.generate(PROMPTS, max_new_tokens=6)


def test_texts_go_through_the_tokenizer(model):
    class Letters:
        def __call__(self, texts):
            return {"input_ids": [[ord(letter) - 60 for letter in text] for text in texts]}

        def decode(self, row, skip_special_tokens):
            assert skip_special_tokens
            return "".join(chr(token + 60) for token in row)

        def get_vocab(self):
            return {str(row): row for row in range(model.config.vocab_size)}

    spoken = dataclasses.replace(model, tokenizer=Letters())
    texts = spoken.generate(["ABC", "Z"], max_new_tokens=5)
    rows = model.generate([[5, 6, 7], [30]], max_new_tokens=5)
    assert texts == ["".join(chr(token + 60) for token in row) for row in rows]


def test_no_prompts_no_texts(model):
    assert model.generate([], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature: -1.0 must be in [0, 1000]"),
        ({"temperature": float("nan")}, "temperature: nan must be in"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: 0 must be in"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p: 1.5 must be in (0, 1]"),
        ({"top_k": 5}, "top_k, top_p and min_p have no effect at temperature 0"),
        ({"prompts": ["text"]}, "has no tokenizer: give prompts as token ids"),
        ({"prompts": [[1], []]}, "prompt 1 must have tokens"),
        ({"prompts": [[61]]}, "prompt 0 must have tokens, each from 0 to 60"),
        ({"prompts": [[-1]]}, "prompt 0 must have tokens"),
    ],
)
def test_settings_out_of_range_are_named(model, change, message):
    options = {"prompts": [[1]], "max_new_tokens": 2} | change
    with pytest.raises(ModelError, match=re.escape(message)):
        model.generate(options.pop("prompts"), **options)


def test_bfloat16_generates(model):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.params)
    rows = dataclasses.replace(model, params=half).generate(PROMPTS, max_new_tokens=4)
    assert [len(row) for row in rows] == [4, 4, 4]
