"""`jaxdistill bench device`: what it finds, what it does with time, and what stands in its file."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import kernels
from jaxdistill.bench import attention_cases, device, end_to_end, liger
from jaxdistill.bench.shapes import Shape
from jaxdistill.cli import bench
from jaxdistill.errors import ConfigError
from jaxdistill.models import attention

TINY = device.CheckSizes(
    (9,), (93,), ("float32",), ((9, 93, 8),), (Shape("tiny", 8, 128, 8, 16, "float32"),),
    attention_cases.SMALL, 1,
)  # fmt: skip


@pytest.mark.long
def test_everything_is_right_here_and_stands_in_the_file(tmp_path):
    """The short list of a CPU, the kernel's statistics in the interpreter where there is one."""
    path, lines = tmp_path / "device.json", []
    wanted = (
        "self-check",
        "statistics",
        "forward_kl",
        "generalized_jsd",
        "linear_divergence",
        "linear_logprobs",
        "attention splash",
        "attention blocks",
        "end",
        "time beside Liger",
        "time attention",
    )
    found = [part for part in device.parts(TINY) if part.name.startswith(wanted)]
    of = lambda part: next(word for word in wanted if part.name.startswith(word))
    found = {of(part): part for part in found}.values()
    result = device.run(60.0, path, lines.append, chosen=list(found))
    assert [part for part in result["parts"] if not part["ok"]] == []
    assert result["ok"]
    assert json.loads(path.read_text()) == result
    assert len(lines) == len(result["parts"]) == len(found)
    assert result["left_out"] == []
    assert result["machine"]["versions"]["jax"]
    errors = [part["error"] for part in result["parts"] if "error" in part]
    assert errors


def test_a_run_that_resumes_to_other_losses_is_found(monkeypatch):
    recorded = iter([{1: 3.0, 6: 2.0}, {1: 3.0, 6: 2.5}])

    def train(config, hooks=None):
        if isinstance(hooks, end_to_end._Interrupt):
            for _ in range(end_to_end.STOPPED):
                hooks.at("step.before")

    monkeypatch.setattr(end_to_end.session, "train", train)
    monkeypatch.setattr(end_to_end.session, "resume", lambda folder: None)
    monkeypatch.setattr(end_to_end, "_recorded", lambda run: next(recorded))
    found = end_to_end.run("float32")
    assert not found["ok"] and not found["resumed"]


def test_it_stops_in_time_and_a_failure_is_a_finding(tmp_path):
    path = tmp_path / "device.json"
    ticks = iter(range(0, 1000, 20))

    def fails():
        assert not path.exists() or json.loads(path.read_text())["parts"]
        raise RuntimeError("no such instruction")

    chosen = [device.Check("one", lambda: {"ok": True}), device.Check("two", fails)]
    chosen += [device.Check(str(n), lambda: {"ok": True}) for n in range(9)]
    result = device.run(3.0, path, print, chosen=chosen, clock=lambda: next(ticks))
    one, two, *rest = result["parts"]
    assert one == {"name": "one", "seconds": 20, "ok": True}
    assert not two["ok"] and two["error"] == "RuntimeError: no such instruction"
    assert not result["ok"]
    assert result["left_out"] == [str(n) for n in range(len(rest), 9)]
    assert 0 < len(result["left_out"]) < 9
    assert json.loads(path.read_text()) == result


def test_a_wrong_kernel_is_found(monkeypatch):
    right = kernels.divergence
    wrong = lambda *args, implementation, **options: (
        right(*args, implementation=implementation, **options)
        * (1.0 if implementation == "reference" else 1.001)
    )
    monkeypatch.setattr(kernels, "divergence", wrong)
    part = next(part for part in device.parts(TINY) if part.name.startswith("forward_kl"))
    assert not part.run()["ok"]


def test_the_list_begins_with_what_tells_most():
    names = [part.name.split()[0] for part in device.parts(device.LARGE)]
    assert names[0] == "self-check"
    assert names.index("forward_kl") < names.index("linear_divergence") < names.index("time")
    assert len(names) == len(list(device.parts(device.LARGE))) > 300


