"""Measures of a model against float64 NumPy on the oracle's logits, and of known answers."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models, teachers
from jaxdistill.errors import DataError
from jaxdistill.evaluate import choices, distributions, meter, scoring, speed
from jaxdistill.kernels import linear_divergence
from jaxdistill.methods import measuring
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.sharding import make_mesh
from jaxdistill.train.step import make_loss, place
from tests.compress.conftest import batch_of
from tests.models import oracle

RAW = oracle.CASES["smollm2"]
ROWS = oracle.tokens(RAW, 8, 20, seed=7)
LENGTHS = [20, 20, 13, 20, 4, 20, 20, 0]


def load(folder, seed, mesh=None):
    named = oracle.tensors(RAW, seed)
    path = oracle.write_folder(folder / str(seed), RAW, named)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return models.load(path, mesh=mesh, dtype="float32", tokenizer=False), named


def measure(student, teacher, rows, *, vocab=61, mesh=None, lengths=LENGTHS, text_bytes=None):
    """All of the meter; no batch at all where `lengths` is None."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    config, params = (None, None) if teacher is None else (teacher.config, teacher.params)
    step = distributions.step(student.config, config, vocab=vocab, compute_dtype="float32")
    batches = [] if lengths is None else [place(batch_of(rows, lengths), mesh)]
    return meter.run(step, student.params, params, batches, {}, mesh, text_bytes=text_bytes)


def numpy_measures(rows, student, teacher, vocab):
    """Everything from float64 logits, in loops that a reader can check."""
    batch = batch_of(rows, LENGTHS)
    z = {
        name: oracle.logits(RAW, n, rows)[..., :vocab]
        for name, n in (("q", student), ("p", teacher))
    }
    soft = {k: np.exp(v - v.max(-1, keepdims=True)) for k, v in z.items()}
    soft = {k: v / v.sum(-1, keepdims=True) for k, v in soft.items()}
    found = []
    for b, i in zip(*np.nonzero(np.asarray(batch.mask)), strict=True):
        q, p, target = soft["q"][b, i], soft["p"][b, i], batch.targets[b, i]
        five = lambda v: set(np.argsort(-v)[:5].tolist())
        found.append(
            {
                "nll": -math.log(q[target]),
                "kl_t1": (p * np.log(p / q)).sum(),
                "reverse_kl": (q * np.log(q / p)).sum(),
                "acceptance": 1 - 0.5 * np.abs(p - q).sum(),
                "agree_top1": float(q.argmax() == p.argmax()),
                "agree_top5": len(five(q) & five(p)) / 5,
                "student_entropy": -(q * np.log(q)).sum(),
                "teacher_entropy": -(p * np.log(p)).sum(),
                "sure": q.max(),
                "hit": float(q.argmax() == target),
            }
        )
    mean = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = [r for r in found if low < r["sure"] <= low + 1 / 15]
        if inside:
            gap = np.mean([r["sure"] for r in inside]) - np.mean([r["hit"] for r in inside])
            ece += len(inside) / len(found) * abs(gap)
    return mean | {"ece": ece, "tokens": len(found)}


@pytest.mark.parametrize(("vocab", "numbers"), [(61, 1 << 24), (57, 8 * 57 * 3)])
def test_agreement_equals_float64(tmp_path, monkeypatch, vocab, numbers):
    """In one chunk, and in chunks of three positions with padded rows of the head left out."""
    monkeypatch.setattr(scoring, "CHUNK_NUMBERS", numbers)
    jax.clear_caches()
    rows = np.minimum(ROWS, vocab - 1)
    student, ours = load(tmp_path, 1)
    teacher, theirs = load(tmp_path, 2)
    got = measure(student, teacher, rows, vocab=vocab, text_bytes=1000)
    want = numpy_measures(rows, ours, theirs, vocab)
    assert got["eval/tokens"] == want["tokens"] == 19 * 5 + 13 + 4
    for name in (
        "kl_t1 reverse_kl acceptance agree_top1 agree_top5 ece student_entropy teacher_entropy"
    ).split():
        np.testing.assert_allclose(
            got[f"eval/{name}"], want[name], rtol=2e-4, atol=2e-5, err_msg=name
        )
    np.testing.assert_allclose(got["eval/perplexity"], math.exp(want["nll"]), rtol=1e-4)
    bits = want["nll"] * want["tokens"] / math.log(2) / 1000
    np.testing.assert_allclose(got["eval/bits_per_byte"], bits, rtol=1e-5)


