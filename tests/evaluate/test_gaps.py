"""Gaps of samples: log q - log p of an answer's tokens, whatever stands around them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.evaluate.gaps import Reader, token_gaps
from jaxdistill.models import DecoderConfig, decoder


def test_the_gaps_of_answers_are_those_of_each_alone():
    """Against a softmax in float64 of each text by itself, over the tokens of the vocabulary."""
    config = DecoderConfig(
        "llama", vocab_size=40, layers=1, embed=16, mlp=24, heads=2, kv_heads=1, head_dim=8
    )
    pair = [models.random(config, seed=seed) for seed in (1, 2)]
    prompts, answers = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10, 11]]
    found = token_gaps(
        *(Reader(config, jnp.float32, one.params) for one in pair), 36, prompts, answers
    )
    for prompt, answer, ours in zip(prompts, answers, found, strict=True):
        said = []
        for one in pair:
            whole = jnp.asarray([[*prompt, *answer]])
            outputs = decoder.apply(config, one.params, whole, compute_dtype=jnp.float32)
            logits = np.asarray(decoder.logits(outputs)[0], np.float64)[:, :36]
            logits -= np.log(np.exp(logits).sum(1, keepdims=True))
            places = np.arange(len(answer)) + len(prompt) - 1
            said.append(logits[places, answer])
        assert ours.shape == (len(answer),)
        np.testing.assert_allclose(ours, said[0] - said[1], atol=1e-5)
    same = token_gaps(*[Reader(config, jnp.float32, pair[0].params)] * 2, 40, prompts, answers)
    assert [one.tolist() for one in same] == [[0, 0], [0] * 5] == [pytest.approx(o) for o in same]
