"""The section rollout: what follows from it, and what cannot go with it."""

import json

import numpy as np
import pytest

from jaxdistill import config
from jaxdistill.config import keys
from jaxdistill.data.prompts import Prompt
from jaxdistill.errors import ConfigError
from jaxdistill.rollouts.answers import Answer, packed

BASE = """
teacher: {source: t}
student: {source: s}
data:
  prompts: [{path: p.jsonl}]
  eval: [{path: e.jsonl}]
  seq_len: 64
method: {name: reverse_kd, alpha: 0.0}
train: {steps: 10, micro_batches: 2}
rollout: {prompts_per_step: 4, samples: 2, max_new_tokens: 32}
"""
SERVED = "teacher={api: {base_url: 'http://x/v1', model: m}}"


def told(*overrides, text=BASE):
    with pytest.raises(ConfigError) as caught:
        config.loads(text, "conf.yaml", overrides)
    return str(caught.value)


def test_the_batch_size_follows_and_what_is_written_out_loads_again():
    loaded = config.loads(BASE)
    assert loaded.train.batch_size == loaded.rollout.answers == 8
    assert loaded.rollout.share == 1.0 and loaded.data.train == ()
    assert config.loads(config.dump(loaded)) == loaded
    parts = {name: getattr(loaded, name) for name in type(loaded).model_fields}
    parts["train"] = type(loaded.train)(steps=10)
    assert type(loaded)(**parts).train.batch_size == 8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.batch_size=9", "train.micro_batches=1"], "prompts_per_step * samples = 8: remove"),
        (["data.prompts=[]"], "data.prompts: rollout answers prompts, and there are none"),
        (["rollout=null"], "data.prompts: has no effect without a section rollout"),
        (["rollout=null"], "data.train: required, but missing"),
        (["rollout=null", "data.train=[]"], "data.train: needs 1 or more entries"),
        (["rollout.share=0.5"], "rollout.share = 0.5 leaves updates to data.train, which is empty"),
        (["eval.compare=true"], "eval.compare = true: the SFT control learns from given answers"),
        (["data.eval={fraction: 0.1}"], "data.eval: a share of data.train may be among"),
        (["data.eval=[{path: p.jsonl}]"], "is in data.prompts too"),
        (["rollout.max_new_tokens=64"], "leaves no room for a prompt within data.seq_len (64)"),
        (["rollout.distilled_tokens=33"], "has no effect above max_new_tokens (32)"),
        (["rollout.temperature=0"], "samples = 2: would all be the same at temperature 0"),
        (["rollout.temperature=0", "rollout.top_p=0.9"], "top_p = 0.9: has no effect at temperat"),
        (["mesh.data=4", "rollout.slots=6"], "slots = 6: must be a multiple of mesh.data * mesh"),
        (["mesh.data=8"], "batch_size / micro_batches must be a multiple of mesh.data"),
        (["method={name: sft}"], "sft has no teacher: the student would learn its own words"),
        (["method={name: step_by_step, alpha: 0.5}"], "needs text that is given and marked"),
        (["method.alpha=0.5"], "the labels of what the student writes are its own words"),
        (["method.alpha={schedule: linear, start: 0.5, end: 0.0}"], "are its own words"),
        (["rollout.max_age=1000", "rollout.prompts_per_step=64", "data.seq_len=2048",
          "rollout.max_new_tokens=1000"], "up to 2064 MB of answers, and 50 MB are the limit"),
        (["teacher.cache=c"], "was never asked about what the student will write"),
        (["method={name: sampled_kl}", "rollout=null", "data.train=[{path: d.jsonl}]"],
         "sampled_kl learns from tokens that the student draws: add rollout"),
        (["method={name: sampled_kl}", "rollout.share=0.5", "data.train=[{path: d.jsonl}]"],
         "nobody drew those of data.train: use 1.0"),
        (["method={name: sampled_kl}", "rollout.top_p=0.9"], "not of those kept: remove it"),
        (["method={name: sampled_kl}", "rollout.temperature=0.7"],
         "method.temperature: must be rollout.temperature (0.7)"),
        ([SERVED, "teacher.cache=c"], "will write: remove it, the server is asked while it does"),
        ([SERVED], "reverse_kd reads the teacher's probabilities for reverse_kl, and a server says "
         "its probability of drawn tokens alone: use sampled_kl, or give the model's weights"),
        ([SERVED, "method={name: jsd, alpha: 0.0}"], "method jsd reads whole rows"),
        ([SERVED, "method={name: sampled_kl, temperature: 0.7}", "rollout.temperature=0.7"],
         "method.temperature = 0.7: a server's probabilities are of T = 1: use 1, or give teach"),
        ([SERVED, "method={name: sampled_kl}", "rollout.min_p=0.1"], "not of those kept: remove"),
        ([SERVED, "method={name: sampled_kl}", "rollout.share=0.5", "data.train=[{path: d.jsonl}]"],
         "nobody drew those of data.train: use 1.0"),
        ([SERVED, "method={name: sampled_kl}", "rollout.replay={}", "rollout.share=0.0",
          "data.train=[{path: d.jsonl}]"], "which old answers make large: remove it"),
        ([SERVED, "method={name: sampled_kl}", "checkpoint.best_metric=eval/kl_t1"],
         "is measured against a teacher at hand, and a server is asked about drawn tokens"),
        ([SERVED, "method={name: sampled_kl}", "student={from: teacher}"],
         "a served teacher has no weights to cut it out of: give student.source"),
        (["method={name: sampled_kl, weight: 0.0}"], "nothing would be learned"),
        (["rollout.replay={}", "data.train=[{path: d.jsonl}]"], "replay adapts the share"),
        (["rollout.replay={}", "rollout.share=0.0", "rollout.max_age=1",
          "data.train=[{path: d.jsonl}]"], "max_age = 1: replay meets old answers itself"),
        (["rollout.replay={capacity: 7}", "rollout.share=0.0", "data.train=[{path: d.jsonl}]"],
         "capacity = 7: must hold the answers of an update (8)"),
        (["rollout.replay={capacity: 100000}", "rollout.share=0.0", "data.train=[{path: d.jsonl}]"],
         "capacity = 100000: checkpoints would keep up to 64 MB"),
        (["rollout.replay={}", "rollout.share=0.0", "data.train=[{path: d.jsonl}]",
          "train.eval_every=null"], "adapts to the validation loss, and train.eval_every is null"),
        (["rollout.replay={}", "rollout.share=0.0", "data.train=[{path: d.jsonl}]",
          "method.alpha=0.5"], "the labels of what the student writes"),
        (["rollout.replay={}", "rollout.share=0.0", "data.train=[{path: d.jsonl}]",
          "method={name: sampled_kl}"], "which old answers make large: remove it"),
        (["rollout.lmbda=1"], 'unknown key; here it is "rollout.share"'),
        (["rollout.num_generations=1"], 'unknown key; here it is "rollout.samples"'),
        (["rollout.share=1.5"], "must be at most 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(overrides, words):
    assert words in told(*overrides)


def test_labels_count_where_the_student_never_writes():
    mixed = ("data.train=[{path: d.jsonl}]", "method.alpha=0.5")
    offline = config.loads(BASE, "c.yaml", [*mixed, "rollout.share=0.0", "eval.compare=true"])
    assert offline.method.alpha == 0.5
    for share in (0.1, 1.0):
        assert "alpha = 0.5: the labels of" in told(*mixed, f"rollout.share={share}")


def test_what_checkpoints_keep_is_never_more_than_was_said():
    """The longest answers there may be, in JSON as a manifest writes it."""
    rollout = config.loads(BASE, "c.yaml", ["rollout.max_age=1"]).rollout
    numbers = np.zeros(rollout.max_new_tokens)
    longest = Answer(
        Prompt(np.zeros(1, np.int32), {}), 2**40, 10**7, 2**40, numbers, False, numbers, numbers
    )
    kept = json.dumps(packed([longest] * rollout.answers), indent=1)
    assert rollout.ahead_bytes / 2 < len(kept) < rollout.ahead_bytes


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lmbda", "rollout.share"),
        ("num_generations", "rollout.samples"),
        ("on-policy", "rollout"),
        ("replay_ratio", "rollout.replay.schedule"),
        ("opd_kl_coef", "method.weight"),
        ("is_clip", "method.max_ratio"),
    ],
)
def test_the_names_of_other_tools_are_found(word, key):
    assert keys.explain(word).startswith(f"{word} is {key} here\n\n{key}: ")
