"""Runs with several teachers: against one, the same bits on resume, the table, what is refused."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import api, commands, models
from jaxdistill.config import routing as configured
from jaxdistill.data.feed import CorpusFeed
from jaxdistill.data.prompts import Prompt, Prompts
from jaxdistill.errors import ConfigError, DataError, MismatchError
from jaxdistill.evaluate.held_out import HeldOut
from jaxdistill.models import decoder
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.report import html, read_metrics
from jaxdistill.run import (
    changes,
    identity,
    participants,
    routing,
    run_table,
    setup,
    start,
    states,
    teacher_cache,
    texts,
)
from jaxdistill.run.folder import RunDir
from jaxdistill.train.step import place
from tests.inject import Fault
from tests.reasoning import scoring_server
from tests.run.conftest import sentences
from tests.run.test_on_policy import numbers, same
from tests.run.test_pairing import SHAPE, in_other_order

pytestmark = pytest.mark.usefixtures("plain_runs")
MATH = "random: {layers: 2, embed: 32, mlp: 48, heads: 4, kv_heads: 2}, dtype: float32"
CODE = "random: {family: qwen3, layers: 1, embed: 48, mlp: 32, heads: 2}, quantize: int8"
STUDENT = "student={random: {layers: 1, embed: 32, mlp: 48, heads: 4}, compute_dtype: float32}"


def written(path, first, count, named):
    """Records of which `named(number)` says whom they are for."""
    lines = sentences(first, count).split("\n\n")
    records = [{"text": text} | named(number) for number, text in enumerate(lines)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Every third record is for code, the others name nobody."""
    folder = tmp_path_factory.mktemp("routed")
    named = lambda number: {} if number % 3 else {"teacher": "code"}
    written(folder / "train.jsonl", 0, 60, named)
    written(folder / "eval.jsonl", 1000, 9, named)
    return folder


@pytest.fixture(scope="module")
def load(load_config, records):
    """(folder, overrides) -> Config of a run with two teachers."""

    def make(folder, *overrides, teachers=f"{{math: {{{MATH}}}, code: {{{CODE}}}}}"):
        folder.mkdir(exist_ok=True)
        return load_config(
            folder,
            "teacher=null",
            f"teachers={teachers}",
            "routing={default: math}",
            STUDENT,
            f"data.train=[{{path: {records}/train.jsonl}}]",
            f"data.eval=[{{path: {records}/eval.jsonl}}]",
            "train.micro_batches=2",
            "method={name: kd, alpha: 0.3}",
            *overrides,
        )

    return make


