"""The sections teachers and routing: what goes with them, and what is refused by name."""

import pytest

from jaxdistill import config, methods
from jaxdistill.config import keys, preflight
from jaxdistill.config.routing import problem
from jaxdistill.errors import ConfigError

BASE = """
teachers:
  math: {source: t1}
  code: {source: t2}
student: {source: s}
tokenizer: {from: student}
data:
  train: [{path: a.jsonl, teacher: math}, {path: b.jsonl}]
  eval: [{path: e.jsonl}]
  seq_len: 64
method: {name: kd}
train: {steps: 10}
"""


ASKING = [
    "method={name: reverse_kd, alpha: 0}", "data.prompts=[{path: p.jsonl}]",
    "rollout={prompts_per_step: 4, max_new_tokens: 8}",
]  # fmt: skip
REWARDS = [
    *ASKING, "rollout.samples=2", "method={name: grpo, teacher_weight: 1.0}",
    "reward={verifiers: [{verifier: number}]}",
]  # fmt: skip
SERVER = "teachers.code.cache: a server takes no part in a step: `jaxdistill teacher cache --tea"
ANSWERS = 'teachers.code.cache = "c": was never asked about what the student will write: remove it'


def test_rewards_stand_beside_several_teachers():
    assert config.loads(BASE, overrides=REWARDS).reward is not None


def told(*overrides, text=BASE):
    with pytest.raises(ConfigError) as caught:
        config.loads(text, "conf.yaml", overrides)
    return str(caught.value)


def test_what_is_given_loads_and_is_written_out():
    loaded = config.loads(BASE, overrides=["routing.default=code", "teachers.code.dtype=float32"])
    assert list(loaded.teachers) == ["math", "code"] and loaded.teacher is None
    assert loaded.teachers["code"].dtype == "float32" and loaded.routing.normalise == "token"
    assert config.loads(config.dump(loaded)) == loaded
    answers = config.loads(BASE, overrides=["teachers.code={cache: c}"])
    assert answers.teachers["code"].cache == "c"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher={source: t}"], "give teacher, or teachers by name, not both"),
        (["teachers={}"], "teachers: needs 1 or more entries"),
        (["teachers={'a.b': {source: t}}"], "teachers"),
        (["teachers.code={}"], "teachers.code: needs one of source, random, api"),
        (["teachers.code.random.like=teacher"], "teachers.code.random"),
        (["teachers.code={api: {base_url: 'http://h/v1', model: m}}"], SERVER),
        (["teachers.code={cache: c}", *ASKING], ANSWERS),
        (
            ["teachers.code={api: {base_url: 'http://h/v1', model: m}}", *ASKING],
            "method reverse_kd reads the teacher's probabilities for reverse_kl, and a server says",
        ),
        (
            ["teachers.code={api: {base_url: 'http://h/v1', model: m}}", *REWARDS],
            "method grpo reads whole rows of its probabilities, and a server says",
        ),
        ([*REWARDS, "routing.normalise=teacher"], "would weigh rewards by how much text is for a"),
        (
            [*REWARDS, "method.teacher_weight=0"],
            "grpo has no teacher with teacher_weight: 0: it do",
        ),
        (
            ["teachers.code={self: {weights: frozen}}"],
            "teachers.code.self: the student itself teaches alone",
        ),
        (
            ["routing.default=maths"],
            'routing.default = "maths": no such teacher: there are math, co',
        ),
        (["data.train.0.teacher=x"], 'data.train.0.teacher = "x": no such teacher: there are math'),
        (["data.eval.0.teacher=x"], 'data.eval.0.teacher = "x": no such teacher'),
        (
            ["tokenizer.from=teacher"],
            'tokenizer.from = "teacher": is that of one, and there are sev',
        ),
        (["student={from: teacher}"], 'student.from = "teacher": is cut out of one'),
        (["student={random: {like: teacher}}"], 'student.random.like = "teacher": is like one'),
        (
            ["teachers=null"],
            'data.train.0.teacher = "math": no such teacher: there is no section te',
        ),
        (["teachers=null", "routing.default=math"], "routing: "),
        (["method={name: sft}"], 'method.name = "sft": sft has no teacher: it does not go'),
        (["method={name: hidden}"], "hidden reads layers, whose widths it fits to one teacher"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, words):
    assert words in told(*overrides)


def test_every_method_goes_with_several_teachers_or_says_why_not():
    """By hand: those of logits of one vocabulary, without records or widths of their own."""
    several = {
        "kd", "reverse_kd", "jsd", "total_variation", "smoothed_kd", "distillm", "akl", "alphanet",
        "dkd", "abkd", "taid", "ctkd", "sampled_kl",
    }  # fmt: skip
    found = {}
    for name, row in methods.METHODS.items():
        found[name] = problem(row.options(name=name))
    assert {name for name, why in found.items() if why is None} == several
    assert found["grpo"] == "has no teacher with teacher_weight: 0"
    assert problem(methods.METHODS["grpo"].options(name="grpo", teacher_weight=0.5)) is None
    assert found["alm"] == found["uld"] == "has a teacher read tokens of its own"
    assert found["ted"] == found["minilm"] == found["hidden"]
    assert found["distillm2"] == "compares text of several origins"


@pytest.mark.parametrize("word", ["mopd", "multi-teacher", "domain_teachers"])
def test_names_of_other_tools_lead_here(word):
    assert keys.explain(word).startswith(f"{word} is teachers here")
    assert "a model folder" in keys.explain("teachers.math.source").lower()
    assert keys.explain("teachers.code.source") == keys.explain("teachers.math.source").replace(
        "math", "code"
    )


def test_a_key_below_a_name_is_corrected():
    assert 'did you mean "source"?' in told("teachers.math.sourc=t")


def test_missing_folders_of_each_teacher_are_told_before_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [str(error) for error in preflight.check(config.loads(BASE))]
    stored = preflight.check(config.loads(BASE, overrides=["teachers.math={cache: c}"]))
    assert any('teachers.math.cache = "c": holds no' in str(one) for one in stored)
    for name, folder in (("math", "t1"), ("code", "t2")):
        assert any(f'teachers.{name}.source = "{folder}"' in line for line in lines), lines
