"""Runs that ask a server about the student's own text: as the teacher at hand, on disk first."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs the extra api")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from jaxdistill import api
from jaxdistill.errors import ConfigError, MismatchError, ModelError
from jaxdistill.report import read_metrics
from jaxdistill.run import changes, setup
from jaxdistill.serve import app, listening, service
from tests.also import also
from tests.reasoning import scoring_server
from tests.run.conftest import models_of
from tests.run.test_on_policy import Lost, numbers, same

pytestmark = pytest.mark.usefixtures("plain_runs")
OURS = "student={random: {layers: 1, embed: 32, mlp: 48, heads: 4}, compute_dtype: float32}"
LONG = 60  # tokens that only the questions before a run have


@pytest.fixture(scope="module")
def load(load_config, tmp_path_factory):
    """(folder, rollout's settings, overrides) -> Config."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(30)))

    def make(folder, rollout="share: 1.0", *overrides):
        folder.mkdir(exist_ok=True)
        sizes = "prompts_per_step: 4, samples: 2, max_new_tokens: 12"
        return load_config(
            folder,
            OURS,
            f"rollout={{{rollout}, {sizes}}}",
            f"data.prompts=[{{path: {path}}}]",
            "data.train=[]",
            "data.packing=none",
            "method={name: sampled_kl, early: 0.5}",
            *overrides,
        )

    return make


@pytest.fixture
def server():
    with scoring_server.running() as made:
        yield made


def asking(server, **settings):
    """The teacher of a configuration that asks it."""
    given = {"retries": 0, "concurrency": 4, "price_in": 2.0} | settings
    more = "".join(f", {name}: {value}" for name, value in given.items())
    return f"teacher={{api: {{base_url: '{server.url}', model: m{more}}}}}"


@pytest.fixture(scope="module")
def whole(load, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("whole")
    with scoring_server.running() as server:
        api.train(load(folder, "share: 1.0, max_age: 1", asking(server)))
        asked = [tuple(one["prompt"]) for one in server.asked]
    return folder / "run", asked


def test_it_learns_what_it_learns_from_the_same_teacher_at_hand(load, tmp_path):
    """Twenty steps beside the teacher in the step, and as our own `serve` answers of it."""
    shape = "layers: 2, embed: 32, mlp: 48, heads: 4, initializer_range: 0.3"
    teacher = f"teacher={{random: {{{shape}}}, dtype: float32}}"
    sizes = ("train.steps=20", "train.eval_every=20", "checkpoint.every.steps=20")
    config = load(tmp_path / "online", "share: 1.0", teacher, *sizes)
    api.train(config)
    models = models_of(config, setup.mesh_of(config))
    teacher = dataclasses.replace(models.teacher, tokenizer=models.tokenizer)
    made = service.Service(teacher, slots=8, length=128)
    try:
        with listening.running(
            app.make_app(made, key=None), listening.bind("127.0.0.1", 0)
        ) as port:
            url = f"base_url: 'http://127.0.0.1:{port}/v1', model: '{made.name}'"
            served = f"teacher={{api: {{{url}}}}}"
            api.train(load(tmp_path / "served", "share: 1.0", served, *sizes))
    finally:
        made.close()
    online, served = (
        [one for one in numbers(tmp_path / name / "run") if "loss/total" in one]
        for name in ("online", "served")
    )
    assert len(online) == len(served) == 20
    for ours, theirs in zip(served, online, strict=True):
        for name in ("loss/total", "loss/sampled_kl", "optim/grad_norm", "rollout/tokens"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert abs(online[0]["loss/sampled_kl"]) > 0.01


def test_a_run_tells_of_what_it_asked(whole):
    folder, asked = whole
    records = [one for one in read_metrics(folder) if "rollout/student" in one]
    assert len(records) == 6 and {one["rollout/age"] for one in records} == {0, 1}
    assert all(one["perf/scoring_seconds"] > 0 for one in records)
    assert all(one["perf/scoring_tokens_per_second"] > 0 for one in records)
    lines = (folder / "scores.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["sizes"]) for line in lines] == [8] * 6
    bill = json.loads((folder / "spent.json").read_text())
    texts = asked[2:]  # behind the two questions before the run
    assert bill["requests"] == len(texts) == 48
    assert bill["tokens_in"] == sum(map(len, texts))
    assert records[-1]["perf/teacher_cost"] == bill["cost"]
    assert bill["cost"] == pytest.approx(2.0 * bill["tokens_in"] / 1e6)


def tokens_of(told):
    return tuple(next(iter(entry)) for entry in told[1:])


@pytest.mark.parametrize("point", ["rollout.scored", *also("rollout.after", "step.after")])
def test_what_a_server_said_is_not_asked_again(point, whole, server, load, tmp_path):
    """Of a text it was asked about it says something else, so the run must have kept it."""
    said, again, lost = set(), [], [False]

    def spoil(told):
        text = tokens_of(told)
        if not lost[0]:
            said.add(text)
        elif text in said and len(told) < LONG:
            again.append(text)
            told = told[:1] + [
                {t: {"logprob": one[t]["logprob"] - 1} for t in one} for one in told[1:]
            ]
        return told

    server.spoil = spoil
    # Nothing is written before the second and the fourth update.
    count = 3 if point == "rollout.after" else 5
    with pytest.raises(KeyboardInterrupt):
        api.train(
            load(tmp_path, "share: 1.0, max_age: 1", asking(server)), hooks=Lost(point, count)
        )
    lost[0] = True
    api.resume(tmp_path / "run")
    same(tmp_path / "run", whole[0])
    assert not again


def without_last(told):
    return told[:-1]


def shifted(told):
    return [*told[1:], None]


def nan(told):
    return [*told[:-1], {one: {"logprob": float("nan")} for one in told[-1]}]


def above(told):
    return [*told[:-1], {one: {"logprob": 0.1} for one in told[-1]}]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_last, r"prompt_logprobs came for \d+ tokens"),
        *also(
            (shifted, "shifted: the first token has an entry"),
            (nan, "nan is no log-probability"),
            (above, "0.1 is no log-probability"),
            (lambda told: None, "holds no prompt_logprobs"),
        ),
    ],
    ids=["fewer", "shifted", "nan", "above", "none"],
)
def test_an_answer_that_is_none_ends_the_run_and_the_others_are_kept(
    spoil, words, whole, server, load, tmp_path
):
    good = set()

    def some(told):
        if len(told) > LONG or len(good) < 19:
            good.update([tokens_of(told)] * (len(told) < LONG))
            return told
        return spoil(told)

    server.spoil = some
    config = load(tmp_path, "share: 1.0, max_age: 1", asking(server, concurrency=1))
    with pytest.raises(ModelError, match=f"5 of 8 answers of the student were not .*{words}"):
        api.train(config)
    lines = (tmp_path / "run" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["sizes"].count(0) for line in lines] == [0, 0, 5]
    if words.startswith("nan"):  # one mended server is enough
        server.spoil, before = (lambda told: told), len(server.asked)
        api.resume(tmp_path / "run")
        same(tmp_path / "run", whole[0])
        assert len(server.asked) == before + 2 + 5 + 3 * 8


def other_words(told):
    return [None, *({"7": {"logprob": -1.0}} for _ in told[1:])]


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (other_words, MismatchError, "cuts a text into other tokens"),
        (lambda told: told[: len(told) // 2], MismatchError, "cuts a text into other tokens"),
        (lambda told: None, ModelError, "holds no prompt_logprobs"),
        (lambda told: [None, *["x"] * (len(told) - 1)], ModelError, "no table of tokens"),
        (above, ModelError, "0.1 is no log-probability"),
    ],
    ids=["other words", "fewer words", "none", "no table", "above"],
)
def test_a_server_that_cannot_teach_is_refused_before_anything_runs(
    spoil, kind, words, server, load, tmp_path
):
    server.spoil = spoil
    with pytest.raises(kind, match=words):
        api.train(load(tmp_path, "share: 1.0", asking(server)))
    assert not (tmp_path / "run").exists()


def test_a_server_that_is_not_there_is_told_before_anything_runs(load, tmp_path):
    with scoring_server.running() as server:
        config = load(tmp_path, "share: 1.0", asking(server, max_failures=1))
    with pytest.raises(ModelError, match="teacher m at .*Connection"):
        api.train(config)
    assert not (tmp_path / "run").exists()


def test_tokens_before_a_text_are_the_servers_business(server, load, tmp_path):
    server.spoil = lambda told: (
        [None, {"256": {"logprob": -1.0}}, *told[1:]] if len(server.asked) == 1 else told
    )
    api.train(load(tmp_path, "share: 1.0, distilled_tokens: 2", asking(server), "train.steps=3"))
    sizes = [
        size
        for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()
        for size in json.loads(line)["sizes"]
    ]
    assert len(sizes) == 24 and set(sizes) <= {1, 2}


def test_another_model_is_another_run(load, server, tmp_path):
    facts = changes.facts_of(load(tmp_path, "share: 1.0", asking(server)).settings())
    assert facts["config.teacher.api.model"]
    assert changes.rule_of("config.teacher.api.model").refused
    assert changes.rule_of("config.teacher.api.base_url").bitwise


def test_what_was_spent_must_be_readable(load, server, tmp_path):
    config = load(tmp_path, "share: 1.0", asking(server), "train.steps=3")
    with pytest.raises(KeyboardInterrupt):
        api.train(config, hooks=Lost("rollout.scored", 1))
    (tmp_path / "run" / "spent.json").write_text('{"cost": -1}')
    (tmp_path / "run" / "scores.jsonl").unlink()
    with pytest.raises(ConfigError, match="spent.json: .*log-probabilities: mend or remove it"):
        api.resume(tmp_path / "run")