def test_the_command_fails_where_something_is_wrong(monkeypatch, capsys):
    facts = {"name": "forward_kl", "seconds": 1.0, "ok": False}
    result = {"machine": {"device": "H9"}, "parts": [facts], "left_out": [], "ok": False}
    monkeypatch.setattr(device, "run", lambda *_, **__: result)
    options = argparse.Namespace(
        what="device", minutes=1.0, save=None, json=False, peers_python=None
    )
    with pytest.raises(ConfigError, match="wrong on H9: forward_kl"):
        bench.run(options)
    facts["ok"] = True
    bench.run(options)
    assert "1 parts are right" in capsys.readouterr().out


class Peer(liger.PeerProcess):
    """Stands in for Liger's process: the definition in float64, times `factor`."""

    factor = 1.0

    def __init__(self, python, folder):
        self.folder = folder

    def ask(self, do, **words):
        if do != "answer":
            return {"seconds": 0.5, "peak_mib": 3.0} if do == "step" else {}
        load = lambda name: np.load(self.folder / f"{name}.npy")
        arrays = [load(name) for name in liger.ARRAYS]
        with jax.enable_x64(True):

            def loss(hidden, head):
                s, t = hidden @ head.T, taught @ teacher.T
                ce = -jnp.take_along_axis(jax.nn.log_softmax(s), labels[:, None], 1)[:, 0]
                log_q, log_p = (jax.nn.log_softmax(x / liger.TEMPERATURE) for x in (s, t))
                kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), 1)
                return jnp.mean(liger.ALPHA * ce + (1 - liger.ALPHA) * kl)

            taught, teacher, *wide = (jnp.asarray(np.float64(arrays[i])) for i in (2, 3, 0, 1))
            labels = jnp.asarray(arrays[4])
            value, slopes = jax.value_and_grad(loss, (0, 1))(*wide)
        for name, slope in zip(liger.ARRAYS, slopes, strict=False):
            np.save(self.folder / "answers" / f"{name}.npy", np.asarray(slope) * self.factor)
        return {"value": float(value)}

    def close(self):
        pass


def test_liger_stands_beside_ours_where_it_is_and_is_no_judge_of_it(monkeypatch):
    monkeypatch.setattr(liger, "PeerProcess", Peer)
    shape = TINY.shapes[0]
    found = liger.run(shape, 1)
    assert found["ok"] and max(found["error"].values()) < 1e-5
    ours, theirs = found["rows"]
    assert ours["function"].startswith("jaxdistill") and theirs["ms"] == 500
    assert ours["ratio"] == pytest.approx(ours["ms"] / 500)
    monkeypatch.setattr(Peer, "factor", 1.01)
    found = liger.run(shape, 1)
    assert found["ok"] and found["error"]["liger"] == pytest.approx(0.01, rel=1e-3)
    right = kernels.linear_divergence
    wrong = lambda *x, **options: (1.001 * right(*x, **options)[0],)
    monkeypatch.setattr(kernels, "linear_divergence", wrong)
    assert not liger.run(shape, 1)["ok"]


def test_a_kernel_of_attention_that_is_off_is_found(monkeypatch):
    problem = attention_cases.SMALL.checked[0]
    assert attention_cases.forms(problem) == ["splash", "blocks"]
    right = attention.of_form
    off = lambda form, *rest: (
        (lambda index, query, *more: right(form, *rest)(index, 1.01 * query, *more))
        if form == "blocks"
        else right(form, *rest)
    )
    monkeypatch.setattr(attention, "of_form", off)
    assert not attention_cases.check(problem, "blocks")["ok"]


def test_attention_is_timed_in_each_form_that_fits(monkeypatch):
    (problem,) = attention_cases.SMALL.timed
    rows = {row["function"]: row for row in attention_cases.measure(problem, 1)}
    assert rows.keys() == {"xla", "blocks"}  # an interpreted kernel's time says nothing
    assert rows["xla"]["ratio"] == 1
    right = attention_cases._total

    def total(problem, form):
        if form == "xla":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return right(problem, form)

    monkeypatch.setattr(attention_cases, "_total", total)
    (row,) = attention_cases.measure(problem, 1)
    assert row["function"] == "blocks" and row["ratio"] is None
