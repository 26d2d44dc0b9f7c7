"""Which loss the table of a run measures by: means over tokens, whatever it trained with."""

import types

import jax.numpy as jnp
import pytest

from jaxdistill import optim, teachers
from jaxdistill.methods import distillm2, dpo, kd, measuring, sft, signals, step_by_step
from jaxdistill.run import pairing, run_table, setup
from jaxdistill.run.run_table import RunTable

VOCAB = 11
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
    monkeypatch.setattr(setup, "format_of", lambda _: signals.ONLINE)
    table = object.__new__(RunTable)
    model = types.SimpleNamespace(config=None, params=None)
    table._models = types.SimpleNamespace(
        teacher=model if teacher else None,
        student=model,
        stored=None,
        vocab=VOCAB,
        pairing=pairing.Pairing(),
        second=None,
    )
    table._student = types.SimpleNamespace(compute_dtype=jnp.float32, quantize=None)
    table._signal = "online" if teacher else None
    kind = "pairs" if name == "dpo" and not teacher else "text"
    table._held_out = types.SimpleNamespace(dataset=types.SimpleNamespace(kind=kind))
    training = lambda *_: {}
    method = setup.RunMethod(
        OBJECTIVES[name], {}, teachers.none, optim.optimizer(0.1), lambda step: 0.1, training
    )
    table._program(method)
    (step,) = made
    if want == "own":
        assert step == (training, teachers.none)
    else:
        assert asked == [(want, VOCAB)]
        assert step == ("measuring", "online" if teacher else teachers.none)
