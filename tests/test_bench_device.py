"""`jaxdistill bench device`: what it finds, what it does with time, and what stands in its file."""

import argparse
import json

import pytest

from jaxdistill import kernels
from jaxdistill.bench import device, end_to_end
from jaxdistill.bench.shapes import Shape
from jaxdistill.cli import bench
from jaxdistill.errors import ConfigError

TINY = device.Sizes(
    (9,), (93,), ("float32",), ((9, 93, 8),), (Shape("tiny", 8, 128, 8, 16, "float32"),), 1
)  # fmt: skip


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
        "attention",
        "end",
    )
    found = [part for part in device.parts(TINY) if part.name.startswith(wanted)]
    found = {part.name.split()[0]: part for part in found}.values()
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
        if isinstance(hooks, end_to_end._Stop):
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

    chosen = [device.Part("one", lambda: {"ok": True}), device.Part("two", fails)]
    chosen += [device.Part(str(n), lambda: {"ok": True}) for n in range(9)]
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
    options = argparse.Namespace(what="device", minutes=1.0, save=None, json=False)
    with pytest.raises(ConfigError, match="wrong on H9: forward_kl"):
        bench.run(options)
    facts["ok"] = True
    bench.run(options)
    assert "1 parts are right" in capsys.readouterr().out
