"""A run compares the loss's kernel with its reference before it compiles its step."""

import types

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.run import setup


def config(implementation="auto", logits_dtype="auto"):
    method = types.SimpleNamespace(implementation=implementation, logits_dtype=logits_dtype)
    return types.SimpleNamespace(
        method=method, student=types.SimpleNamespace(compute_dtype="bfloat16")
    )


def test_the_kernel_is_checked_where_one_runs_and_only_there(monkeypatch):
    asked = []
    monkeypatch.setattr(setup, "self_check", lambda *arguments: asked.append(arguments))
    run = getattr(setup.check_kernels_of, "__wrapped__", setup.check_kernels_of)
    run(config())
    assert asked == []  # XLA serves a CPU
    monkeypatch.setattr(setup.choice, "choose", lambda *arguments: "mosaic_gpu")
    run(config())
    run(config("mosaic_gpu", "float32"))
    assert asked == [("bfloat16", None), ("float32", "mosaic_gpu")]


def test_a_kernel_that_cannot_run_is_refused_before_anything_is_compiled():
    run = getattr(setup.check_kernels_of, "__wrapped__", setup.check_kernels_of)
    with pytest.raises(ConfigError, match="cannot run"):
        run(config("mosaic_gpu"))
