"""One rule of vocabularies: what is added, renamed, padded or in another order changes no loss."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers import models as bpe
from transformers import PreTrainedTokenizerFast

from jaxdistill import commands, config, models
from jaxdistill.data import batching, spelling
from jaxdistill.errors import ConfigError, MismatchError
from jaxdistill.evaluate import meter
from jaxdistill.evaluate.perplexity import evaluate
from jaxdistill.formats import gguf_write
from jaxdistill.models import reseat
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.run import participants, setup, texts
from jaxdistill.train.step import place

pytestmark = pytest.mark.usefixtures("plain_runs")

CONFIG = """
run: {{name: pair, dir: {folder}/run}}
teacher: {{source: {teacher}, dtype: float32}}
student: {{source: {student}, compute_dtype: float32}}
tokenizer: {{from: student}}
data:
  train: [{{path: {data}/train.txt, format: paragraphs}}]
  eval: [{{path: {data}/eval.txt, format: paragraphs}}]
  seq_len: 32
  cache_dir: {data}/cache
method: {{name: kd, alpha: 0.3}}
train: {{steps: 1, batch_size: 8}}
"""
SHAPE = models.DecoderConfig(
    "llama", vocab_size=257, embed=16, mlp=16, layers=1, heads=2, kv_heads=1, head_dim=8,
    tied_head=False,
)  # fmt: skip


def with_tokens(model, *names):
    """The model with control tokens more, and random rows for them."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    rng, params = np.random.default_rng(7), dict(model.params)
    for name in ("embedding", "head"):
        more = rng.normal(size=(len(names), SHAPE.embed)).astype(np.float32)
        params[name] = np.concatenate([params[name], more])
    arch = models.DecoderConfig(**{**SHAPE.__dict__, "vocab_size": 257 + len(names)})
    return models.Model(arch, params, tokenizer, "made")


def in_other_order(model, seed):
    """The same model under other ids: the tokenizer's and the rows' alike."""
    order = np.random.default_rng(seed).permutation(257)
    content = json.loads(model.tokenizer.backend_tokenizer.to_str())
    new = {int(old): place for place, old in enumerate(order)}
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {word: new[index] for word, index in vocab.items()}
    for one in content["added_tokens"]:
        one["id"] = new[one["id"]]
    content["model"]["vocab"]["<end>"] = new[256]  # an added token keeps the id it has there
    rows = {name: model.params[name][order] for name in ("embedding", "head")}
    return models.Model(SHAPE, {**model.params, **rows}, tokenizer_of(content), "made")


def tokenizer_of(content):
    core = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def padded(model, rows):
    params = dict(model.params)
    for name in ("embedding", "head"):
        params[name] = np.pad(params[name], ((0, rows), (0, 0)), constant_values=0.5)
    arch = models.DecoderConfig(**{**SHAPE.__dict__, "vocab_size": 257 + rows})
    return models.Model(arch, params, model.tokenizer, "made")


@pytest.fixture(scope="module")
def made():
    """(teacher, student): random models of one shape over bytes."""
    one = lambda seed: models.random(SHAPE, seed, "float32")
    return tuple(
        models.Model(SHAPE, jax.tree.map(np.asarray, one(seed).params), byte_tokenizer(), "made")
        for seed in (1, 2)
    )


@pytest.fixture
def loss_of(data, tmp_path_factory):
    """(teacher, student, overrides) -> named means of the first batch, and the models."""

    def measure(teacher, student, *overrides):
        folder = tmp_path_factory.mktemp("pair")
        for name, model in (("teacher", teacher), ("student", student)):
            models.save(model, folder / name)
        text = CONFIG.format(
            folder=folder, data=data, teacher=folder / "teacher", student=folder / "student"
        )
        loaded = config.loads(text, overrides=overrides)
        mesh = setup.mesh_of(loaded)
        shapes = participants.shapes_of(loaded, mesh)
        dataset = texts.data_of(loaded.data, shapes.tokenizer)
        shapes.pairing.check(dataset)
        both = participants.load_models(loaded, shapes, mesh)
        method = setup.method_of(loaded, both)
        step = meter.make_step(method.loss, method.teacher)
        _, batch = next(iter(batching.eval_batches(dataset["train"], batch_size=8, rows=range(8))))
        params = {"student": both.student.params, "objective": {}}
        with jax.set_mesh(mesh):
            means = step(params, both.teacher.params, place(batch, mesh), method_knobs(loaded))
        return {name: float(mean.value) for name, mean in jax.device_get(means).items()}, both

    return measure


def method_knobs(loaded):
    return {"alpha": np.float32(loaded.method.alpha), "temperature": np.float32(1.0)}