def test_a_key_means_the_same_whichever_program_measures_it(tmp_path):
    """The training loss without gradient, and whole rows of logits."""
    student, _ = load(tmp_path, 1)
    teacher, _ = load(tmp_path, 2)
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = place(batch_of(ROWS, LENGTHS), mesh)
    loss = make_loss(student.config, measuring.against_teacher(vocab=61), compute_dtype="float32")
    fused = meter.run(
        meter.make_step(loss, teachers.online(teacher.config, compute_dtype="float32")),
        {"student": student.params, "objective": {}},
        teacher.params,
        [batch],
        {"alpha": jnp.float32(0.5), "temperature": jnp.float32(1.0)},
        mesh,
    )
    whole = measure(student, teacher, ROWS, vocab=61)
    assert set(fused) - set(whole) == {"eval/loss", "eval/divergence"}
    for name in set(fused) & set(whole):
        np.testing.assert_allclose(fused[name], whole[name], rtol=1e-5, err_msg=name)
    assert fused["eval/agree_top1"] == whole["eval/agree_top1"]
    alone = meter.run(
        meter.scoring_step(student.config, 61, compute_dtype="float32"),
        student.params, None, [batch], {}, mesh,
    )  # fmt: skip
    np.testing.assert_allclose(alone["eval/ce"], whole["eval/ce"], rtol=1e-5)


def test_two_likeliest_tokens_agree_with_either():
    """Of the teacher, in the program of whole rows as in the kernel of the training loss."""
    q, p = (jnp.asarray([[row]]) for row in ([0.0, 1.0, 2.0, 0.0], [3.0, 1.0, 3.0, 0.0]))
    whole = distributions._compared(q, p, jax.nn.log_softmax(q))["agree/top1"]
    _, fused = linear_divergence(q, jnp.eye(4), p, jnp.eye(4))
    assert whole.tolist() == [[1.0]] and float(fused["agree/top1"].value) == 1.0


def test_a_model_agrees_with_itself_and_on_any_mesh(tmp_path):
    student, _ = load(tmp_path, 1)
    same = measure(student, student, ROWS)
    assert abs(same["eval/kl_t1"]) < 1e-6 and abs(same["eval/reverse_kl"]) < 1e-6
    assert (same["eval/agree_top1"], same["eval/agree_top5"]) == (1.0, 1.0)
    assert abs(same["eval/acceptance"] - 1) < 1e-6
    mesh = make_mesh(data=2, fsdp=4)
    spread, _ = load(tmp_path, 1, mesh)
    eight = measure(spread, None, ROWS, mesh=mesh)
    np.testing.assert_allclose(eight["eval/perplexity"], same["eval/perplexity"], rtol=1e-5)
    assert "eval/kl_t1" not in eight and eight["eval/tokens"] == same["eval/tokens"]
    for lengths in (None, [0] * 8):
        with pytest.raises(DataError, match="no token"):
            measure(student, None, ROWS, lengths=lengths)


def test_a_calibrated_model_has_no_calibration_error():
    """As sure as it is right: 30 of 40 at 0.75, 9 of 10 at 0.9."""
    bins = np.zeros((15, 3))
    bins[11], bins[13] = (40, 30.0, 30), (10, 9.0, 9)
    bars, ece = meter.reliability(bins)
    assert ece == 0 and [bar["share"] for bar in bars] == [0.8, 0.2]
    bins[11, 2] = 20  # right half of the time only
    assert math.isclose(meter.reliability(bins)[1], 0.8 * 0.25)


def test_scores_of_continuations_equal_the_oracles(tmp_path):
    model, named = load(tmp_path, 1)
    pairs = [([1, 2, 3], [4, 5]), ([7], [8, 9, 10, 11]), (list(range(20, 40)), [3])]
    got = scoring.continuations(model, pairs, vocab=61, batch_size=2)
    for (context, rest), (score, greedy) in zip(pairs, got, strict=True):
        z = oracle.logits(RAW, named, np.asarray([context + rest]))[0]
        logp = z - z.max(-1, keepdims=True)
        logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
        places = range(len(context) - 1, len(context) + len(rest) - 1)
        want = sum(logp[i, t] for i, t in zip(places, rest, strict=True))
        np.testing.assert_allclose(score, want, rtol=1e-4)
        assert greedy == all(logp[i].argmax() == t for i, t in zip(places, rest, strict=True))
    best = int(oracle.logits(RAW, named, np.asarray([[1, 2, 3]]))[0, -1].argmax())
    assert scoring.continuations(model, [([1, 2, 3], [best])], vocab=61)[0][1]
    with pytest.raises(DataError, match="pair 1"):
        scoring.continuations(model, [([1], [2]), ([], [2])], vocab=61)


