"""Runs whose teacher reads the text in tokens of its own."""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe
from transformers import PreTrainedTokenizerFast

from jaxdistill import api, commands, models
from jaxdistill.data.second_view import second_rows
from jaxdistill.errors import UserError
from jaxdistill.report import read_metrics
from jaxdistill.run import participants, setup, teacher_cache, texts
from tests.also import also
from tests.data.test_alignment import byte_level
from tests.run.conftest import sentences

pytestmark = pytest.mark.usefixtures("plain_runs")
METHODS = {
    "alm": "{name: alm, alpha: 0.3, teacher_seq_len: 24}",
    "gold": "{name: gold, alpha: 0.3, teacher_seq_len: 24}",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> pathlib.Path:
    """A random model whose tokens are no bytes."""
    tokenizer = byte_level(300)
    tokenizer.eos_token = "<s>"
    arch = models.DecoderConfig(
        "llama", vocab_size=len(tokenizer), embed=24, mlp=32, layers=2, heads=2, kv_heads=2,
        head_dim=12, bos_id=0, eos_ids=(0,),
    )  # fmt: skip
    model = models.random(arch, 1, "float32")
    folder = tmp_path_factory.mktemp("teacher") / "model"
    models.save(models.Model(arch, model.params, tokenizer, "made"), folder)
    return folder


@pytest.fixture
def configured(load_config, teacher, tmp_path):
    """(method, overrides) -> the configuration of a run of a student that reads bytes."""

    def load(name, *overrides):
        options = [
            f"teacher={{source: {teacher}, dtype: float32}}",
            "student={random: {layers: 1, embed: 16, mlp: 24, heads: 2}, compute_dtype: float32}",
            f"method={METHODS[name]}",
            "train.steps=4",
            "train.eval_every=2",
            "eval.samples=1",
        ]
        return load_config(tmp_path, *options, *overrides)

    return load


@pytest.mark.parametrize("name", ["alm", *also("gold")])
def test_a_run_with_two_tokenizers_from_its_start_to_its_table(name, configured):
    config = configured(name, "checkpoint.best_metric=eval/bits_per_byte", "eval.compare=true")
    result = api.train(config)
    run = pathlib.Path(result.run_dir)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "loss/total" in line]
    assert len(steps) == 4 and all(math.isfinite(line["loss/total"]) for line in steps)
    assert steps[-1]["loss/ce"] < steps[0]["loss/ce"]
    rows = {row["name"]: row for row in result.rows}
    assert set(rows) == {"teacher", "student before", "SFT control", "student after"}
    assert all(math.isfinite(row["bits_per_byte"]) for row in rows.values())
    assert all(row["kl_t1"] is None for row in rows.values())
    assert rows["student after"]["bits_per_byte"] < rows["student before"]["bits_per_byte"]
    # Of bytes: nats of a token are bits of a byte, the ends of texts counted with their bytes.
    metrics = result.metrics
    shapes = participants.shapes_of(config, setup.mesh_of(config))
    rows_of = texts.data_of(config.data, shapes.tokenizer, shapes.second)["eval"]
    counted = [row["targets"][row["mask"]] for row in map(rows_of.__getitem__, range(len(rows_of)))]
    text = sum(int((ids < 256).sum()) for ids in counted[: config.eval.max_rows])
    expected = metrics["eval/ce"] * metrics["eval/tokens"] / math.log(2) / text
    assert metrics["eval/bits_per_byte"] == pytest.approx(expected, rel=1e-9)
    samples = json.loads(next((run / "samples").glob("*.jsonl")).read_text().splitlines()[0])
    assert {"prompt", "student", "teacher"} <= set(samples)
    again = api.resume(run)  # finished: nothing to do, and it opens
    assert again.metrics["eval/bits_per_byte"] == metrics["eval/bits_per_byte"]