def test_order_padding_and_the_teachers_additions_change_nothing(made, loss_of):
    teacher, student = made
    expected, _ = loss_of(teacher, student)
    for theirs, ours in [
        (in_other_order(teacher, 3), student),
        (in_other_order(teacher, 3), in_other_order(student, 4)),
        (padded(teacher, 7), student),
        (teacher, padded(student, 63)),
        (with_tokens(teacher, "[PAD]", "<think>"), student),
    ]:
        found, both = loss_of(theirs, ours)
        assert both.pairing.columns is None
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("rows", [0, 15])
def test_a_gguf_file_padded_or_not_is_one_vocabulary_with_its_folder(rows, made, loss_of, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf (the extra quickstart)")
    teacher, student = made
    expected, _ = loss_of(teacher, student)
    file = gguf_write.save(padded(teacher, rows), tmp_path / "teacher.gguf", "F32")
    found, both = loss_of(teacher, student, f"teacher={{source: {file}, dtype: float32}}")
    assert both.pairing.columns is None and not both.pairing.lines()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def test_a_token_that_the_student_adds_is_masked(made, loss_of):
    teacher, student = made
    expected, _ = loss_of(teacher, student, "method.alpha=0")
    longer = with_tokens(student, "<think>")
    found, both = loss_of(in_other_order(teacher, 3), longer, "method.alpha=0")
    assert both.pairing.columns == tuple(range(257))
    assert both.pairing.lines()["teacher"].startswith("shared: 257 of 258 tokens are shared")
    for name in ("loss", "loss/divergence", "loss/kl_t1"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, err_msg=name)
    # The tokenizer of the teacher leaves the added row out of cross-entropy too.
    fewer, _ = loss_of(teacher, longer, "tokenizer.from=teacher")
    plain, _ = loss_of(teacher, student)
    np.testing.assert_allclose(fewer["loss"], plain["loss"], rtol=2e-5)


def test_a_divergence_of_whole_rows_says_what_it_needs(made, loss_of):
    with pytest.raises(ConfigError, match="tokenizer.from: teacher"):
        loss_of(made[0], with_tokens(made[1], "<think>"), "method={name: akl}")


def test_data_that_hold_what_is_not_shared_are_refused(made, loss_of):
    teacher, student = made
    words = json.loads(teacher.tokenizer.backend_tokenizer.to_str())
    words["model"]["vocab"]["\u0123"] = words["model"]["vocab"].pop("e")  # no letter of a byte
    without = models.Model(SHAPE, teacher.params, tokenizer_of(words), "made")
    with pytest.raises(MismatchError, match=r"teacher: \d+ of \d+ tokens of data.train .*'e'"):
        loss_of(without, student)


def test_a_student_without_rows_for_the_tokenizer_is_refused(made, loss_of):
    with pytest.raises(Exception, match="257 rows, but the tokenizer's ids reach 257"):
        loss_of(with_tokens(made[0], "<think>"), made[1], "tokenizer.from=teacher")


def test_rows_that_are_no_tokens_are_never_written(made):
    """A head whose padding rows win everywhere else."""
    model = padded(made[0], 7)
    head = model.params["head"].copy()
    head[257:] *= 1e4
    params = jax.tree.map(jax.numpy.asarray, {**model.params, "head": head})
    loud = models.Model(model.config, params, model.tokenizer)
    tokens = loud.generate([[104, 105]], max_new_tokens=8)[0]
    assert len(tokens) and max(tokens) < 257
    bare = models.Model(model.config, params).generate([[104, 105]], max_new_tokens=8)[0]
    assert max(bare) >= 257


def test_a_student_with_a_tokenizer_of_its_own(made, data, tmp_path):
    """Rows of new tokens are means of those that spell them; the teacher is not compared."""
    teacher, _ = made
    models.save(teacher, tmp_path / "teacher")
    content = json.loads(teacher.tokenizer.backend_tokenizer.to_str())
    letters = sorted(content["model"]["vocab"], reverse=True)
    content["model"]["vocab"] = {word: place for place, word in enumerate([*letters, "th", "the"])}
    content["model"]["merges"] = [["t", "h"], ["th", "e"]]
    content["added_tokens"][0]["id"] = 258
    folder = tmp_path / "words"
    tokenizer_of(content).save_pretrained(folder)
    text = CONFIG.format(folder=tmp_path, data=data, teacher=tmp_path / "teacher", student="")
    cut = f"student={{from: teacher, tokenizer: {folder}, compute_dtype: float32}}"
    loaded = config.loads(text, overrides=(cut, "method={name: sft}", "eval.compare=false"))
    mesh = setup.mesh_of(loaded)
    shapes = participants.shapes_of(loaded, mesh)
    assert shapes.vocab == 259 and shapes.teacher is None and shapes.pairing.aside
    shapes.pairing.check(texts.data_of(loaded.data, shapes.tokenizer))
    student = participants.load_models(loaded, shapes, mesh).student
    assert student.config.vocab_size == 259 and student.config.eos_ids == (258,)
    ranked = config.loads(
        text, overrides=(cut, "method={name: sft}", "checkpoint.best_metric=eval/kl_t1")
    )
    with pytest.raises(ConfigError, match="measured against a teacher, and this one lacks"):
        participants.shapes_of(ranked, mesh)
    old = teacher.tokenizer.get_vocab()
    for name in ("embedding", "head"):
        rows, before = np.asarray(student.params[name]), teacher.params[name]
        for token, index in shapes.tokenizer.get_vocab().items():
            spelled = [old[token]] if token in old else [old[letter] for letter in token]
            np.testing.assert_allclose(rows[index], before[spelled].mean(0), rtol=1e-6)
    drawn = config.loads(
        text,
        overrides=(cut[:-1] + ", embeddings: random}", "method={name: sft}", "eval.compare=false"),
    )
    other = participants.load_models(drawn, participants.shapes_of(drawn, mesh), mesh).student
    spread = np.asarray(other.params["embedding"]).std()
    assert other.params["embedding"].shape == (259, 16) and 0.018 < spread < 0.022
    kept = lambda model: model.params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kept(other), kept(teacher))


