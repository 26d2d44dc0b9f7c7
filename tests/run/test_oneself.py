"""Runs whose student teaches itself: the same bits on resume, and what stands in for a teacher."""

import json

import jax
import numpy as np
import pytest

from jaxdistill import api, config, optim
from jaxdistill.config import inherit
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.report import read_metrics
from jaxdistill.run import changes, participants, setup
from tests.also import also
from tests.run.test_on_policy import Lost, same
from tests.run.test_session import arrays

pytestmark = pytest.mark.usefixtures("plain_runs")
TEMPLATE = "Reference solution: {solution}\\n{prompt}"


@pytest.fixture(scope="module")
def load(load_config, tmp_path_factory):
    """(folder, weights of the teacher, overrides) -> Config; on-policy with `written`."""
    given = tmp_path_factory.mktemp("solved")
    for name, first, count in (("train", 0, 60), ("eval", 60, 8)):
        records = [
            {"prompt": f"{n}+3=", "completion": f"{n + 3}", "solution": f"{n} and 3 is {n + 3}"}
            for n in range(first, first + count)
        ]
        (given / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))

    def make(folder, weights, *overrides, written=False):
        folder.mkdir(exist_ok=True)
        teacher = f'{{self: {{weights: {weights}, context: "{TEMPLATE}", seq_len: 64}}}}'
        text = [f"data.prompts=[{{path: {given}/train.jsonl}}]", "data.train=[]"]
        text += ["rollout={prompts_per_step: 8, max_new_tokens: 12}"]
        text += ["data.packing=none"]  # one number of rows, one program
        return load_config(
            folder,
            f"teacher={teacher}",
            "student={random: {layers: 2, embed: 32, mlp: 48, heads: 4}, compute_dtype: float32}",
            f"data.eval=[{{path: {given}/eval.jsonl}}]",
            *(text if written else [f"data.train=[{{path: {given}/train.jsonl}}]"]),
            "data.loss_on=completion",
            "method={name: kd, alpha: 0.0}",
            *overrides,
        )

    return make


@pytest.fixture(scope="module")
def averaged(load, tmp_path_factory):
    """A finished run on its own answers, taught by its average."""
    folder = tmp_path_factory.mktemp("averaged")
    api.train(load(folder, "ema", "teacher.self.leak_phrases=[e, a]", written=True))
    return folder / "run"


@pytest.mark.variant
def test_a_run_that_ends_within_resumes_with_the_bits_of_its_average(averaged, load, tmp_path):
    settings = load(tmp_path, "ema", "teacher.self.leak_phrases=[e, a]", written=True)
    with pytest.raises(KeyboardInterrupt):
        api.train(settings, hooks=Lost("step.after", 5))
    api.resume(tmp_path / "run")
    same(tmp_path / "run", averaged)
    kept = [name for name in arrays(averaged, 6) if "average" in name]
    moved = [
        name for name in kept if np.any(arrays(averaged, 6)[name] != arrays(averaged, 3)[name])
    ]
    assert kept and moved == kept


def test_a_run_tells_how_many_answers_speak_of_what_the_teacher_was_told(averaged):
    told = [one for one in read_metrics(averaged) if "rollout/leaks" in one]
    assert len(told) == 6 and all(0 <= one["rollout/leaks"] <= 1 for one in told)
    assert 0 < sum(one["rollout/leaks"] for one in told) < 6
    assert all(one["loss/divergence"] > 0 for one in told)
    evaluated = [one for one in read_metrics(averaged) if "eval/ce" in one][-1]
    assert "eval/kl_t1" not in evaluated and evaluated["eval/loss"] == evaluated["eval/ce"]


@pytest.mark.parametrize("weights", ["frozen", "ema", *also("live")])
@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_who_teaches_and_what_it_takes(load, tmp_path, weights, lora):
    """No second weights for live and beside adapters, one copy for frozen, an average for ema."""
    adapters = ["student.lora={rank: 2}"] if lora else []
    loaded = load(tmp_path, weights, *adapters)
    mesh = setup.mesh_of(loaded)
    step, state, teacher = setup.build(loaded, mesh)
    models = participants.shapes_of(loaded, mesh)
    method = setup.method_of(loaded, models)
    shape = method.asked.abstract_params(mesh)
    assert jax.tree.structure(shape) == jax.tree.structure(teacher)
    copied = weights == "frozen" and not lora
    assert (teacher is not None) == copied
    average = optim.average(state.opt_state)
    assert (average is not None) == (weights == "ema")
    if average is not None:
        assert jax.tree.structure(average) == jax.tree.structure(state.params)
    read = method.asked.weights(teacher, state)
    kernel = lambda tree: tree["embedding"]
    first = state.frozen if lora else state.params["student"]
    np.testing.assert_array_equal(kernel(read), kernel(first))
    if copied:  # which lives when the state is gone
        assert kernel(read).unsafe_buffer_pointer() != kernel(first).unsafe_buffer_pointer()