def test_the_teachers_row_is_its_own_cross_entropy_per_byte_and_a_stored_one_is_the_same(
    configured, teacher, tmp_path
):
    """The teacher's nats over its aligned tokens, from its logits, by the bytes that they spell."""
    few = ("train.eval_every=null", "eval.max_rows=4")
    config = configured("alm", *few)
    result = api.train(config)
    options = commands.TeacherCache(output=str(tmp_path / "c"), format="hidden", dtype="float32")
    few_tokens = commands.TeacherCache(output=str(tmp_path / "k"), format="topk", k=4)
    with pytest.raises(UserError, match="alm reads whole rows .* topk does not hold: capture with"):
        teacher_cache.capture(config, few_tokens)
    assert teacher_cache.capture(config, options)["whole"]
    stored = api.train(
        configured("alm", *few, f"teacher={{cache: {tmp_path / 'c'}}}", f"run.dir={tmp_path / 'r'}")
    )
    ours, theirs = (read_metrics(pathlib.Path(one.run_dir)) for one in (result, stored))
    for one, other in zip(ours, theirs, strict=True):
        for name in {"loss/total", "loss/divergence", "optim/grad_norm", "eval/ce"} & one.keys():
            assert other[name] == one[name]
    first, again = (one.rows[0] for one in (result, stored))
    assert first["name"] == again["name"] == "teacher"
    assert again["bits_per_byte"] == pytest.approx(first["bits_per_byte"], rel=1e-6)
    shapes = participants.shapes_of(config, setup.mesh_of(config))
    rows = second_rows(texts.data_of(config.data, shapes.tokenizer, shapes.second)["eval"])
    model = models.load(teacher, dtype="float32")
    nats, spelled = 0.0, 0
    for index in range(8):  # a whole batch
        row = rows[index]
        one = {
            name: jnp.asarray(row[name])[None] for name in ("tokens", "positions", "segment_ids")
        }
        outputs = models.decoder.apply(
            model.config, model.params, one["tokens"], one["positions"], one["segment_ids"],
            compute_dtype="float32",
        )  # fmt: skip
        logits = np.asarray(models.decoder.logits(outputs), np.float64)[0]
        logq = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.flatnonzero(row["mask"])
        nats -= logq[places, row["targets"][places]].sum()
        words = model.tokenizer.convert_ids_to_tokens(row["targets"][places].tolist())
        spelled += sum(len(word) for word in words if word != "<s>")  # a letter stands for a byte
    (found,) = [row for row in result.rows if row["name"] == "teacher"]
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / spelled, rel=1e-5)


@pytest.fixture(scope="module")
def writing(load_config, teacher, tmp_path_factory):
    """(folder, overrides) -> the configuration of a run whose student writes whole letters."""
    place = tmp_path_factory.mktemp("letters")
    prompts = [{"prompt": f"{word} {n}"} for n in range(9) for word in ("the fox", "a lazy dog")]
    (place / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    letters().save_pretrained(place / "tokenizer")

    def load(folder, *overrides):
        folder.mkdir(exist_ok=True)
        return load_config(
            folder,
            f"teacher={{source: {teacher}, dtype: float32}}",
            f"tokenizer={{from: {place / 'tokenizer'}}}",
            "student={random: {layers: 1, embed: 16, mlp: 24, heads: 2}, compute_dtype: float32}",
            "method={name: alm, alpha: 0.0, teacher_seq_len: 40}",
            f"data.prompts=[{{path: {place / 'prompts.jsonl'}}}]",
            "rollout={share: 0.65, max_age: 1, prompts_per_step: 1, samples: 2, "
            "max_new_tokens: 12, distilled_tokens: 10}",
            "data.max_bad_fraction=1.0",
            "data.packing=none",
            "train={steps: 3, eval_every: null, log_every: 1, micro_batches: 1}",
            *overrides,
        )

    return load


def letters():
    """Tokens of letters and of a few words, a space before a text, no bytes: all that it writes is
    text.
    """
    core = Tokenizer(bpe.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"])
    core.train_from_iterator([sentences(0, 40)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@pytest.mark.variant
def test_what_a_student_writes_is_compared_by_bytes(writing, tmp_path):
    """Answers of this update and of the one before, and given text, in micro-batches."""
    api.train(writing(tmp_path, "train.micro_batches=2"))
    records = [one for one in read_metrics(tmp_path / "run") if "rollout/student" in one]
    assert [one["rollout/student"] for one in records] == [1, 1, 0]
    assert [one["rollout/age"] for one in records[:2]] == [0, 1]
    # Most of what it writes is text; what holds <unk> is counted, and counts not.
    shares = [one["rollout/unaligned"] for one in records[:2]]
    assert max(shares) > 0 and max(shares) < 1
    assert all(one["rollout/too_long"] == 0 for one in records[:2])
    assert all(one["loss/total"] > 0 and one["optim/grad_norm"] > 0 for one in records)
    assert not any("rollout/overlap" in one for one in records)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("mesh.context=2", "mesh.fsdp=1"), "mesh.context = 2: method alm sums over chunks"),
        (("checkpoint.best_metric=eval/kl_t1",), "has two tokenizers: use eval/bits_per_byte"),
        (
            ("teacher={api: {base_url: 'http://localhost:1/v1', model: m}, cache: y}",),
            "likeliest tokens alone, and method alm reads whole rows",
        ),
        (("data.special_tokens=parse",), "there are two tokenizers: use text"),
        (("method.teacher_seq_len=1",), "teacher_seq_len"),
    ],
)
def test_what_two_tokenizers_do_not_go_with(overrides, words, configured, monkeypatch):
    import jax

    monkeypatch.undo()
    with pytest.raises(UserError, match=words):
        config = configured("alm", *overrides)
        mesh = setup.make_mesh(fsdp=1, context=2, devices=jax.devices()[:2])
        participants.shapes_of(config, mesh)


def test_bits_per_byte_is_no_measure_of_a_run_with_one_tokenizer(load_config, tmp_path):
    with pytest.raises(UserError, match="where the teacher has a tokenizer of its own"):
        load_config(tmp_path, "checkpoint.best_metric=eval/bits_per_byte")
