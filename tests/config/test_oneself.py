"""The section teacher.self: what it needs, and what cannot go with it."""

import pytest

from jaxdistill import config
from jaxdistill.config import keys
from jaxdistill.errors import ConfigError

BASE = """
teacher: {self: {weights: ema, context: "{solution} {prompt}"}}
student: {source: s}
data: {train: [{path: t.jsonl}], eval: [{path: e.jsonl}], seq_len: 64, loss_on: completion}
method: {name: kd, alpha: 0.0}
train: {steps: 10, batch_size: 8}
"""
PROMPTS = ["data.prompts=[{path: p.jsonl}]", "data.train=[]"]
ROLLOUT = [*PROMPTS, "rollout={prompts_per_step: 8, max_new_tokens: 8}"]


def test_the_tokenizer_is_the_students_and_what_is_written_out_loads_again():
    loaded = config.loads(BASE)
    assert loaded.teacher.self_.ema_decay == 0.95
    assert config.loads(config.dump(loaded)) == loaded
    config.loads(BASE, "conf.yaml", ROLLOUT)
    config.loads(BASE, "conf.yaml", ["teacher={self: {weights: frozen}}"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["teacher.self.weights=live", "teacher.self.ema_decay=0.9"],
            "no effect with weights: live",
        ),
        (
            ["teacher={self: {weights: live}}"],
            "the same weights behind the same prompt says the same",
        ),
        (
            ["teacher={self: {weights: ema, ema_decay: 0}}"],
            "ema_decay = 0: the average of one moment says what the student says",
        ),
        (
            ["teacher={self: {weights: ema, skip_first: 1}}"],
            "skip_first = 1: has no effect without",
        ),
        (
            ['teacher.self.context="{prompt} {hint}"'],
            "{hint} is no field of a record: use prompt, sib",
        ),
        (['teacher.self.context="{solution}"'], "holds {prompt} 0 times: it must stand there once"),
        (
            ['teacher.self.context="{prompt} now"'],
            "asks for no field of the record: add one of answer",
        ),
        (['teacher.self.context="{prompt}"'], "is the student's own prompt: add a field such as"),
        (['teacher.self.context="{prompt}{completion}"'], "of given text is the answer itself"),
        (["teacher.self.ema_decay=1.5"], "teacher.self.ema_decay = 1.5"),
        (["teacher.self.template_kwargs={a: [1]}"], "must be text, a number, true, false or null"),
        (["teacher.source=m"], "give only one of source, random, api, self"),
        (["teacher.cache=runs/c"], "stores what another model said: remove it, or self"),
        (["teacher.dtype=float32"], "is the student's (student.compute_dtype): remove it"),
        (["method={name: sft}"], "method sft asks for no teacher: remove it"),
        (["method={name: hidden}"], "hidden needs a teacher that is another model"),
        (["method={name: alm}"], "alm needs a teacher that is another model"),
        (["method={name: dpo, reference: teacher}"], "dpo needs a teacher that is another model"),
        (["student={from: teacher}"], "the teacher is the student itself: name its model"),
        (["checkpoint.best_metric=eval/kl_t1"], "this one exists in a step: use eval/loss"),
        (["mesh.context=2"], "mesh.context = 2: parts rows by their length"),
        (["data.loss_on=all"], 'loss_on = "all": the context stands before one whole answer'),
        (["data.long_documents=split"], 'long_documents = "split": the context stands before one'),
        (
            ["teacher.self.seq_len=32"],
            "seq_len = 32: the teacher reads what the student reads and m",
        ),
        (['teacher.self.context="{sibling} {prompt}"'], "{sibling} is an answer that was judged"),
        (
            ["teacher=null", "tokenizer={from: student}", "teachers={a: {self: {weights: ema}}}"],
            "the student itself teaches alone: give source or random, or teacher.self",
        ),
        ([*ROLLOUT, "teacher.self.skip_first=8"], "leaves nothing of answers of 8 tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(overrides, words):
    with pytest.raises(ConfigError) as caught:
        config.loads(BASE, "conf.yaml", overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("sdft", "teacher.self"),
        ("opsd", "teacher.self"),
        ("self-distillation", "teacher.self"),
        ("privileged_context", "teacher.self.context"),
        ("ema", "teacher.self.ema_decay"),
        ("sync_steps", "teacher.self.ema_every"),
    ],
)
def test_the_names_of_other_tools_are_found(word, key):
    first, nothing, told = keys.explain(word).split("\n")[:3]
    assert first.startswith(f"{word} is {key} here") and not nothing
    assert told.startswith(f"{key}: ")
