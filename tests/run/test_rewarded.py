"""Runs whose student learns from rewards: what it learns, what is told, and the same bits on."""

import json

import numpy as np
import pytest

from jaxdistill import api, report
from jaxdistill.errors import ConfigError, DataError, DivergedError
from jaxdistill.report import read_metrics
from tests.also import also
from tests.run.conftest import take_devices
from tests.run.test_on_policy import Lost, numbers, same
from tests.run.test_session import arrays

pytestmark = pytest.mark.usefixtures("plain_runs")
SIZES = "share: 1.0, prompts_per_step: 2, samples: 4, max_new_tokens: 4"
MINE = "reward={verifiers: [{verifier: mine}], %s}"


@pytest.fixture(scope="module")
def load(load_config, tmp_path_factory):
    """(folder, reward's settings, overrides) -> Config."""
    path = tmp_path_factory.mktemp("asked") / "prompts.jsonl"
    named = lambda n: {"teacher": "math" if n % 2 else "code"}
    lines = [json.dumps({"prompt": f"{n}=", "answer": f"{n}"} | named(n)) for n in range(9)]
    path.write_text("\n".join(lines) + "\n")

    def make(folder, reward="updates: 1", *overrides):
        folder.mkdir(exist_ok=True)
        return load_config(
            folder,
            "teacher=null",
            "student={random: {layers: 1, embed: 32, mlp: 48, heads: 4, kv_heads: 2}, "
            "compute_dtype: float32}",
            f"rollout={{{SIZES}}}",
            "data.train=[]",
            f"data.prompts=[{{path: {path}}}]",
            "method={name: grpo}",
            MINE % reward,
            *overrides,
        )

    return make


def lowercase(prompt, answer, record):
    """Which share of an answer is small letters of the first half of the alphabet."""
    assert prompt == f"{record['answer']}="
    return sum("a" <= letter <= "m" for letter in answer) / 4


def run(config, verifier=lowercase, **options):
    return api.train(config, verifiers={"mine": verifier}, **options)


@pytest.fixture(scope="module")
def three(load, tmp_path_factory):
    """A finished run whose answers serve two updates each."""
    folder = tmp_path_factory.mktemp("three")
    run(load(folder, "updates: 2, resample: 1"))
    return folder / "run"


def test_a_run_tells_of_its_rewards(three):
    records = [one for one in numbers(three) if "reward/mean" in one]
    assert [one["step"] for one in records] == [1, 2, 3, 4, 5, 6]
    assert [one["rollout/reused"] for one in records] == [0, 1] * 3
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert first["reward/mean"] == second["reward/mean"] == first["reward/of_mine"]
        assert first["policy/ratio"] == pytest.approx(1, abs=1e-5)  # the first is q_old itself
        assert first["policy/sampler_difference"] < 1e-5
        assert second["policy/old_kl"] > 1e-7  # and the second has moved away from it
        assert second["policy/sampler_difference"] == pytest.approx(
            first["policy/sampler_difference"], abs=1e-6
        )
        assert 0 <= first["reward/flat_groups"] <= 1 and first["student/entropy"] > 0
    assert any("perf/rollout_seconds" in one for one in read_metrics(three))
    lines = (three / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) >= 3 and all("verdicts" in json.loads(line) for line in lines)


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("rollout.call", 3),
        ("rollout.judging", 3),
        *also(("rollout.judged", 4), ("step.after", 4)),
    ],
    ids=[
        "while it writes",
        "judged and not written down",
        "once it is judged",
        "between two updates",
    ],
)
def test_a_run_that_ends_anywhere_resumes_to_the_same_bits(three, load, tmp_path, point, count):
    config = load(tmp_path, "updates: 2, resample: 1", "checkpoint.every.steps=1")
    with pytest.raises(KeyboardInterrupt):
        run(config, hooks=Lost(point, count))
    api.resume(tmp_path / "run", verifiers={"mine": lowercase})
    same(tmp_path / "run", three)


def test_a_verdict_that_would_not_come_again_is_read(three, load, tmp_path):
    """What the clock decided stays: the resumed run's verifier says something else."""
    with pytest.raises(KeyboardInterrupt):
        run(load(tmp_path, "updates: 2, resample: 1"), hooks=Lost("step.before", 6))
    asked = []
    api.resume(tmp_path / "run", verifiers={"mine": lambda *one: asked.append(one)})
    assert not asked
    same(tmp_path / "run", three)


def test_rewards_are_learned(load, tmp_path):
    """From random letters to those that are wanted, within a minute."""
    options = ("train.steps=40", "train.eval_every=40", "optimizer.lr=0.02", "optimizer.warmup=0")
    run(load(tmp_path, "advantage: group", *options))
    mean = [one["reward/mean"] for one in numbers(tmp_path / "run") if "reward/mean" in one]
    assert np.mean(mean[-5:]) > 0.8 > 0.3 > np.mean(mean[:3])


def test_nothing_to_learn_is_told_and_ends_the_run(load, tmp_path):
    with pytest.raises(DivergedError, match="reward.patience = 3"):
        run(load(tmp_path, "patience: 3"), lambda *_: 1.0)


