"""DPO in a run: pairs in a file, the start or a teacher as the reference, and resume."""

import json
import math
import pathlib

import pytest

from jaxdistill import api
from jaxdistill.errors import UserError

pytestmark = pytest.mark.usefixtures("plain_runs")
WORDS = "red blue green brown white black".split()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of pairs that prefer one word, and one of held-out pairs that do so too."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, numbers in (("train", range(24)), ("eval", range(50, 56))):
        records = (
            {"prompt": f"{n} is ", "chosen": "good.", "rejected": f"{WORDS[n % 6]}."}
            for n in numbers
        )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture(scope="module")
def configured(load_config, pairs):
    def load(folder, *options):
        data = [f"data.{name}=[{{path: {pairs}/{name}.jsonl}}]" for name in ("train", "eval")]
        given = ["data.loss_on=completion", "train.micro_batches=2", "train.batch_size=4"]
        return load_config(folder, *data, *given, "method={name: dpo, beta: 0.5}", *options)

    return load


@pytest.fixture(scope="module")
def finished(configured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    return api.train(configured(folder, "train.steps=8", "train.eval_every=4"))


def lines(run_dir):
    text = (pathlib.Path(run_dir) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "loss/total" in line]


def test_the_first_step_knows_no_difference_and_the_last_one_prefers(finished):
    steps = lines(finished.run_dir)
    assert steps[0]["loss/total"] == pytest.approx(math.log(2), rel=1e-6)
    assert steps[0]["reward/margin"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["reward/margin"] > 0.1
    assert finished.metrics["eval/reward_accuracy"] > 0.9
    assert finished.metrics["eval/reward_margin"] > 0.1
    assert finished.metrics["eval/loss"] < math.log(2)


@pytest.mark.variant
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(configured, finished, tmp_path):
    short = api.train(configured(tmp_path, "train.steps=3", "train.eval_every=4"))
    api.resume(short.run_dir, ["train.steps=8"])
    ours, theirs = (lines(path) for path in (short.run_dir, finished.run_dir))
    names = [name for name in theirs[0] if not name.startswith(("perf/", "data/", "time"))]
    for one, other in zip(ours, theirs, strict=True):
        assert {n: one[n] for n in names if "lr" not in n} == {
            n: other[n] for n in names if "lr" not in n
        }


@pytest.mark.variant
def test_adapters_and_a_teacher_as_the_reference(configured, tmp_path):
    options = ["train.steps=3", "train.eval_every=3"]
    lora = "student.lora={rank: 2}"
    steps = lines(api.train(configured(tmp_path / "lora", *options, lora)).run_dir)
    assert steps[0]["loss/total"] == pytest.approx(math.log(2), rel=1e-6)
    teacher = "method.reference=teacher"
    steps = lines(api.train(configured(tmp_path / "teacher", *options, teacher)).run_dir)
    assert abs(steps[0]["loss/total"] - math.log(2)) > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.loss_on=all"], "use completion"),
        (["method={name: kd}"], "method kd does not compare"),
        (["eval.compare=true"], "the SFT control would learn the rejected answers"),
        (["method.beta=0"], "beta"),
        (["teacher=null", "student={random: {layers: 1, embed: 16, mlp: 16, heads: 2}}",
          "method.reference=teacher"], "method dpo needs a teacher"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(options, message, configured, tmp_path):
    with pytest.raises(UserError, match=message):
        api.train(configured(tmp_path, *options))


def test_text_is_no_pair(configured, data, tmp_path):
    text = f"data.train=[{{path: {data}/train.txt, format: paragraphs}}]"
    with pytest.raises(UserError, match="plain text has no completions|dpo compares pairs"):
        api.train(configured(tmp_path, text))
    chats = tmp_path / "asked.jsonl"
    chats.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(UserError, match="method dpo compares pairs"):
        api.train(configured(tmp_path, f"data.train=[{{path: {chats}}}]"))
