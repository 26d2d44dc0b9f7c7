"""The generation engine: as a reference without cache, for any slots, order and batch."""

import dataclasses
import operator
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken

from jaxdistill import models
from jaxdistill.errors import ModelError
from jaxdistill.models import decoding, generator, per_layer, ring, text
from jaxdistill.models.generator import Generator
from jaxdistill.models.requests import Request
from tests.also import also
from tests.models import oracle

PROMPTS = [
    [5, 9, 11, 30, 2, 8, 17],
    [40],
    [3, 3, 3, 3, 21, 22, 23, 24, 25, 7, 8, 9, 10, 11, 12, 13, 14],
    [12, 50, 33],
    [7, 6, 5, 4, 3],
]
DRAWN = {"temperature": 1.3, "max_new_tokens": 14, "seed": 7}


def _model(folder, name):
    model = models.load(oracle.write_folder(folder / "model", oracle.CASES[name]))
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=()))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return _model(tmp_path_factory.mktemp("window"), "qwen3_layer_types")


class Letters:
    """A tokenizer: token t is the letter with code t + 60."""

    def __call__(self, texts):
        return {"input_ids": [[ord(letter) - 60 for letter in text] for text in texts]}

    def decode(self, row, skip_special_tokens):
        return "".join(chr(token + 60) for token in row)

    def get_vocab(self):
        return {}


def _filtered(row, temperature, top_k=None, top_p=None, min_p=None):
    """Probabilities by the definitions, in float64, token by token."""
    scaled = np.asarray(row, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled, kind="stable")
    if top_k is not None:
        weights[order[top_k:]] = 0
    if top_p is not None:
        share = weights[order] / weights.sum()
        weights[order[np.cumsum(share) - share >= top_p]] = 0
    if min_p is not None:
        weights[weights < min_p * weights.max()] = 0
    return weights / weights.sum()


def _reference(raw, prompt, stream, sample, count, seed, **settings):
    """Draws by running the numpy decoder on everything so far, again and again."""
    named, row = oracle.tensors(raw), list(prompt)
    key = jax.random.key(seed)
    for name in (stream, sample):
        key = jax.random.fold_in(key, name)
    for number in range(count):
        share = _filtered(oracle.logits(raw, named, np.asarray([row]))[0, -1], **settings)
        uniform = float(jax.random.uniform(jax.random.fold_in(key, number)))
        row.append(int(np.argmax(np.cumsum(share) > uniform)))
    return row[len(prompt) :]


