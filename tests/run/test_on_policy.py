"""Runs whose student writes its own text: every method, the same bits on resume, what is told."""

import json
import types

import jax
import numpy as np
import pytest

from jaxdistill import api, sharding
from jaxdistill.errors import ConfigError, Preempted
from jaxdistill.models import DecoderConfig, count_parameters
from jaxdistill.report import read_metrics
from jaxdistill.run import changes, on_policy
from jaxdistill.train.hooks import Hooks
from tests.also import also
from tests.inject import Fault
from tests.run.conftest import take_devices
from tests.run.test_session import arrays

pytestmark = pytest.mark.usefixtures("plain_runs")
MIXED = "share: 0.97, max_age: 1"  # the last of six updates is not the student's
SHORT = "rollout.max_new_tokens=4"  # as many rows in every batch, so one program


@pytest.fixture(scope="module")
def load(load_config, tmp_path_factory):
    """(folder, rollout's settings, overrides) -> Config."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = "the quick brown fox jumps over a lazy dog".split()
    lines = [json.dumps({"prompt": f"{word} {n}"}) for n in range(3) for word in words]
    path.write_text("\n".join(lines) + "\n")

    def make(folder, rollout="share: 1.0", *overrides):
        folder.mkdir(exist_ok=True)
        sizes = "prompts_per_step: 4, samples: 2, max_new_tokens: 12"
        return load_config(
            folder,
            f"rollout={{{rollout}, {sizes}}}",
            f"data.prompts=[{{path: {path}}}]",
            "method={name: reverse_kd, alpha: 0.0}",
            *overrides,
        )

    return make


def numbers(folder):
    """The records of a run without what depends on the clock."""
    return [
        {k: v for k, v in one.items() if k != "time" and not k.startswith("perf/")}
        for one in read_metrics(folder)
    ]


def same(folder, other):
    ours, theirs = arrays(folder, 6), arrays(other, 6)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert numbers(folder) == numbers(other)


@pytest.fixture(scope="module")
def mixed(load, tmp_path_factory):
    """A finished run that learns from its own text and from given text, and has its control."""
    folder = tmp_path_factory.mktemp("mixed")
    found = api.train(load(folder, MIXED, "eval.compare=true"))
    assert [row["name"] for row in found.rows][-2:] == ["SFT control", "student after"]
    return folder / "run"


def test_a_run_tells_of_the_text_that_it_learns_from(mixed):
    records = [one for one in numbers(mixed) if "rollout/student" in one]
    assert [one["step"] for one in records] == [1, 2, 3, 4, 5, 6]
    students = [one for one in records if one["rollout/student"]]
    assert 0 < len(students) < 6 and 1 in {one["rollout/age"] for one in students}
    for one in students:
        assert one["rollout/answers"] == 8 and one["rollout/tokens"] <= 96
        assert 1 <= one["rollout/length_mean"] <= one["rollout/length_max"] <= 12
        assert 0 <= one["rollout/truncated"] <= 1 and one["rollout/entropy"] > 0
        assert 0 < one["rollout/overlap"] <= 1
        # The sampler is the trainer, but for rounding, where the answers are of this version.
        fresh = one["rollout/age"] == 0
        assert (one["rollout/sampler_difference_max"] < 1e-5) == fresh
    assert any("perf/rollout_tokens_per_second" in one for one in read_metrics(mixed))
    events = map(json.loads, (mixed / "events.jsonl").read_text().splitlines())
    compiled = [one for one in events if one["kind"] == "compiled"]
    assert [one["programs"] for one in compiled] == list(range(1, len(compiled) + 1))
    # One for each number of rows; of at most 8 there are six.
    assert len({one["rows"] for one in compiled}) == len(compiled) <= 6
    assert not [one for one in numbers(mixed / "control") if "rollout/student" in one]


class Lost(Hooks):
    """Ends the run without a word when a point is reached for the nth time."""

    def __init__(self, point, count):
        self.left = {point: count}

    def at(self, point):
        if point in self.left:
            self.left[point] -= 1
            if not self.left[point]:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("hooks", "kind"),
    [
        (lambda: Lost("rollout.call", 3), KeyboardInterrupt),  # of the third group
        *also(
            (lambda: Lost("step.after", 4), KeyboardInterrupt),  # behind a save within a group
            (lambda: Fault("rollout.call:3:term"), Preempted),
        ),
    ],
    ids=["lost while it writes", "lost within a group", "stopped while it writes"],
)
def test_a_run_that_ends_anywhere_resumes_to_the_same_bits(mixed, load, tmp_path, hooks, kind):
    with pytest.raises(kind):
        api.train(load(tmp_path, MIXED, "eval.compare=true"), hooks=hooks())
    folder = tmp_path / "run"
    assert json.loads((folder / "RUN.json").read_text())["status"] == "stopped"
    api.resume(folder)
    same(folder, mixed)


def test_a_replay_resumes_to_the_same_bits(load, tmp_path):
    """Lost behind a save with a full buffer, an evaluation and old answers on both sides of it."""
    settings = (
        "share: 0.9, replay: {capacity: 8, schedule: constant, tolerance: 0.0, rise: 0.05}",
        "train.eval_every=2",
    )
    api.train(load(tmp_path / "whole", *settings))
    with pytest.raises(KeyboardInterrupt):
        api.train(load(tmp_path / "lost", *settings), hooks=Lost("step.after", 5))
    api.resume(tmp_path / "lost" / "run")
    same(tmp_path / "lost" / "run", tmp_path / "whole" / "run")
    records = [one for one in numbers(tmp_path / "whole" / "run") if "rollout/student" in one]
    assert any(one["rollout/replayed"] for one in records[:4])
    assert any(one["rollout/replayed"] for one in records[4:])
    saved = tmp_path / "whole" / "run" / "checkpoints" / "6"
    content = json.loads((saved / "manifest.json").read_text())["content"]
    assert "rollouts.json" in content["files"] and 0.9 <= content["meta"]["replay"]["phi"] <= 1


def test_a_share_of_nothing_is_offline_distillation_to_the_bit(load, load_config, tmp_path):
    ours = load(tmp_path / "rollouts", "share: 0.0")
    method = "method={name: reverse_kd, alpha: 0.0}"
    (tmp_path / "offline").mkdir()
    api.train(ours)
    api.train(load_config(tmp_path / "offline", method))
    ours, theirs = (arrays(tmp_path / name / "run", 6) for name in ("rollouts", "offline"))
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, ours[name], err_msg=name)


@pytest.mark.parametrize(
    "method", ["jsd, alpha: 0.0", *also("taid, alpha: 0.0", "sampled_kl, early: 0.5")]
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(load, tmp_path, method):
    alone = ("student={from: teacher, layers: [0, 1, 2, 3], compute_dtype: float32}",)
    own = (f"method={{name: {method}}}", "train.steps=3", "data.train=[]")
    api.train(load(tmp_path, "share: 1.0, distilled_tokens: 3", *alone, *own, SHORT))
    first = numbers(tmp_path / "run")[0]  # Adam makes steps of whatever rounding leaves
    assert abs(first["loss/total"]) < 1e-6 and first["optim/grad_norm"] < 1e-5
    if "sampled" in method:  # the sampler is the trainer: nothing is to be corrected
        assert first["policy/sampler_kl"] < 1e-9 and first["policy/at_bound"] == 0
        assert abs(first["loss/sampled_kl"]) < 1e-5 and first["student/entropy"] > 0.5


@pytest.mark.variant
def test_adapters_and_a_mesh_sample_what_they_train(load, tmp_path, monkeypatch):
    """The answers do not depend on the mesh; adapters are in place when the student writes."""
    adapters = ("student.lora={rank: 2}", "optimizer.lr=0.1", "train.steps=3", "data.train=[]")
    adapters += (SHORT,)
    api.train(load(tmp_path / "one", "share: 1.0", *adapters))
    take_devices(monkeypatch, 4)
    api.train(load(tmp_path / "four", "share: 1.0", *adapters, "mesh={data: 2, fsdp: 2}"))
    one, four = (
        [row for row in numbers(tmp_path / name / "run") if "rollout/student" in row]
        for name in ("one", "four")
    )
    assert one[2]["loss/total"] != one[0]["loss/total"]
    for ours, theirs in zip(one, four, strict=True):
        assert ours["rollout/sampler_difference_max"] < 1e-5
        assert theirs["rollout/sampler_difference_max"] < 1e-5
        assert ours["rollout/tokens"] == theirs["rollout/tokens"]
        np.testing.assert_allclose(ours["loss/total"], theirs["loss/total"], rtol=1e-3)
    assert jax.device_count() >= 4


def test_what_may_change_when_a_run_goes_on(load, load_config, tmp_path):
    facts = changes.facts_of(load(tmp_path).settings())
    assert facts["config.rollout.samples"] == "2"
    offline = changes.facts_of(load_config(tmp_path).settings())
    assert not [name for name in offline if "rollout" in name]
    for name in ("share", "temperature", "top_p", "slots"):
        assert not changes.rule_of(f"config.rollout.{name}").refused
    for name in ("samples", "prompts_per_step", "max_age", "max_new_tokens"):
        assert changes.rule_of(f"config.rollout.{name}").refused
    assert changes.rule_of("config.rollout").refused


def test_what_the_mesh_does_not_divide_is_refused_before_anything_is_written(
    load, tmp_path, monkeypatch
):
    take_devices(monkeypatch, 4)
    with pytest.raises(ConfigError, match=r"rollout\.slots = 6: must be a multiple .* \(4\)"):
        api.train(load(tmp_path, "share: 1.0, slots: 6", "eval.batch_size=8"))
    assert not (tmp_path / "run").exists()


def test_what_a_teacher_cannot_read_is_refused_before_the_student_writes_it():
    whole, partly = (types.SimpleNamespace(unreadable=ids, misplaced=()) for ids in ((), (7, 9)))
    assert not list(on_policy.unread({})) and not list(on_policy.unread({"teacher": whole}))
    (told,) = on_policy.unread({"teacher": partly, "student": whole})
    assert "may write 2 tokens that the teacher has no row for, such as 7: take a teacher" in told


def test_a_plan_counts_the_cache_and_the_second_copy_of_the_weights(load, tmp_path):
    """Bytes of a token's keys and values as they were computed elsewhere: SmolLM2-135M's 23,040."""
    config = load(tmp_path, "share: 1.0", "student.compute_dtype=bfloat16")
    smol = DecoderConfig(
        "llama", vocab_size=100, layers=30, embed=16, mlp=24, heads=9, kv_heads=3, head_dim=64
    )
    writing = on_policy.memory(config, smol, sharding.make_mesh(devices=jax.devices()[:1]))
    assert writing is not None and writing["slots"] == 8
    assert writing["cache"] == 23_040 * 8 * config.data.seq_len
    assert writing["weights"] == 2 * count_parameters(smol)
    four = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    shared = on_policy.memory(config, smol, four)
    assert shared is not None
    assert (shared["cache"], shared["weights"]) == (writing["cache"] // 4, writing["weights"] // 2)
