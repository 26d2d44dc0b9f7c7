"""The student writes: as its generator does, whatever the slots; a stop drops all."""

import gc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models, teachers
from jaxdistill.data import batching
from jaxdistill.data.prompts import Prompt
from jaxdistill.errors import ModelError
from jaxdistill.models import DecoderConfig, decoder, quantized
from jaxdistill.rollouts.difference import ForwardPass, difference
from jaxdistill.rollouts.rows import rows_of
from jaxdistill.rollouts.writing import RolloutSampling, Writer

PROMPTS = {
    place: Prompt(np.asarray(tokens, np.int32), {})
    for place, tokens in {7: [1, 2, 3], 3: [4], 5: [5, 6, 7, 8, 9]}.items()
}


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig(
        "llama", vocab_size=40, layers=2, embed=16, mlp=24, heads=2, kv_heads=1, head_dim=8,
        max_positions=64, eos_ids=(11,),
    )  # fmt: skip
    return models.random(config, seed=1)


def writer(model, vocab=40, slots=4, **options):
    sampling = {"samples": 2, "max_new_tokens": 12, "temperature": 1.3, "seed": 3}
    own = {
        name: options.pop(name) for name in ("quantization", "stop", "tokenizer") if name in options
    }
    return Writer(
        model.config,
        vocab=vocab,
        sampling=RolloutSampling(**sampling | options),
        slots=slots,
        longest=5,
        compute_dtype=jnp.float32,
        **own,
    )


def test_answers_are_the_generators_in_the_order_of_places_whatever_the_slots(model):
    answers = writer(model).write(model.params, 9, PROMPTS)
    assert [(one.place, one.sample) for one in answers] == [
        (p, s) for p in (3, 5, 7) for s in (0, 1)
    ]
    expected = model.complete(
        [PROMPTS[place].tokens.tolist() for place in (3, 5, 7)],
        streams=[3, 5, 7], samples=2, max_new_tokens=12, temperature=1.3, seed=3,
    )  # fmt: skip
    for one, done in zip(answers, sum(expected, []), strict=True):
        assert one.tokens.tolist() == done.tokens and one.ended == done.ended
        assert one.version == 9 and one.prompt is PROMPTS[one.place]
        np.testing.assert_allclose(one.drawn_logprobs, done.drawn_logprobs, atol=1e-6)
    few = writer(model, slots=2).write(model.params, 9, PROMPTS)
    assert [one.tokens.tolist() for one in few] == [one.tokens.tolist() for one in answers]


def test_rows_behind_the_tokens_are_never_drawn(model):
    hot = {"temperature": 100.0, "samples": 8}  # every row of the head is as likely as another
    drawn = np.concatenate([a.tokens for a in writer(model, **hot).write(model.params, 0, PROMPTS)])
    assert drawn.max() >= 30
    few = writer(model, 30, **hot).write(model.params, 0, PROMPTS)
    assert max(one.tokens.max() for one in few) < 30
    mass = np.concatenate([one.logprobs for one in few])
    assert np.all(np.isfinite(mass)) and mass.mean() > np.log(1 / 40)


def test_ids_that_are_no_tokens_are_never_drawn(model):
    """A tokenizer with holes below its last token; log-probabilities are those of its tokens."""
    tokens = {str(index): index for index in range(36) if index % 3}
    tokenizer = types.SimpleNamespace(get_vocab=lambda: tokens)
    hot = {"temperature": 100.0, "samples": 8}
    answers = writer(model, 36, tokenizer=tokenizer, **hot).write(model.params, 0, PROMPTS)
    assert set(np.concatenate([one.tokens for one in answers]).tolist()) <= set(tokens.values())
    one = answers[0]
    whole = jnp.asarray([*one.prompt.tokens, *one.tokens])[None]
    logits = decoder.logits(
        decoder.apply(model.config, model.params, whole, compute_dtype=jnp.float32)
    )[0]
    known = np.asarray(logits, np.float64)[len(one.prompt.tokens) - 1 : -1][
        :, sorted(tokens.values())
    ]
    picked = np.asarray(logits, np.float64)[
        np.arange(len(one.tokens)) + len(one.prompt.tokens) - 1, one.tokens
    ]
    expected = picked - np.log(np.exp(known).sum(axis=1))
    np.testing.assert_allclose(one.logprobs, expected, atol=1e-5)