def _greedy(raw, prompt, count):
    named, row = oracle.tensors(raw), list(prompt)
    for _ in range(count):
        row.append(int(oracle.logits(raw, named, np.asarray([row]))[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
        *also({"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05}),
    ],
    ids=str,
)
def test_draws_equal_a_loop_without_a_cache(model, filters):
    raw, settings = oracle.CASES["qwen3"], {"temperature": 1.3, **filters}
    found = model.complete(PROMPTS[:3], samples=2, max_new_tokens=10, seed=7, **settings)
    for number, (prompt, rows) in enumerate(zip(PROMPTS, found, strict=False)):
        for sample, done in enumerate(rows):
            expected = _reference(raw, prompt, number, sample, 10, 7, **settings)
            assert done.tokens == expected


@pytest.mark.usefixtures("contracted")
def test_logprobs_are_those_of_a_training_forward(model):
    for settings in ({"temperature": 0.7, "top_p": 0.8}, {}):
        for row in model.complete(PROMPTS, samples=2, max_new_tokens=12, **settings):
            for done in row:
                whole = [*done.request.tokens, *done.tokens]
                logits = model.logits(np.asarray([whole]))[0]
                scores = jax.nn.log_softmax(logits)
                places = np.arange(len(done.request.tokens) - 1, len(whole) - 1)
                np.testing.assert_allclose(
                    done.logprobs, np.asarray(scores)[places, done.tokens], rtol=0, atol=1e-5
                )
                drawn = [1.0] * len(done.tokens)
                if settings:
                    pairs = zip(np.asarray(logits)[places], done.tokens, strict=True)
                    drawn = [_filtered(scores, **settings)[token] for scores, token in pairs]
                bound = 1e-5 / settings.get("temperature", 1.0)  # logits are divided by it
                np.testing.assert_allclose(done.drawn_logprobs, np.log(drawn), rtol=0, atol=bound)


def _by_stream(found):
    return {(d.request.stream, d.sample): d.tokens for row in found for d in row}


def test_samples_do_not_depend_on_batch_order_or_slots(model):
    together = _by_stream(model.complete(PROMPTS, samples=3, **DRAWN))
    assert len({tuple(tokens) for tokens in together.values()}) == 15
    order = [3, 0, 4, 2, 1]
    turned = model.complete([PROMPTS[i] for i in order], streams=order, samples=3, slots=4, **DRAWN)
    assert _by_stream(turned) == together
    for number, prompt in enumerate(PROMPTS):  # each alone, each sample from a prefill of its own
        for sample in range(3):
            alone = model.complete([prompt], streams=[number], samples=sample + 1, slots=1, **DRAWN)
            assert alone[0][sample].tokens == together[number, sample]


def test_free_slots_are_refilled_and_the_ring_wraps(windowed):
    # Rows of unequal length in 2 slots of 32 places: the common place goes round several times.
    raw = oracle.CASES["qwen3_layer_types"]
    expected = [_greedy(raw, prompt, 8 + 3 * number) for number, prompt in enumerate(PROMPTS[:4])]
    engine = Generator(windowed.config, windowed.params, slots=2, length=32)
    for number, prompt in enumerate(PROMPTS[:4]):
        engine.submit(Request(prompt, max_new_tokens=8 + 3 * number, tag=number))
    found = {done.request.tag: done.tokens for done in engine.run()}
    assert [found[number] for number in range(4)] == expected
    for again in range(3):  # the same generator goes on: nothing of earlier rows is left
        engine.submit(Request(PROMPTS[1], max_new_tokens=11, tag=again))
    assert [done.tokens for done in engine.run()] == [expected[1]] * 3


def test_many_samples_come_from_one_prefill(model, monkeypatch):
    read = []
    prefill = decoding.prefill
    monkeypatch.setattr(
        decoding, "prefill", lambda *given: read.append(given[2].shape) or prefill(*given)
    )
    engine = Generator(model.config, model.params, slots=4, length=32)
    engine.submit(Request(PROMPTS[0], samples=10, **DRAWN))
    found = sorted(engine.run(), key=lambda done: done.sample)
    assert [done.sample for done in found] == list(range(10)) and read == [(1, 16)]
    separate = [
        model.complete([PROMPTS[0]], samples=number + 1, streams=[0], **DRAWN)[0][number]
        for number in range(10)
    ]
    assert [done.tokens for done in found] == [done.tokens for done in separate]
    assert not engine._prefilled and not engine.busy


def test_stop_tokens_end_a_row_and_count(model):
    free = model.complete(PROMPTS, max_new_tokens=20)
    end = free[0][0].tokens[5]
    ended = model.complete(PROMPTS, max_new_tokens=20, stop_tokens=(end,))
    for (before,), (now,) in zip(free, ended, strict=True):
        if end not in before.tokens:
            assert (now.tokens, now.reason) == (before.tokens, "length")
            continue
        size = before.tokens.index(end) + 1
        assert (now.tokens, now.reason) == (before.tokens[:size], "stop")
        assert now.content == before.tokens[: size - 1] and len(now.logprobs) == size


def test_stop_strings_cut_the_text(model):
    spoken = dataclasses.replace(model, tokenizer=Letters())
    whole = spoken.complete(["ABC"], max_new_tokens=40)[0][0]
    written = text.text_of(spoken.tokenizer, whole)
    stop = written[21:23]
    place = written.index(stop)
    done = spoken.complete(["ABC"], max_new_tokens=40, stop=("never so", stop))[0][0]
    assert (text.text_of(spoken.tokenizer, done), done.reason) == (written[:place], "stop")
    assert done.tokens == done.content == whole.tokens[: place + 2]
    assert len(done.logprobs) == place + 2


def test_a_special_token_as_a_stop_string_ends_the_row(model):
    """Texts do not show it. Where it is an end token as well, the content is without it."""

    class Special(Letters):
        def decode(self, row, skip_special_tokens):
            return super().decode([token for token in row if token != end], True)

    free = model.complete(PROMPTS[:1], max_new_tokens=20)[0][0]
    end = free.tokens[5]
    place = free.tokens.index(end)
    Special.added_tokens_decoder = {
        end: AddedToken("<|eot_id|>", special=True),
        free.tokens[0]: AddedToken("<|plain|>", special=False),
    }
    spoken = dataclasses.replace(model, tokenizer=Special())
    stop = {"max_new_tokens": 20, "stop": ("<|plain|>", "<|eot_id|>")}
    done = spoken.complete(PROMPTS[:1], **stop)[0][0]
    assert (done.tokens, done.reason, done.ended) == (free.tokens[: place + 1], "stop", False)
    assert text.text_of(spoken.tokenizer, done) == Letters().decode(free.tokens[:place], True)
    ends = dataclasses.replace(spoken, config=dataclasses.replace(model.config, eos_ids=(end,)))
    assert ends.generate(PROMPTS[:1], **stop) == [free.tokens[:place]]


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_small_caches_stay_close(model, dtype, bound):
    exact = model.complete(PROMPTS, max_new_tokens=8)
    rough = model.complete(PROMPTS, max_new_tokens=8, cache_dtype=dtype)
    first = [abs(a[0].logprobs[1] - b[0].logprobs[1]) for a, b in zip(exact, rough, strict=True)]
    assert 0 < max(first) < bound


def test_a_mesh_draws_the_same(model, mesh8, tmp_path):
    models.save(model, tmp_path / "model")
    spread = models.load(tmp_path / "model", mesh=mesh8)
    spread = dataclasses.replace(spread, config=model.config)
    expected = _by_stream(model.complete(PROMPTS, samples=2, slots=8, **DRAWN))
    assert _by_stream(spread.complete(PROMPTS, samples=2, slots=8, **DRAWN)) == expected


def test_a_cancelled_request_is_forgotten(model):
    engine = Generator(model.config, model.params, slots=2, length=64)
    engine.submit(Request(PROMPTS[0], max_new_tokens=40, samples=4, tag="gone"))
    engine.submit(Request(PROMPTS[1], max_new_tokens=4, tag="kept"))
    engine.step()
    engine.cancel("gone")
    assert [done.request.tag for done in engine.run()] == ["kept"]
    assert not engine._prefilled


@pytest.fixture
def compiled():
    """What has been compiled since the test began."""
    names = []
    note = lambda name, *_, **__: names.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def _changed(params):
    """Other parameters that lie on their devices as these do."""
    return jax.tree.map(lambda leaf: -1.5 * leaf, params)


def _run(engine):
    for number, prompt in enumerate(PROMPTS):
        engine.submit(Request(prompt, max_new_tokens=9, tag=number))
    return [done.tokens for done in sorted(engine.run(), key=lambda done: done.request.tag)]


@pytest.mark.parametrize("on", ["one device", "a mesh"])
@pytest.mark.parametrize("dtype", ["bfloat16", *also("float32")])
def test_other_parameters_are_taken_without_compiling(model, mesh8, tmp_path, compiled, on, dtype):
    if on == "a mesh":
        models.save(model, tmp_path / "model")
        spread = models.load(tmp_path / "model", mesh=mesh8)
        model = dataclasses.replace(spread, config=model.config)
    options = {"slots": 8, "length": 32, "compute_dtype": dtype}
    other = _changed(model.params)
    engine = Generator(model.config, model.params, **options)
    first, before = _run(engine), len(compiled)
    assert before
    engine.use(other)
    second = _run(engine)
    engine.use(model.params)
    assert _run(engine) == first and len(compiled) == before
    assert second == _run(Generator(model.config, other, **options)) != first


def test_parameters_change_between_rows_only(model):
    engine = Generator(model.config, model.params, slots=2, length=32)
    engine.submit(Request(PROMPTS[0], max_new_tokens=20, samples=3))
    engine.step()
    with pytest.raises(ModelError, match="cannot change while 2 rows are under way"):
        engine.use(model.params)
    list(engine.run())
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.params)
    with pytest.raises(ModelError, match="must have the names, shapes and dtypes"):
        engine.use(half)
    engine.use(model.params)


def test_what_does_not_fit_is_refused(model):
    most = model.config.max_positions
    message = (
        "prompt 1 has 120 tokens, which with max_new_tokens = 10 do not fit the model's context of "
        f"{most}"
    )
    with pytest.raises(ModelError, match=re.escape(message)):
        model.complete([[1], [1] * 120], max_new_tokens=10)
    engine = Generator(model.config, model.params, slots=1, length=20)
    with pytest.raises(ModelError, match="do not fit the generator's rows of 20"):
        engine.submit(Request([1] * 11, max_new_tokens=10))
    assert not engine.busy
    for settings, rule in (
        ({"min_p": 2.0, "temperature": 1.0}, "min_p: 2.0 must be in"),
        ({"samples": 0}, "samples: 0 must be at least 1"),
        ({"seed": -1}, "seed: -1 must be from 0"),
    ):
        with pytest.raises(ModelError, match=re.escape(rule)):
            engine.submit(Request([1], max_new_tokens=2, **settings))
    for stop, rule in (("", "strings that are not empty"), ("x", "needs a tokenizer")):
        with pytest.raises(ModelError, match=rule):
            model.complete([[1]], max_new_tokens=2, stop=(stop,))
    with pytest.raises(ModelError, match="cache dtype: 'int3' is not one of"):
        Generator(model.config, model.params, slots=1, length=20, cache_dtype="int3")


def test_the_split_weights_belong_to_their_model(tmp_path):
    model = _model(tmp_path, "llama2")
    model.generate([[1]], max_new_tokens=1)
    kept = jax.tree.leaves(model._per_layer_params)
    model.generate([[1]], max_new_tokens=1)
    assert all(map(operator.is_, kept, jax.tree.leaves(model._per_layer_params)))
    again = per_layer.split(model.config, model._per_layer_params, np.float32)
    assert all(map(operator.is_, kept, jax.tree.leaves(again)))
    references = [weakref.ref(leaf) for leaf in kept]
    del model, kept, again
    assert not any(reference() for reference in references)
    assert generator.bucket(17) == 24


def test_a_model_given_up_is_held_once(tmp_path):
    model = _model(tmp_path, "smollm2")
    expected = model.complete(PROMPTS, samples=2, **DRAWN)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    model = _model(tmp_path / "again", "smollm2")
    stacked = jax.tree.leaves(model.params["layers"])
    single = model.consume_per_layer()
    assert all(leaf.is_deleted() for leaf in stacked)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(single.params)) == size
    engine = Generator(single.config, single.params, slots=8, length=40)
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(single.params)}
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(engine._params)} == held
    found = single.complete(PROMPTS, samples=2, **DRAWN)
    assert _by_stream(found) == _by_stream(expected)
    tokens, whole = np.asarray([PROMPTS[0]]), _model(tmp_path / "third", "smollm2")
    np.testing.assert_array_equal(single.logits(tokens), whole.logits(tokens))


