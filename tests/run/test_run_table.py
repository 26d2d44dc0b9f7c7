"""Which loss the table of a run measures by: means over tokens, whatever it trained with."""

import types

import jax.numpy as jnp
import pytest

from jaxdistill import models, optim, teachers
from jaxdistill.config.models import Teacher
from jaxdistill.data.teacher_cache import formats
from jaxdistill.methods import distillm2, dpo, kd, measuring, sft, step_by_step
from jaxdistill.run import pairing, run_table, setup
from jaxdistill.run.run_table import RunTable
from jaxdistill.run.stored import Stored
from jaxdistill.run.teaching import Nobody, Online, Several

VOCAB = 11
SHAPE = models.DecoderConfig("llama", VOCAB, 4, 8, 1, 1, 1, 4)
MODEL = models.Model(SHAPE, None, None, "made")
ONLINE = Online(Teacher(random={"embed": 4, "layers": 1, "heads": 1, "mlp": 8}), MODEL, 0, False)
HIDDEN, TOPK = (
    Stored("c", SHAPE, "float32", formats.choose(name, vocab=VOCAB, embed=4), None)
    for name in ("hidden", "topk")
)


class Asked(Nobody):
    """A teacher in the step, of whom nothing else is asked here."""

    compared, params = True, "weights"

    def signal(self, objective=None):
        return "online"


OBJECTIVES = {
    "kd": kd.objective(vocab=VOCAB),
    "sft": sft.objective(vocab=VOCAB),
    "distillm2": distillm2.objective(vocab=VOCAB),
    "dpo": dpo.objective(vocab=VOCAB),
    "step_by_step": step_by_step.objective(explains=(0, 1), vocab=VOCAB),
    "step_by_step with a teacher": step_by_step.objective(
        explains=(0, 1), with_teacher=True, vocab=VOCAB
    ),
}


@pytest.mark.parametrize(
    ("name", "teacher", "want"),
    [
        ("kd", True, "own"),
        ("sft", False, "own"),
        ("sft", True, "against_teacher"),
        ("distillm2", True, "against_teacher"),
        ("dpo", False, "own"),
        ("dpo", True, "against_teacher"),
        ("step_by_step", False, "cross_entropy"),
        ("step_by_step", True, "against_teacher"),
        ("step_by_step with a teacher", True, "against_teacher"),
    ],
)
def test_what_is_no_token_mean_is_not_measured_by(name, teacher, want, monkeypatch):
    asked, made = [], []
    for measured in ("cross_entropy", "against_teacher"):
        make = lambda vocab, measured=measured, **sparse: asked.append((measured, vocab))
        monkeypatch.setattr(measuring, measured, make)
    monkeypatch.setattr(run_table, "make_loss", lambda *_, **__: "measuring")
    make_step = lambda loss, signal: made.append((loss, signal)) or (lambda *_: {})
    monkeypatch.setattr(run_table.meter, "make_step", make_step)
    table = object.__new__(RunTable)
    model = types.SimpleNamespace(config=None, params=None)
    table._models = types.SimpleNamespace(
        teaching=Asked() if teacher else Nobody(),
        student=model,
        vocab=VOCAB,
        pairing=pairing.Pairing(),
        second=None,
    )
    table._student = types.SimpleNamespace(compute_dtype=jnp.float32, quantize=None)
    kind = "pairs" if name == "dpo" and not teacher else "text"
    table._held_out = types.SimpleNamespace(dataset=types.SimpleNamespace(kind=kind))
    training = lambda *_: {}
    method = setup.RunMethod(
        OBJECTIVES[name],
        {},
        Nobody(),
        teachers.none,
        optim.optimizer(0.1),
        lambda step: 0.1,
        training,
    )
    _, params = table._program(method)
    (step,) = made
    assert params == ("weights" if teacher and want != "own" else None)
    if want == "own":
        assert step == (training, teachers.none)
    else:
        assert asked == [(want, VOCAB)]
        assert step == ("measuring", "online" if teacher else teachers.none)


@pytest.mark.parametrize(
    ("known", "told"),
    [
        (ONLINE, True),
        (HIDDEN, True),
        (TOPK, False),
        (Several({"math": ONLINE, "code": HIDDEN}), True),
        (Several({"math": ONLINE, "code": TOPK}), False),
        (Nobody(), False),
    ],
)
def test_a_teacher_that_is_known_in_part_has_no_row(known, told):
    table = object.__new__(RunTable)
    table._models = types.SimpleNamespace(teaching=known)
    assert table.tells_teacher is told
