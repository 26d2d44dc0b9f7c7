"""lm-eval's requests, answered by our model; its own base class does the splitting."""

import dataclasses
import sys
import types

import numpy as np
import pytest

from jaxdistill import api, models
from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.models.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def model():
    shape = models.DecoderConfig("llama", 259, 16, 16, 1, 2, 2, 8, max_positions=64)
    return models.random(shape, tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def adapter(model):
    pytest.importorskip("lm_eval.api.model", reason="needs lm-eval (jaxdistill[eval])")
    return api.adapter(model, batch_size=2)


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


def total(model, context, rest):
    """Log-probability of tokens from the model's full logits, in float64."""
    z = np.asarray(model.logits(np.asarray([context + rest])), np.float64)[0, :, :]
    z = z[:, : len(model.tokenizer.get_vocab())]
    z = z - z.max(-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return sum(logp[len(context) - 1 + i, token] for i, token in enumerate(rest))


def test_loglikelihoods_are_the_models(model, adapter):
    encode = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]
    requests = [request("2 + 2 =", " 4"), request("", "hello"), request("a b ", "c")]
    got = adapter.loglikelihood(requests, disable_tqdm=True)
    start = adapter.eot_token_id
    want = [
        total(model, encode("2 + 2 ="), encode(" 4")),
        total(model, [start], encode("hello")),
        total(model, encode("a b"), encode(" c")),  # the space goes to the continuation
    ]
    np.testing.assert_allclose([score for score, _ in got], want, rtol=1e-4)


def test_whole_texts_are_scored_in_windows(model, adapter):
    text = "x" * 100
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    (got,) = adapter.loglikelihood_rolling([request(text)])
    start = adapter.eot_token_id
    want = total(model, [start], ids[:63]) + total(model, [start], ids[63:])
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_generation_stops_at_the_stop_text(model, adapter):
    (whole,) = adapter.generate_until([request("ab", {"max_gen_toks": 8})])
    ids = model.tokenizer("ab", add_special_tokens=False)["input_ids"]
    new = model.generate([ids], max_new_tokens=8)[0]
    assert whole == model.tokenizer.decode(new, skip_special_tokens=True) and len(whole) > 2
    (cut,) = adapter.generate_until([request("ab", {"until": [whole[2]], "max_gen_toks": 8})])
    assert cut == whole.split(whole[2])[0] != whole
    with pytest.raises(ConfigError, match="max_gen_toks = 64"):
        adapter.generate_until([request("ab", {"max_gen_toks": 64})])


def test_what_is_missing_is_told(model, monkeypatch):
    if "lm_eval" in sys.modules:
        with pytest.raises(ModelError, match="no tokenizer"):
            api.adapter(dataclasses.replace(model, tokenizer=None))
    monkeypatch.setitem(sys.modules, "lm_eval.api", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxdistill\[eval\]'"):
        api.adapter(model)