def test_weights_and_cache_are_gone_when_it_has_written(model):
    scribe = writer(model)
    scribe.write(model.params, 0, PROMPTS)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    scribe.write(model.params, 0, PROMPTS)
    gc.collect()
    left = [array.shape for array in jax.live_arrays() if id(array) not in before]
    assert not left


def test_a_stop_drops_what_is_under_way(model):
    calls = []
    stop = lambda: calls.append(1) or len(calls) >= 2
    long = writer(model, slots=1, samples=1, temperature=0.0, stop=stop)
    assert long.write(model.params, 0, PROMPTS) is None
    assert len(calls) == 2


def test_a_quantised_student_samples_quantised(model):
    from jaxdistill.compress import quantize

    few = writer(model, quantization=quantized.named("int8")).write(model.params, 0, PROMPTS)
    rounded = quantize.quantized(model, "int8")
    expected = writer(model).write(rounded.params, 0, PROMPTS)
    assert [one.tokens.tolist() for one in few] == [one.tokens.tolist() for one in expected]
    np.testing.assert_array_equal(few[0].logprobs, expected[0].logprobs)
    plain = writer(model).write(model.params, 0, PROMPTS)
    assert np.any(few[0].logprobs[0] != plain[0].logprobs[0])


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_the_sampler_is_compared_with_the_program_that_trains(model, scheme):
    """A student that is trained for a scheme writes, and is compared, as it computes there."""
    scheme = scheme and quantized.named(scheme)
    answers = writer(model, quantization=scheme).write(model.params, 0, PROMPTS)
    rows, logprobs = rows_of(
        answers, seq_len=17, pad=0, packing_by="none", sizes=(6,), distilled=None
    )
    compare = lambda params, scheme: difference(
        ForwardPass(model.config, 40, np.dtype("float32"), quantization=scheme),
        params,
        None,
        jax.tree.map(jnp.asarray, batching.stack(rows)),
        jnp.asarray(logprobs),
    )
    assert compare(model.params, scheme)["rollout/sampler_difference_max"] < 1e-5
    if scheme is None:
        moved = jax.tree.map(lambda leaf: 1.1 * leaf, model.params)
        told = compare(moved, None)
        assert 1e-3 < told["rollout/sampler_difference"] < told["rollout/sampler_difference_max"]
        assert told["rollout/sampler_kl"] > 0
    else:
        assert compare(model.params, None)["rollout/sampler_difference_max"] > 1e-4


def test_the_likely_tokens_of_student_and_teacher_are_compared(model):
    """Against NumPy's sort, of the answers' positions alone; a model agrees with itself."""
    answers = writer(model).write(model.params, 0, PROMPTS)
    rows, logprobs = rows_of(
        answers, seq_len=17, pad=0, packing_by="none", sizes=(6,), distilled=None
    )
    batch = jax.tree.map(jnp.asarray, batching.stack(rows))
    other = models.random(model.config, seed=2)
    teacher = teachers.online(model.config, compute_dtype=jnp.float32)
    program = ForwardPass(model.config, 40, np.dtype("float32"), teacher=teacher)
    told = difference(program, model.params, other.params, batch, jnp.asarray(logprobs))
    tops = [
        np.argsort(
            -np.asarray(
                decoder.logits(
                    decoder.apply(
                        one.config, one.params, batch.tokens, batch.positions,
                        batch.segment_ids, compute_dtype=jnp.float32,
                    )
                )
            ),
            -1,
        )[..., :8][batch.mask]
        for one in (model, other)
    ]  # fmt: skip
    shared = [len(set(one) & set(two)) / 8 for one, two in zip(*tops, strict=True)]
    assert 0 < told["rollout/overlap"] < 1
    assert told["rollout/overlap"] == pytest.approx(np.mean(shared), abs=1e-6)
    same = difference(program, model.params, model.params, batch, jnp.asarray(logprobs))
    assert same["rollout/overlap"] == 1


def test_prompts_that_cannot_be_answered_are_refused_by_number(model):
    long = [*PROMPTS.values(), Prompt(np.arange(60, dtype=np.int32) % 30, {})]
    with pytest.raises(ModelError, match="prompt 3 has 60 tokens"):
        writer(model).check(long)
