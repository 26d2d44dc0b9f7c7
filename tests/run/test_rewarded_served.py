"""Rewards beside a served teacher, whose number for each drawn token joins its advantage."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs the extra api")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from jaxdistill import api
from jaxdistill.report import read_metrics
from jaxdistill.run import setup
from jaxdistill.serve import app, listening, service
from tests.reasoning import scoring_server
from tests.run.conftest import models_of
from tests.run.test_on_policy import Lost, numbers, same
from tests.run.test_rewarded import load, lowercase, run  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("plain_runs")
SHAPE = "random: {layers: 2, embed: 32, mlp: 48, heads: 4, initializer_range: 0.3}"
METHOD = "method={name: grpo, teacher_weight: 0.5, divergence: sampled_kl, distil: wrong}"
STEPS = ("checkpoint.every.steps=1",)


@pytest.fixture(scope="module")
def at_hand(load, tmp_path_factory):  # noqa: F811
    """A finished run whose teacher is in the step, and the settings of a server that it is."""
    folder = tmp_path_factory.mktemp("at_hand")
    teacher = f"teacher={{{SHAPE}, dtype: float32}}"
    config = load(folder, "updates: 2", METHOD, teacher, *STEPS)
    run(config)
    models = models_of(config, setup.mesh_of(config))
    model = dataclasses.replace(models.teacher, tokenizer=models.tokenizer)
    made = service.Service(model, slots=8, length=128)
    try:
        with listening.running(
            app.make_app(made, key=None), listening.bind("127.0.0.1", 0)
        ) as port:
            url = f"base_url: 'http://127.0.0.1:{port}/v1', model: '{made.name}'"
            yield folder / "run", f"teacher={{api: {{{url}}}}}"
    finally:
        made.close()


@pytest.mark.variant
def test_a_served_teacher_teaches_as_it_does_at_hand(at_hand, load, tmp_path):  # noqa: F811
    run(load(tmp_path, "updates: 2", METHOD, at_hand[1], *STEPS))
    ours, theirs = (
        [one for one in numbers(folder) if "loss/total" in one]
        for folder in (tmp_path / "run", at_hand[0])
    )
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss/sampled_kl", "policy/of_teacher", "policy/of_reward", "loss/total",
                     "optim/grad_norm", "rollout/tokens"):  # fmt: skip
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert abs(one["loss/sampled_kl"]) > 0.01 and one["policy/of_reward"] > 0.01
    told = [one for one in read_metrics(tmp_path / "run") if "loss/total" in one]
    assert all("perf/teacher_cost" in one for one in told)


@pytest.mark.variant
def test_one_of_several_may_be_a_server_and_is_not_asked_again_on_resume(
    load, tmp_path  # noqa: F811
):  # fmt: skip
    """The run ends between two updates from the same answers, and goes on to the same bits."""
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    with scoring_server.running() as server:
        served = f"{{api: {{base_url: '{server.url}', model: m}}}}"
        teachers = f"teachers={{math: {{{SHAPE}, dtype: float32}}, code: {served}}}"
        settings = ("updates: 2", METHOD.replace("wrong", "all"), teachers)
        settings += ("routing={default: math}", *STEPS)
        run(load(whole, *settings))
        asked = len(server.asked) - 2  # behind the two questions before the run
        with pytest.raises(KeyboardInterrupt):
            run(load(lost, *settings), hooks=Lost("step.after", 3))
        before = len(server.asked)
        api.resume(lost / "run", verifiers={"mine": lowercase})
        again = len(server.asked) - before - 2
    same(lost / "run", whole / "run")
    sizes = [
        json.loads(line)["sizes"]
        for line in (whole / "run" / "scores-code.jsonl").read_text().splitlines()
    ]
    assert asked == sum(map(len, sizes)) > 0 and again == sum(map(len, sizes[2:])) < asked
    records = [one for one in numbers(whole / "run") if "reward/mean" in one]
    assert len(records) == 6
    fresh = [one for one in records if not one["rollout/reused"]]
    told = [one["teachers/code/tokens"] for one in fresh]
    assert [sum(one) for one in sizes] == [count for count in told if count]
    for one in records:
        met = [n for n in ("math", "code") if one[f"teachers/{n}/tokens"]]
        total = sum(one[f"teachers/{n}/share"] * one[f"teachers/{n}/sampled_kl"] for n in met)
        assert total == pytest.approx(one["loss/sampled_kl"], rel=1e-4, abs=1e-6)
