"""lm-eval's requests, answered by our model; its own base class does the splitting."""

import dataclasses
import sys
import types
import warnings

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
    want = total(model, [start], ids[:64]) + total(model, ids[36:64], ids[64:])
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


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A tokenizer that begins every text with BOS, as those of Llama, Mistral and Gemma do."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=begin
    )
    tokenizer.chat_template = CHAT
    shape = models.DecoderConfig("llama", 258, 32, 48, 2, 4, 2, 8, max_positions=64, eos_ids=(256,))
    made = models.random(dataclasses.replace(shape, bos_id=257, initializer_range=0.3))
    folder = tmp_path_factory.mktemp("begun") / "model"
    return models.load(models.save(dataclasses.replace(made, tokenizer=tokenizer), folder))


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo "}]


def test_texts_begin_as_the_tokenizer_begins_them(begun):
    """M8: [265, 71, 72] and prefix 265 for "hi", not [71, 72] and the end token."""
    pytest.importorskip("lm_eval.api.model", reason="needs lm-eval (jaxdistill[eval])")
    one = api.adapter(begun)
    h, i = begun.tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert (one.tok_encode("hi"), one.prefix_token_id, one.eot_token_id) == ([257, h, i], 257, 256)
    assert one.tok_encode("<s>hi") == [257, h, i]  # once
    context, rest = one._encode_pair("h", "i")
    assert (context, rest) == ([257, h], [i])
    asked = one.apply_chat_template(TURNS[:1])
    assert asked == "<s>[user]hi\n[assistant]" and one.tok_encode(asked).count(257) == 1
    assert one.apply_chat_template(TURNS, add_generation_prompt=False).endswith("[assistant]yo ")
    with pytest.raises(ConfigError, match="num_beams = 4: this option"):
        one.generate_until([request("a", {"num_beams": 4, "max_gen_toks": 4})])


@pytest.mark.torch
def test_every_answer_is_that_of_lm_evals_own_model(begun):
    """Log-likelihoods of pairs and texts, longer than the model too, greedy texts and prompts."""
    reason = "needs lm-eval (jaxdistill[eval])"
    hf = pytest.importorskip("lm_eval.models.huggingface", reason=reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf.HFLM(begun.source, dtype="float32", device="cpu", batch_size=2)
        ours = api.adapter(begun, batch_size=2)
        alike = lambda name, *asked: [
            getattr(one, name)([request(*each) for each in asked], disable_tqdm=True)
            for one in (theirs, ours)
        ]
        pairs = [("2 + 2 =", " 4"), ("", "hello"), ("a b ", "c"), ("y" * 90, "xyz"), ("<s>q", "a")]
        for (want, greedy), (got, best) in zip(*alike("loglikelihood", *pairs), strict=True):
            assert got == pytest.approx(want, rel=1e-5) and best == greedy
        texts = [("hello there",), ("x" * 150,), ("z" * 63,), ("z" * 64,)]
        want, got = alike("loglikelihood_rolling", *texts)
        assert got == pytest.approx(want, rel=1e-5)
        free, mine = alike("generate_until", *(
            (prompt, {"max_gen_toks": 12, "do_sample": False, "until": []})
            for prompt in ("ab", "hello you", "k" * 80)
        ))  # fmt: skip
        assert mine == free
        until = [text[3:5] for text in free if len(text) > 5][:1]
        options = {"max_gen_toks": 12, "do_sample": False, "until": until}
        stopped, mine = alike("generate_until", ("ab", options), ("hello you", options))
        assert mine == stopped != free[:2]
        for add in (True, False):
            want, got = (one.apply_chat_template(TURNS, add) for one in (theirs, ours))
            assert got == want


def test_what_is_missing_is_told(model, monkeypatch):
    if "lm_eval" in sys.modules:
        with pytest.raises(ModelError, match="no tokenizer"):
            api.adapter(dataclasses.replace(model, tokenizer=None))
    monkeypatch.setitem(sys.modules, "lm_eval.api", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxdistill\[eval\]'"):
        api.adapter(model)
