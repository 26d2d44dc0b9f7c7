"""A served teacher that is asked about given text, against our own server."""

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs the extra api")

from jaxdistill.reasoning.scored import Scorer


def test_a_served_teacher_says_how_likely_given_text_is(port, talker):
    vocab = len(talker.tokenizer)
    made = Scorer(f"http://127.0.0.1:{port}/v1", "random:0", k=5, vocab=vocab, retries=0)
    texts = {"a": [7, 3, 200, 11, 64], "b": [(5 * place) % 200 for place in range(30)]}
    found = {one.job.tag[0]: one for one in made.score(list(texts.items()))}
    for name, tokens in texts.items():
        assert not found[name].failed, found[name].reason
        padded = np.zeros((1, 96), np.int64)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(talker.logits(padded)[0, : len(tokens) - 1], np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        best = np.argsort(-logp, axis=-1)[:, :5]
        np.testing.assert_array_equal(found[name].ids, best)
        expected = np.take_along_axis(logp, best, -1)
        np.testing.assert_allclose(found[name].logprobs, expected, atol=1e-4)