def test_long_contexts_lose_their_beginning(tmp_path):
    model, _ = load(tmp_path, 1)
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_positions=16))
    long, tail = list(range(40)), list(range(40))[-15:]
    got = scoring.continuations(short, [(long, [5, 6]), (tail, [5, 6])], vocab=61)
    assert got[0] == got[1]


@pytest.fixture(scope="module")
def counting():
    """A model that always expects the byte 'a', whatever came before."""
    shape = models.DecoderConfig("llama", 259, 8, 8, 1, 1, 1, 8, tied_head=False)
    model = models.random(shape, tokenizer=byte_tokenizer())
    params = jax.tree.map(jnp.zeros_like, model.params)
    params["embedding"] = jnp.ones_like(params["embedding"])
    params["final_norm"]["scale"] = jnp.ones_like(params["final_norm"]["scale"])
    a = model.tokenizer("a")["input_ids"][-1]
    params["head"] = params["head"].at[a].set(1.0)
    return dataclasses.replace(model, params=params)


def test_the_likeliest_answer_is_taken(counting, tmp_path):
    questions = [
        choices.ChoiceQuestion("x ", ("bbb", "aaa"), 1),
        choices.ChoiceQuestion("x ", ("aaa", "bbb"), 1),
        choices.ChoiceQuestion("x ", ("b", "aaab"), 1),  # one b costs less than one b and three a
    ]
    got = choices.accuracy(counting, questions, vocab=259, batch_size=4)
    assert got == {"accuracy": 1 / 3, "accuracy_per_byte": 2 / 3, "questions": 3}


def test_questions_of_both_spellings(tmp_path):
    file = tmp_path / "q.jsonl"
    plain = {"prompt": "One and one is", "choices": [" two", " three"], "answer": 0}
    aqua = {"question": "1+1?", "options": ["A)2", "B) 3"], "correct": "B"}
    file.write_text(json.dumps(plain) + "\n\n" + json.dumps(aqua) + "\n")
    first, second = choices.read(file)
    assert first == ("One and one is", (" two", " three"), 0)
    assert second == ("Question: 1+1?\nAnswer: ", ("2", "3"), 1)
    assert len(choices.read(file, limit=1)) == 1
    for line in (
        "{",
        '{"prompt": "a", "choices": ["b"], "answer": 0}',
        '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
        "[]",
    ):
        file.write_text(line)
        with pytest.raises(DataError, match="q.jsonl:1: must hold prompt, choices"):
            choices.read(file)
    with pytest.raises(DataError, match="cannot be read"):
        choices.read(tmp_path / "none")


def test_questions_made_of_texts():
    texts = [" ".join(f"w{i}x{j}" for j in range(70)) for i in range(6)]
    made = choices.from_texts(texts, 5, seed=1)
    assert len(made) == 5 and made == choices.from_texts(texts, 5, seed=1)
    for question in made:
        whole = question.prompt + question.choices[question.answer]
        assert any(text.startswith(whole) for text in texts)
        wrong = [c for i, c in enumerate(question.choices) if i != question.answer]
        assert not any(t.startswith(question.prompt + c) for t in texts for c in wrong)
    assert len({q.answer for q in choices.from_texts(texts, 6, seed=0)}) > 1
    with pytest.raises(DataError, match="4 are needed"):
        choices.from_texts(texts[:3], 5)


def test_speed_and_size(tmp_path):
    model, _ = load(tmp_path, 1)
    # An end token must not end a timing early.
    model = dataclasses.replace(
        model, config=dataclasses.replace(model.config, eos_ids=tuple(range(61)))
    )
    got = speed.measure(model, prompt_tokens=8, new_tokens=4, batch_size=2, repeats=3)
    assert got["prefill_ms_p95"] >= got["prefill_ms_p50"] > 0 < got["decode_tokens_per_second"]
    assert got["decode_ms_p95"] >= got["decode_ms_p50"] > 0
    sizes = speed.size(model.config, model.params)
    assert sizes["bytes"] == 4 * sizes["parameters"]
    assert speed.leaf_bytes(jnp.zeros((3, 5), jnp.int4)) == 8
    small, large = (speed.peak_bytes(model, 1, length) for length in (8, 64))
    assert small is None or sizes["bytes"] < small < large