def test_adapters_and_the_frozen_model_train_and_the_first_step_compares_it_with_itself(
    load, tmp_path
):
    """Behind a context of which the student reads nothing: the loss is that of the prompt alone."""
    api.train(load(tmp_path, "frozen", "student.lora={rank: 2}", "train.steps=3"))
    records = [one for one in read_metrics(tmp_path / "run") if "loss/total" in one]
    assert all(one["loss/total"] > 0 for one in records)


def test_without_a_context_the_first_step_has_nothing_to_learn(load, tmp_path):
    api.train(load(tmp_path, "frozen", "teacher={self: {weights: frozen}}", "train.steps=3"))
    first = next(one for one in read_metrics(tmp_path / "run") if "loss/total" in one)
    assert abs(first["loss/total"]) < 1e-7 and first["optim/grad_norm"] < 1e-5


def test_frozen_weights_are_made_again_and_compared_on_resume(load, tmp_path):
    """A model in a folder is fingerprinted; other weights under its name are another run."""
    api.train(load(tmp_path / "base", "live", "train.steps=3"))
    api.export(f"{tmp_path}/base/run@latest", tmp_path / "model")
    folder = load(tmp_path / "one", "frozen", f"student={{source: {tmp_path}/model}}")
    with pytest.raises(KeyboardInterrupt):
        api.train(folder, hooks=Lost("step.after", 5))
    facts = json.loads((tmp_path / "one/run/fingerprints.json").read_text())["facts"]
    assert "student.start" in facts
    api.resume(tmp_path / "one" / "run")
    whole = load(tmp_path / "two", "frozen", f"student={{source: {tmp_path}/model}}")
    api.train(whole)
    same(tmp_path / "one" / "run", tmp_path / "two" / "run")


def test_what_may_change_when_a_run_goes_on():
    for name, refused in (("weights", True), ("context", True), ("ema_decay", False)):
        assert changes.rule_of(f"config.teacher.self.{name}").refused == refused


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (
            ["teacher.self.seq_len=4096"],
            ConfigError,
            "teacher.self.seq_len = 4096: the student was",
        ),
        (["teacher.self.seq_len=32"], DataError, "none of the 60 records can be asked: .*too long"),
        (['teacher.self.context="{feedback} {prompt}"'], DataError, "no `feedback`, which teacher"),
        (['teacher.self.context="{prompt} {solution}"'], DataError, "the teacher's in '[0-9]'"),
    ],
)
def test_what_a_teacher_cannot_be_told_is_refused_before_anything_is_written(
    load, tmp_path, overrides, error, words
):
    with pytest.raises(error, match=words):
        api.train(load(tmp_path, "live", *overrides, written=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["opsd", *also("sdft")])
def test_the_recipes_run(recipe, load, tmp_path):
    """With a tiny model that reads bytes and plain prompts, at the sizes of this test."""
    small = load(tmp_path, "live", written=True)
    loaded = config.load(
        inherit.recipes()[recipe],
        [
            f"run.dir={tmp_path}/{recipe}",
            "student.source=null",
            "student.random={layers: 1, embed: 32, mlp: 48, heads: 4}",
            "tokenizer.from=bytes",
            f"data.prompts=[{{path: {small.data.prompts[0].path}}}]",
            f"data.eval=[{{path: {small.data.eval[0].path}}}]",
            f"data.cache_dir={tmp_path}/cache",
            "data.seq_len=64",
            "data.loss_on=completion",
            "teacher.self.seq_len=320",
            "teacher.self.skip_first=1",
            "rollout.max_new_tokens=8",
            "rollout.prompts_per_step=8",
            "train={steps: 2, batch_size: 8, micro_batches: 2, eval_every: null, log_every: 1}",
            "optimizer.warmup=0",
            "logging={progress: none, tensorboard: false}",
        ],
    )
    api.train(loaded)
    told = [one for one in read_metrics(tmp_path / recipe) if "rollout/leaks" in one]
    assert len(told) == 2 and all(one["loss/divergence"] > 0 for one in told)