def test_rows_on_a_mesh_are_those_of_one_device(mesh8):
    """Other numbers of rows, which the axes divide or not; none has a row of zeros, unsaid."""
    model = models.random(SHAPE, 1, "float32", mesh8)
    for count in (264, 255):
        ids = np.random.default_rng(count).permutation(257)[:count].tolist()
        ids += [-1] * (count - len(ids))
        moved = reseat.reseated(model, ids, masked=[3])
        spelled = [[i, 5] if i >= 0 else [] for i in ids]
        arch = dataclasses.replace(SHAPE, vocab_size=count)
        means = reseat.respelled(model, spelled, arch)
        for name in ("embedding", "head"):
            before, after = np.asarray(model.params[name]), np.asarray(moved.params[name])
            wanted = np.stack([before[i] if i >= 0 else np.zeros(16) for i in ids])
            np.testing.assert_array_equal(after, wanted)
            rows = [before[row].mean(0) if row else before.mean(0) for row in spelled]
            np.testing.assert_allclose(means.params[name], rows, rtol=1e-5, atol=1e-8)
            assert moved.params[name].sharding.spec[0] == ("tensor" if count == 264 else None)
        unsaid = np.flatnonzero(np.asarray(moved.params["head_bias"]) < -1e29)
        assert unsaid.tolist() == [3, *range(257, count)]


def test_models_of_other_ids_are_measured_side_by_side(made, data, tmp_path):
    """KL to a teacher in another order, which lacks a token, is that of the shared ones."""
    teacher, student = made
    options = commands.Evaluate(
        data=(str(data / "eval.txt"),), seq_len=32, batch_size=8, max_rows=8,
        cache_dir=str(data / "cache"),
    )  # fmt: skip
    named = {"student": student, "teacher": teacher, "moved": in_other_order(teacher, 5)}
    named["longer"] = with_tokens(student, "<think>")
    for name, model in named.items():
        models.save(model, tmp_path / name)
    measure = lambda ours, theirs: evaluate(
        str(tmp_path / ours), options, teacher=str(tmp_path / theirs)
    )
    plain, longer = measure("student", "teacher"), measure("longer", "moved")
    for name in ("eval/kl_t1", "eval/reverse_kl", "eval/agree_top1", "eval/teacher_entropy"):
        assert longer[name] == pytest.approx(plain[name], rel=1e-4), name
    assert longer["eval/ce"] > plain["eval/ce"]  # of all its tokens, one of them more
    with pytest.raises(MismatchError, match="tokens of data.text .* are none of its vocabulary"):
        content = json.loads(teacher.tokenizer.backend_tokenizer.to_str())
        content["model"]["vocab"]["\u0123"] = content["model"]["vocab"].pop("e")
        without = models.Model(SHAPE, teacher.params, tokenizer_of(content), "made")
        models.save(without, tmp_path / "without")
        measure("student", "without")


def test_the_tokens_that_spell_a_token():
    class Made:
        bos_token_id = pad_token_id = unk_token_id = None

        def __init__(self, words, eos):
            core = Tokenizer(bpe.BPE({word: index for index, word in enumerate(words)}, []))
            core.decoder = decoders.ByteLevel()
            core.add_special_tokens([eos])
            self.backend_tokenizer, self.eos_token_id = core, core.token_to_id(eos)

    old = Made(["a", "b", "ab", "c"], "<end>")
    new = Made(["ab", "abc", "cab", "bx", "x"], "<stop>")
    assert spelling.spelled(new, old, 5) == [[2], [2, 3], [3, 2], [1], [], [4]]
    assert spelling.spelled(new, old, 3) == [[2], [2], [2], [1], [], []]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("student={from: teacher, tokenizer: b}", "tokenizer.from=teacher"),
            "must be student",
        ),
        (("student={source: x, tokenizer: bytes}",), "has no effect without `from: teacher`"),
        (("student={from: teacher, embeddings: random}",), "has no effect without tokenizer"),
    ],
)
def test_what_a_tokenizer_of_its_own_goes_with(overrides, words):
    text = CONFIG.format(folder="f", data="d", teacher="t", student="s")
    with pytest.raises(ConfigError, match=words):
        config.loads(text, overrides=overrides)