def test_teachers_and_reward_stand_side_by_side(load, tmp_path):
    """Two teachers, each of the answers to its own prompts, which two updates learn from."""
    shape = "random: {layers: 1, embed: 32, mlp: 48, heads: 4, kv_heads: 2}"
    teachers = f"teachers={{math: {{{shape}}}, code: {{{shape.replace('32', '64')}}}}}"
    method = "method={name: grpo, teacher_weight: {schedule: linear, start: 1.0, end: 0.0}, "
    method += "distil: wrong}"
    more = ("train.steps=4", "train.eval_every=4", "routing={default: math}")
    run(load(tmp_path, "updates: 2", teachers, method, *more))
    records = [one for one in numbers(tmp_path / "run") if "reward/mean" in one]
    assert [one["knobs/teacher_weight"] for one in records] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert [one["rollout/reused"] for one in records] == [0, 1, 0, 1]
    for one in records:
        assert one["loss/divergence"] > 0 and one["policy/sampler_difference"] < 1e-4
        assert one["teachers/math/tokens"] + one["teachers/code/tokens"] == one["rollout/tokens"]
    assert {one["rollout/reused"]: one["policy/old_kl"] > 1e-7 for one in records} == {
        0: False, 1: True
    }  # fmt: skip
    assert all(sum(one[f"teachers/{n}/tokens"] for one in records) for n in ("math", "code"))


def test_some_prompts_are_for_the_reward_alone_and_some_for_the_teacher(load, tmp_path):
    """Those for the teacher have no answers to be compared with, and are never judged."""
    for name, lines in (
        ("sums", [{"prompt": f"{n}=", "answer": f"{n}"} for n in range(5)]),
        ("texts", [{"prompt": f"{n}:"} for n in range(5)]),
    ):
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = f"{{path: {tmp_path}/sums.jsonl, learns_from: reward}}"
    sources += f", {{path: {tmp_path}/texts.jsonl, learns_from: teacher}}"
    teacher = "teacher={random: {layers: 1, embed: 32, mlp: 48, heads: 4, kv_heads: 2}}"
    more = (
        teacher,
        f"data.prompts=[{sources}]",
        "rollout={share: 1.0, prompts_per_step: 4, samples: 2, max_new_tokens: 4}",
    )
    more += ("train.steps=4", "train.eval_every=4")
    asked = []

    def judge(prompt, answer, record):
        asked.append(prompt)
        return float(len(asked) % 2)

    run(
        load(tmp_path, "resample: 1", *more, "method={name: grpo, teacher_weight: 1.0}"),
        judge,
    )
    assert asked and all(prompt.endswith("=") for prompt in asked)
    records = [one for one in numbers(tmp_path / "run") if "reward/mean" in one]
    for one in records:
        assert one["reward/answers"] + one["reward/taught"] == one["rollout/answers"] == 8
        assert one["reward/unjudged"] == one["reward/flat_groups"] == one["reward/stood_in"] == 0
        assert (one["policy/of_teacher"] > 0) == (one["reward/taught"] > 0)
        assert (one["policy/of_reward"] > 0) == (one["reward/answers"] > 0)
    assert {one["reward/answers"] for one in records} - {0, 8}  # both in one batch


def test_answers_that_were_cut_may_count_nothing(load, tmp_path):
    """Here all are: the student does not know how to end one."""
    run(load(tmp_path, "overlong: mask", "train.steps=3", "train.eval_every=3"))
    records = [one for one in numbers(tmp_path / "run") if "reward/mean" in one]
    assert {one["rollout/truncated"] for one in records} == {1.0}
    assert (
        {one["loss/total"] for one in records} == {one["optim/grad_norm"] for one in records} == {0}
    )


@pytest.mark.variant
def test_parts_of_a_batch_and_a_mesh_learn_the_same(load, tmp_path, monkeypatch):
    """Groups of four answers lie across micro-batches and 8 devices; all sums are global."""
    found = {}
    for name, devices, parts in (("whole", 1, 1), ("parts", 8, 2)):
        with monkeypatch.context() as patch:
            take_devices(patch, devices)
            options = ("train.steps=3", "train.eval_every=3", f"train.micro_batches={parts}")
            options += ("rollout.prompts_per_step=4", "train.batch_size=16")
            run(load(tmp_path / name, "updates: 2, advantage: group", *options))
        records = numbers(tmp_path / name / "run")
        found[name] = {
            (one["step"], key): one[key]
            for one in records
            for key in ("loss/total", "optim/grad_norm", "policy/old_kl", "reward/mean")
            if key in one
        }
    assert len(found["whole"]) == 12
    # The loss is a sum of advantages that cancel: its rounding is that of numbers near 1.
    assert found["parts"] == pytest.approx(found["whole"], rel=2e-5, abs=5e-7)


def exam(tmp_path, *numbers):
    path = tmp_path / "held_out.jsonl"
    lines = [json.dumps({"prompt": f"{n}=", "answer": f"{n}"}) for n in numbers]
    path.write_text("\n".join(lines) + "\n")
    return f"held_out: {{prompts: [{{path: {path}}}], samples: 3, limit: 2}}"