@pytest.fixture(scope="module")
def routed(load, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return api.train(load(folder, "eval.samples=3", "eval.prompts=[a dog]"))


def test_each_teacher_is_told_apart(routed):
    records = [one for one in numbers(routed.run_dir) if "loss/total" in one]
    assert len(records) == 6
    for one in records:
        met = [name for name in ("math", "code") if f"teachers/{name}/loss" in one]
        shares = [one[f"teachers/{name}/share"] for name in ("math", "code")]
        assert sum(shares) == pytest.approx(1.0)
        assert met == [n for n, share in zip(("math", "code"), shares, strict=True) if share]
        total = sum(one[f"teachers/{n}/share"] * one[f"teachers/{n}/kl_t1"] for n in met)
        assert total == pytest.approx(one["loss/kl_t1"], rel=1e-5)
    shown = json.loads((routed.run_dir / "RUN.json").read_text())["teachers"]
    assert shown["code"]["parameters"] != shown["math"]["parameters"] > 0
    facts = json.loads((routed.run_dir / "fingerprints.json").read_text())["facts"]
    for name in ("math", "code"):
        assert {f"teachers.{name}.shape", f"teachers.{name}.weights"} <= facts.keys()


def test_the_table_holds_all_and_each_on_its_own_held_out_records(routed, load, tmp_path):
    rows = {row["name"]: row for row in routed.table}
    assert list(rows) == ["teacher", "student before", "student after"]
    loaded = load(tmp_path)
    mesh = setup.mesh_of(loaded)
    data = api_data(loaded, mesh)
    for row in rows.values():
        parts = row["by_teacher"]
        counted = {name: tokens_of(data, name) for name in parts}
        for field, through in (("perplexity", math.log), ("kl_t1", lambda value: value)):
            if row[field] is None:
                assert row["name"] == "teacher"
                continue
            whole = sum(counted[n] * through(parts[n][field]) for n in parts)
            whole /= sum(counted.values())
            assert through(row[field]) == pytest.approx(whole, rel=1e-5)
    shapes = participants.shapes_of(loaded, mesh)
    found = participants.load_models(loaded, shapes, mesh)
    own = data["eval"].of_teacher("code")
    model = found.teaching.each["code"].model
    nats = count = 0.0
    for index in range(len(own)):
        row = own[index]
        batch = {name: np.asarray(row[name])[None] for name in ("tokens", "positions")}
        scores = logits_of(model, batch, row["segment_ids"][None])
        logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        picked = np.take_along_axis(logp, row["targets"][None, :, None], -1)[0, :, 0]
        nats -= picked[row["mask"]].sum()
        count += row["mask"].sum()
    assert rows["teacher"]["by_teacher"]["code"]["perplexity"] == pytest.approx(
        math.exp(nats / count),
        rel=2e-2,  # of a teacher in bfloat16
    )
    page = html.build(routed.run_dir, tmp_path / "page.html").read_text()
    assert "for teacher math" in page and "By teacher" in page


def api_data(loaded, mesh):
    shapes = participants.shapes_of(loaded, mesh)
    return texts.data_of(loaded.data, shapes.tokenizer, routing=configured.of(loaded))


def tokens_of(data, name):
    own = data["eval"].of_teacher(name)
    return sum(int(own[index]["mask"].sum()) for index in range(min(len(own), 8)))


def logits_of(model, batch, segments):
    read = [jnp.asarray(array) for array in (batch["tokens"], batch["positions"], segments)]
    outputs = decoder.apply(model.config, model.params, *read, compute_dtype="bfloat16")
    return np.asarray(decoder.logits(outputs), np.float64)[..., :257]


def test_each_is_asked_for_samples_of_its_own(routed):
    [file] = sorted((routed.run_dir / "samples").glob("*6*.jsonl"))
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 4 and "teacher" not in found[0]  # nobody is asked for the prompt
    assert all("teacher" in one for one in found[1:])


@pytest.mark.variant
def test_a_stored_teacher_among_several_teaches_as_it_does_in_the_step(routed, load, tmp_path):
    """It was asked about its own records alone; of whole numbers, in bfloat16."""
    asking = load(tmp_path / "asking")
    options = commands.TeacherCache(output=str(tmp_path / "code"), teacher="code")
    found = teacher_cache.capture(asking, options)
    mesh = setup.mesh_of(asking)
    counted = positions(data.of_teacher("code") for data in api_data(asking, mesh).values())
    assert found["whole"] and found["positions"] == counted
    loaded = load(
        tmp_path / "learning", teachers=f"{{math: {{{MATH}}}, code: {{cache: {tmp_path}/code}}}}"
    )
    inputs = start.read(loaded, mesh)
    models = participants.load_models(loaded, inputs.models, mesh)
    method = setup.method_of(loaded, models)
    state = states.create(loaded, models.student, method.objective, method.tx, mesh)
    params = method.asked.params
    table = run_table.RunTable(
        RunDir(tmp_path, {}), models, method, HeldOut(inputs.taught["eval"], 8, 8, mesh, "eval"),
        student=loaded.student, speaks=loaded.eval, seed=loaded.seed,
    )  # fmt: skip
    table.add_teacher()
    [row] = table.rows
    was = routed.table[0]
    assert row["perplexity"] == pytest.approx(was["perplexity"], rel=1e-6)
    for name, theirs in was["by_teacher"].items():
        ours = row["by_teacher"][name]["perplexity"]
        assert ours == pytest.approx(theirs["perplexity"], rel=1e-6)
    assert row["parameters"] == was["parameters"]
    step = setup.compile_step(loaded, method, state, params, mesh)
    lies, size = configured.layout(loaded), loaded.train.batch_size
    feed = CorpusFeed(inputs.taught["train"], batch_size=size,
                      seed=loaded.seed, left_out=list, layout=lies)  # fmt: skip
    at = 0
    for expected in numbers(routed.run_dir)[:2]:
        span, batch = feed.next(at, None)
        at = span.end_row
        state, means = step(state, params, place(batch, mesh))
        for name in ("loss/total", "optim/grad_norm", "loss/kl_t1", "teachers/code/kl_t1"):
            assert float(means[name].value) == pytest.approx(expected[name], rel=1e-5), name
    facts = identity.fingerprints(loaded.settings(), models, inputs.texts)
    assert "teachers.code.cache" in facts and "teachers.code.weights" not in facts
    described = identity.describe(models, mesh)["teachers"]
    assert described["code"]["source"] == f"{tmp_path}/code"
    assert described["code"]["parameters"] > 0


def positions(parts):
    """How many predictions count in the texts of data sets, each text once."""
    found = {}
    for data in parts:
        for index in range(len(data)):
            row = data[index]
            for number in range(1, row["segment_ids"].max() + 1):
                own = row["segment_ids"] == number
                found[row["tokens"][own].tobytes()] = int(row["mask"][own].sum())
    return sum(found.values())


@pytest.mark.parametrize(
    ("teachers", "name", "words"),
    [
        (None, None, r"there are several \(math, code\): say which, as --teacher NAME"),
        (None, "law", "--teacher law: no such teacher: there are several"),
        ("{math: {cache: c}}", "math", "teachers.math: nobody to ask: give teachers.math.source"),
        ("null", "math", "--teacher math: there is no section teachers"),
    ],
)
def test_who_is_asked_is_one_of_them(load, tmp_path, teachers, name, words):
    given = {} if teachers is None else {"teachers": teachers}
    one = ("teacher={source: t}", "routing=null", "tokenizer.from=bytes")
    loaded = load(tmp_path, *(one if teachers == "null" else ()), **given)
    with pytest.raises(ConfigError, match=words):
        teacher_cache.capture(loaded, commands.TeacherCache(output="c", teacher=name))


def test_a_run_that_is_lost_resumes_to_the_same_bits(routed, load, tmp_path):
    settings = ("eval.samples=3", "eval.prompts=[a dog]")
    with pytest.raises(KeyboardInterrupt):
        api.train(load(tmp_path, *settings), hooks=Fault("step.after:5:int"))
    api.resume(tmp_path / "run")
    same(tmp_path / "run", routed.run_dir)


def test_other_teachers_are_refused_on_resume(routed):
    for override in ("teachers.math.random.mlp=32", "routing.default=code", "teachers.code=null"):
        with pytest.raises(ConfigError):
            api.resume(routed.run_dir, ["train.steps=7", override])


@pytest.mark.variant
def test_one_teacher_by_name_is_the_teacher_to_the_bit(load, load_config, records, tmp_path):
    """Batches of one micro-batch, so that both lie alike."""
    (tmp_path / "alone").mkdir()
    common = ("train.micro_batches=1", f"data.cache_dir={tmp_path}/cache")
    folder = tmp_path / "texts"
    folder.mkdir()
    named = lambda number: {"teacher": "math"}
    written(folder / "train.jsonl", 0, 60, named)
    written(folder / "eval.jsonl", 1000, 9, named)
    paths = (f"data.train=[{{path: {folder}/train.jsonl}}]",
             f"data.eval=[{{path: {folder}/eval.jsonl}}]")  # fmt: skip
    several = load(tmp_path / "named", *common, *paths, teachers=f"{{math: {{{MATH}}}}}")
    alone = load_config(
        tmp_path / "alone", f"teacher={{{MATH}}}", STUDENT, *paths, *common,
        "method={name: kd, alpha: 0.3}",
    )  # fmt: skip
    api.train(several)
    api.train(alone)
    ours = [
        {k: v for k, v in one.items() if "teachers/" not in k}
        for one in numbers(tmp_path / "named" / "run")
    ]
    assert ours == numbers(tmp_path / "alone" / "run")


@pytest.mark.parametrize(
    ("overrides", "kind", "words"),
    [
        (["routing=null"], DataError, "train.jsonl:2: names no teacher, and there are 2"),
        ([f"teachers={{math: {{{MATH}}}}}"], DataError, "names the teacher 'code', and there"),
        ([f"teachers={{math: {{{MATH}}}, code: {{{CODE}}}, law: {{{CODE}}}}}"], ConfigError,
         r"teachers.law: no record is for it \(math: \d+ rows, \d+ tokens; code: \d+ rows"),
    ],
)  # fmt: skip
def test_a_run_whose_records_and_teachers_do_not_meet_is_refused(
    load, tmp_path, overrides, kind, words
):
    with pytest.raises(kind, match=words):
        api.train(load(tmp_path, *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ("1.0", r"teachers.code: no record .*code: 2 rows, 9 tokens, which rollout.share = 1 leav"),
        ("0.0", r"teachers.law: no record .*law: 1 prompts, which rollout.share = 0 leaves unansw"),
        ("0.5", None),
    ],
)
def test_records_that_no_update_reads_are_no_records(asking, tmp_path, share, words):
    three = f"{{math: {{{MATH}}}, code: {{{CODE}}}, law: {{{CODE}}}}}"
    loaded = asking(tmp_path, f"share: {share}", teachers=three)
    data = {
        "train": types.SimpleNamespace(teachers=[("math", 1, 5), ("code", 2, 9), ("law", 0, 0)]),
        "eval": types.SimpleNamespace(teachers=[]),
    }
    named = [Prompt(np.array([7]), {"teacher": name}) for name in ("math", "law")]
    prompts = Prompts(named, "print", {}, [])
    if words is None:
        return routing.check(configured.of(loaded), loaded.rollout, data, prompts)
    with pytest.raises(ConfigError, match=words):
        routing.check(configured.of(loaded), loaded.rollout, data, prompts)


def test_a_teacher_of_other_tokens_is_refused_by_name(load, tmp_path):
    rows = jax.tree.map(np.asarray, models.random(SHAPE, 0, "float32").params)
    other = in_other_order(models.Model(SHAPE, rows, byte_tokenizer(), "made"), 3)
    models.save(other, tmp_path / "other")
    code = f"{{source: {tmp_path}/other, dtype: float32}}"
    several = f"{{math: {{{MATH}}}, code: {code}}}"
    with pytest.raises(MismatchError, match=r"teachers.code \(.*other\): its tokens are not those"):
        api.train(load(tmp_path / "run", teachers=several))


@pytest.fixture(scope="module")
def asking(load, tmp_path_factory):
    """(folder, overrides) -> Config of a run whose student writes for two teachers."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = "the quick brown fox jumps over a lazy dog".split()
    lines = [
        json.dumps({"prompt": f"{word} {n}"} | ({"teacher": "code"} if n == 1 else {}))
        for n in range(3)
        for word in words
    ]
    path.write_text("\n".join(lines) + "\n")

    def make(folder, rollout, *overrides, **teachers):
        sizes = "prompts_per_step: 4, samples: 2, max_new_tokens: 12"
        return load(
            folder,
            f"rollout={{{rollout}, {sizes}}}",
            f"data.prompts=[{{path: {path}}}]",
            "method={name: reverse_kd, alpha: 0.0}",
            *overrides,
            **teachers,
        )

    return make


@pytest.mark.variant
def test_the_students_own_text_is_routed_and_resumes_to_the_same_bits(asking, tmp_path):
    mixed = ("share: 0.97, max_age: 1", "rollout.max_new_tokens=4")
    api.train(asking(tmp_path / "whole", *mixed))
    records = [one for one in numbers(tmp_path / "whole" / "run") if "rollout/student" in one]
    own = [one for one in records if one["rollout/student"]]
    assert 0 < len(own) < 6
    for one in records:
        met = [n for n in ("math", "code") if one[f"teachers/{n}/tokens"]]
        total = sum(one[f"teachers/{n}/share"] * one[f"teachers/{n}/kl_t1"] for n in met)
        assert total == pytest.approx(one["loss/kl_t1"], rel=1e-4)
    for one in own:
        tokens = sum(one[f"teachers/{n}/tokens"] for n in ("math", "code"))
        assert tokens == one["rollout/tokens"]
    assert len({one["teachers/code/tokens"] for one in own}) > 1
    with pytest.raises(KeyboardInterrupt):
        api.train(asking(tmp_path / "lost", *mixed), hooks=Fault("step.after:5:int"))
    api.resume(tmp_path / "lost" / "run")
    same(tmp_path / "lost" / "run", tmp_path / "whole" / "run")


def test_tokens_drawn_by_the_student_are_routed_to_a_server_and_to_a_teacher_in_the_step(
    asking, tmp_path
):
    pytest.importorskip("openai", reason="needs the extra api")
    settings = ("method={name: sampled_kl}", "train.steps=2", "optimizer.warmup=0", "data.train=[]")
    with scoring_server.running() as server:
        given = f"api: {{base_url: '{server.url}', model: m, concurrency: 1}}"
        teachers = f"{{math: {{{MATH}}}, code: {{{given}}}}}"
        loaded = asking(tmp_path, "share: 1.0", *settings, teachers=teachers)
        result = api.train(loaded)
        texts = [one["prompt"] for one in server.asked[2:]]  # behind the two before the run
    run = tmp_path / "run"
    records = [one for one in read_metrics(run) if "loss/sampled_kl" in one]
    assert len(records) == 2
    for one in records:
        met = [n for n in ("math", "code") if one[f"teachers/{n}/tokens"]]
        total = sum(one[f"teachers/{n}/share"] * one[f"teachers/{n}/sampled_kl"] for n in met)
        assert total == pytest.approx(one["loss/sampled_kl"], rel=1e-4, abs=1e-6)
    lines = map(json.loads, (run / "scores-code.jsonl").read_text().splitlines())
    sizes = [one["sizes"] for one in lines]
    assert len(texts) == sum(map(len, sizes))
    assert sum(sizes[0]) == records[0]["teachers/code/tokens"] > 0
    mesh = setup.mesh_of(loaded)
    student = participants.load_models(loaded, participants.shapes_of(loaded, mesh), mesh).student
    gaps = []
    for text, size in zip(texts, sizes[0], strict=False):
        tokens = np.zeros(32, np.int32)
        tokens[: len(text)] = text
        logits = np.asarray(student.logits(tokens[None], np.ones((1, 32), np.int32)))[0, :, :257]
        ours = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
        both = ours[: len(text) - 1] - scoring_server.logprobs_of(text)[:-1]
        gaps += [both[place, text[place + 1]] for place in range(len(text) - 1)][-size:]
    assert records[0]["teachers/code/sampled_kl"] == pytest.approx(np.mean(gaps), rel=1e-5)
    # Held-out text is measured without the teachers, and still by whom it is for.
    assert [row["name"] for row in result.rows] == ["student before", "student after"]
    assert result.rows[1]["by_teacher"].keys() == {"math", "code"}
    assert "eval/kl_t1" not in result.metrics
    facts = changes.facts_of(loaded.settings())
    assert facts["config.teachers.code.api.model"]
    assert changes.rule_of("config.teachers.code.api.model").refused
    assert changes.rule_of("config.teachers.code.api.concurrency").bitwise


def test_a_loop_of_ones_own_gets_the_same_step(load, tmp_path):
    loaded = load(tmp_path)
    step, state, teachers = setup.build(loaded)
    mesh = setup.mesh_of(loaded)
    asked = setup.method_of(loaded, participants.shapes_of(loaded, mesh)).asked
    batch = setup.abstract_batch_of(loaded, mesh, asked)
    assert batch.tokens.shape == (12, 32) and batch.route.shape == (12,)
    assert list(teachers) == ["math", "code"] and step and state
