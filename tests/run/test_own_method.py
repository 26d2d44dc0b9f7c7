"""A method of one's own is one file: options, formula, build, and its row in the table."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from pydantic import Field

import jaxdistill
from jaxdistill import methods
from jaxdistill.config import explain
from jaxdistill.errors import ConfigError
from jaxdistill.methods import head_loss, signals
from jaxdistill.methods.knobs import WeightKnob, scheduled
from jaxdistill.types import Mean

pytestmark = pytest.mark.usefixtures("plain_runs")


class ToyOptions(methods.Options):
    """KL, and a price on large hidden states."""

    strength: WeightKnob = Field(1.0, description="Price of a hidden state's mean square.")


def objective(**head) -> methods.Objective:
    """KL(teacher || student) + strength * mean(hidden ** 2). Knobs: strength."""

    def apply(params, student, signal, batch, knobs):
        means = head_loss.from_heads(head, student, signal.outputs, batch, knobs, alpha=0.0)
        squares = jnp.mean(jnp.square(student.hidden.astype(jnp.float32)), axis=-1)
        price, kl = jnp.sum(squares * batch.mask), means["loss"]
        loss = Mean(kl.total + knobs["strength"] * price, kl.count)
        return means | {"loss": loss, "loss/price": Mean(jax.lax.stop_gradient(price), kl.count)}

    return methods.Objective(methods.no_parameters, apply)


def build(options: ToyOptions, facts: methods.Facts) -> methods.Built:
    knobs = {"strength": scheduled(options.strength, facts.steps)}
    return methods.Built(objective(**options.head(facts)), knobs)


CONFIG = """\
run: {{name: toy, dir: {folder}/run}}
teacher: {{random: {{layers: 2, embed: 16, mlp: 16, heads: 2}}, dtype: float32}}
student: {{from: teacher, every: 2, compute_dtype: float32}}
tokenizer: {{from: bytes}}
data:
  train: [{{path: {data}/train.txt, format: paragraphs}}]
  eval: [{{path: {data}/eval.txt, format: paragraphs}}]
  seq_len: 32
  cache_dir: {data}/cache
method: {{name: toy, strength: {strength}}}
train: {{steps: 3, batch_size: 8, eval_every: null, log_every: 1}}
eval: {{max_rows: 8, samples: 0}}
logging: {{progress: none, tensorboard: false}}
"""


@pytest.fixture
def add():
    """`methods.add`, undone when the test ends."""
    before = dict(methods.METHODS)
    yield methods.add
    for name in set(methods.METHODS) - set(before):
        del methods.METHODS[name]


@pytest.fixture
def write(add, data, tmp_path):
    """strength -> the path of a configuration of the toy method."""
    add("toy", methods.Method(ToyOptions, build))

    def write(strength) -> pathlib.Path:
        path = tmp_path / "toy.yaml"
        path.write_text(CONFIG.format(folder=tmp_path, data=data, strength=strength))
        return path

    return write


def test_a_method_of_ones_own_trains_from_a_file(write):
    result = jaxdistill.distill(write(0.5))
    lines = (pathlib.Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "loss/total" in row]
    assert len(steps) == 3
    for row in steps:
        assert row["knobs/strength"] == 0.5
        expected = row["loss/divergence"] + 0.5 * row["loss/price"]
        assert row["loss/total"] == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(result.metrics["eval/kl_t1"])


def test_its_options_are_checked_and_explained_as_all_others(write):
    with pytest.raises(ConfigError, match=r"toy.yaml:10:\d+: method.strength = -1: must be at lea"):
        jaxdistill.load_config(write(-1))
    with pytest.raises(ConfigError, match=r'toy.yaml:10:\d+: method.streng.*mean "strength"'):
        jaxdistill.load_config(write("1, streng: 1"))
    assert "Price of a hidden state's mean square." in explain("method.strength")
    with pytest.raises(ValueError, match="there is such a method already"):
        methods.add("toy", methods.Method(ToyOptions, build))


def test_a_method_of_drawn_tokens_needs_no_temperature_of_its_own(add, data, tmp_path):
    row = methods.Method(ToyOptions, build, reads=lambda _: signals.DRAWN, reads_sampler=True)
    add("stand_in", row)
    path = tmp_path / "toy.yaml"
    asked = "rollout: {share: 1.0, prompts_per_step: 8, samples: 1, max_new_tokens: 4"
    text = CONFIG.format(folder=tmp_path, data=data, strength=1).replace(
        "name: toy, strength", "name: stand_in, strength"
    )
    text = text.replace(", batch_size: 8", "").replace(
        "  train: [", "  prompts: [{path: p.jsonl}]\n  train: ["
    )
    path.write_text(f"{text}{asked}}}\n")
    assert jaxdistill.load_config(path).method.strength == 1
    path.write_text(f"{text}{asked}, temperature: 0.5}}\n")
    with pytest.raises(ConfigError, match=r"rollout.temperature = 0.5: stand_in reads prob.*at 1"):
        jaxdistill.load_config(path)


def test_a_method_that_left_the_table_is_unknown(data, tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=data, strength=1))
    with pytest.raises(ConfigError, match=r'method.name = "toy": must be one of kd, '):
        jaxdistill.load_config(path)