def test_held_out_questions_are_asked_at_each_evaluation(load, tmp_path):
    """Against what the verifier was asked: two questions of three, three answers to each."""
    asked = []

    def judge(prompt, answer, record):
        if record["answer"] in ("11", "12", "13"):
            asked.append((prompt, answer))
            return float(len(asked) % 3 == 1)
        return lowercase(prompt, answer, record)

    run(load(tmp_path, exam(tmp_path, 11, 12, 13)), judge)
    evaluated = [one for one in read_metrics(tmp_path / "run") if "eval/pass_at_1" in one]
    assert [one["step"] for one in evaluated] == [3, 6]
    assert len(asked) == 12 and {prompt for prompt, _ in asked} == {"11=", "12="}
    for one in evaluated:
        assert one["eval/questions"] == 2
        assert one["eval/pass_at_1"] == pytest.approx(1 / 3)
        assert one["eval/reward_mean"] == pytest.approx(1 / 3)
        assert one["eval/pass_at_3"] == 1
        assert "eval/maj_at_3" not in one  # of a function nobody knows what is an answer
    page = report.build(tmp_path / "run").read_text()
    lines = (tmp_path / "run" / "samples" / "step_000006.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    assert all({"wanted", "right", "wrong"} <= set(one) for one in shown) and len(shown) == 2
    assert ">right<" in page and ">wrong<" in page


def test_held_out_questions_change_nothing_that_is_trained(three, load, tmp_path):
    """The best checkpoint is chosen by them here, which changes no bit either."""
    best = "checkpoint={every: {steps: 3}, best_metric: eval/pass_at_1, mode: max}"
    run(load(tmp_path, f"updates: 2, resample: 1, {exam(tmp_path, 11, 12)}", best))
    ours, theirs = arrays(tmp_path / "run", 6), arrays(three, 6)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_held_out_questions_are_not_trained_on(load, tmp_path):
    with pytest.raises(DataError, match="reward.held_out: 1 of 2 questions are in data.prompts"):
        run(load(tmp_path, exam(tmp_path, 3, 12)))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["rollout.samples=1"], ConfigError, "nothing to be compared with"),
        (["rollout.temperature=0.7"], ConfigError, "ratios are between probabilities at 1"),
        (["rollout.top_p=0.9"], ConfigError, "probabilities of all tokens"),
        (
            ["rollout.share=0.5", "rollout.replay={}"],
            ConfigError,
            "learns from the student's answers",
        ),
        (["rollout.max_age=1"], ConfigError, "reward.updates for more updates"),
        (["student.lora={rank: 2, dropout: 0.1}"], ConfigError, "other probabilities"),
        (["reward=null"], ConfigError, "say who judges"),
        (
            ["checkpoint={best_metric: eval/pass_at_1, mode: max}"],
            ConfigError,
            "measured on reward.held_out",
        ),
        (["rollout=null", "data.prompts=[]"], ConfigError, "add rollout"),
        (["reward={verifiers: [{verifier: poem}]}"], ConfigError, "neither one of"),
        (["reward={verifiers: [{verifier: number}]}"], ConfigError, "not named in reward"),
        (["reward={verifiers: [{verifier: regex}]}"], ConfigError, "options are not these"),
        (["method={name: grpo, bound: 1.1}"], ConfigError, "the clip would never act"),
        (["method={name: grpo, distil: wrong}"], ConfigError, "no effect with teacher_weight: 0"),
        (["method={name: grpo, teacher_weight: 1.0}"], ConfigError, "grpo needs a teacher"),
        (["data.prompts=[{path: p, learns_from: teacher}]"], ConfigError, "needs rewards and a te"),
        (
            ["reward.held_out={prompts: [{path: p, teacher: big}]}"],
            ConfigError,
            "no teacher is asked about held-out questions",
        ),
        (
            [
                "data.prompts=[{path: p, learns_from: teacher}]",
                "method={name: grpo, teacher_weight: 1.0}",
            ],
            ConfigError,
            "no prompt would learn from the reward: use a method of teachers",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(overrides, error, message, load, tmp_path):
    with pytest.raises(error, match=message):
        run(load(tmp_path, "updates: 1", *overrides))


def test_questions_without_answers_are_refused(load, tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text(json.dumps({"prompt": "why?"}) + "\n")
    more = (f"data.prompts=[{{path: {path}}}]", "reward={verifiers: [{verifier: number}]}")
    with pytest.raises(DataError, match="have no `answer`"):
        api.train(load(tmp_path, "updates: 1", *more))
    path.write_text(json.dumps({"prompt": "why?", "answer": "because"}) + "\n")
    for name in ("number", "numeric", "choice"):
        judge = f"reward={{verifiers: [{{verifier: format}}, {{verifier: {name}}}]}}"
        with pytest.raises(DataError, match=f"'because', the verifier {name} finds nothing"):
            api.train(load(tmp_path, "updates: 1", more[0], judge))