def test_a_single_row_in_bfloat16_is_the_row_of_many(model):
    half = dataclasses.replace(
        model, params=jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.params)
    )
    many = half.complete(PROMPTS, max_new_tokens=6)
    alone = half.complete(PROMPTS[:1], max_new_tokens=6)
    assert alone[0][0].tokens == many[0][0].tokens
    np.testing.assert_allclose(alone[0][0].logprobs, many[0][0].logprobs, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_attention_to_a_small_cache_is_within_its_bound(model, dtype):
    """The bound that `ring` states, against float64."""
    config, rng = model.config, np.random.default_rng(0)
    rows, count = 3, np.asarray([7, 20, 1], np.int32)
    groups, size, width = config.kv_heads, config.head_dim, 20
    keys, values = (3 * rng.standard_normal((2, rows, groups, width, size))).astype(np.float32)
    query, key, value = (
        rng.standard_normal((rows, 1, heads, size)).astype(np.float32)
        for heads in (config.heads, groups, groups)
    )
    cache = ring.insert(
        ring.empty(config, rows, 32, dtype),
        ((jnp.asarray(keys), jnp.asarray(values)),) * config.layers,
        jnp.arange(rows),
        jnp.asarray(count),
    )
    attend = ring.attention(config, cache, jnp.asarray(count))
    _, mixed = attend(cache.layers[0], 0, *map(jnp.asarray, (query, key, value)))
    step = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "int8": 1 / 254}[dtype]
    for row in range(rows):
        for head in range(config.heads):
            group = head * groups // config.heads
            k = np.concatenate([keys[row, group, : count[row]], key[row, :, group]]).astype(float)
            v = np.concatenate([values[row, group, : count[row]], value[row, :, group]])
            score = k @ query[row, 0, head] / np.sqrt(size)
            share = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
            largest = np.abs(k).max(axis=1)
            moved = step * (np.abs(query[row, 0, head]).sum() * largest).max() / np.sqrt(size)
            bound = np.expm1(2 * moved) * np.abs(v).max() + step * np.abs(v).max() + 1e-5
            error = np.abs(np.asarray(mixed)[row, 0, head] - share @ v).max()
            assert error <= bound
            assert error > 1e-5 or dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_small_cache_is_spread_over_the_mesh(model, mesh8, tmp_path, dtype):
    models.save(model, tmp_path / "model")
    spread = dataclasses.replace(models.load(tmp_path / "model", mesh=mesh8), config=model.config)
    expected = model.complete(PROMPTS, slots=8, max_new_tokens=8, cache_dtype=dtype)
    found = spread.complete(PROMPTS, slots=8, max_new_tokens=8, cache_dtype=dtype)
    for (one,), (other,) in zip(expected, found, strict=True):
        # The second token has read the cache; later ones may part where a rounding turns a tie.
        assert one.tokens[:2] == other.tokens[:2]
        np.testing.assert_allclose(one.logprobs[:2], other.logprobs[:2], rtol=0, atol=0.02)
    engine = Generator(spread.config, spread.params, slots=8, length=32, cache_dtype=dtype)
    for leaf in jax.tree.leaves(engine._ring.layers):
        (shard, *_) = leaf.addressable_shards
        assert shard.data.size * 8 == leaf.size  # data 2 x fsdp 2 rows, tensor 2 heads
