"""Attention of the device at hand beside XLA's form: values and gradients, then time and memory."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill import chips, device_memory
from jaxdistill.bench import timing
from jaxdistill.kernels import choice
from jaxdistill.models import DecoderConfig, attention, attention_check

_HOME = {"gpu": "cudnn", "tpu": "splash", "cpu": "splash"}  # on a CPU as plain JAX


class AttentionProblem(NamedTuple):
    """Rows of one layer.

    Attributes:
      name: whose heads they are.
      config: of the model.
      length: tokens of a row.
      dtype: of the activations.
    """

    name: str
    config: DecoderConfig
    length: int
    dtype: str

    @property
    def label(self) -> str:
        """The problem in one word."""
        return f"{self.name}[{self.length}]{self.dtype}"


class AttentionSizes(NamedTuple):
    """Which problems are checked, and which are timed."""

    checked: tuple[AttentionProblem, ...]
    timed: tuple[AttentionProblem, ...]


def _heads(heads: int, groups: int, size: int) -> DecoderConfig:
    return DecoderConfig("llama", 64, heads * size, 64, 1, heads, groups, size)


_LLAMA, _GEMMA = _heads(32, 8, 128), _heads(8, 4, 256)
_WINDOW = dataclasses.replace(_LLAMA, windows=(300,))
_CAPPED = dataclasses.replace(_GEMMA, windows=(512,), attention_softcap=50.0)
LARGE = AttentionSizes(
    (
        AttentionProblem("llama", _LLAMA, 1024, "bfloat16"),
        AttentionProblem("window", _WINDOW, 1024, "bfloat16"),
        AttentionProblem("capped", _CAPPED, 1024, "bfloat16"),
        AttentionProblem("smollm2", _heads(9, 3, 64), 1000, "bfloat16"),
        AttentionProblem("llama", _LLAMA, 1024, "float16"),
        AttentionProblem("llama", _LLAMA, 1024, "float32"),
    ),
    (
        AttentionProblem("llama", _LLAMA, 2048, "bfloat16"),
        AttentionProblem("llama", _LLAMA, 8192, "bfloat16"),
    ),
)
_TINY = _heads(2, 1, 16)
SMALL = AttentionSizes(
    (
        AttentionProblem("tiny", _TINY, 128, "float32"),
        AttentionProblem(
            "capped",
            dataclasses.replace(_TINY, windows=(40,), attention_softcap=1.5),
            128,
            "bfloat16",
        ),
    ),
    (AttentionProblem("tiny", _TINY, 300, "float32"),),
)


def forms(problem: AttentionProblem) -> list[str]:
    """What computes it on this device beside all scores at once: its kernel, and blocks."""
    kernel = _HOME[choice.current_device().platform]
    _, config, length, dtype = problem
    can = attention.lacks(kernel, config, length, dtype) is None
    return [kernel, "blocks"] if can else ["blocks"]


def check(problem: AttentionProblem, form: str) -> dict[str, Any]:
    """Values and gradients of a form, against XLA in float32 at the highest precision."""
    interpret = choice.current_device().platform == "cpu"
    _, config, length, dtype = problem
    told = attention_check.errors(form, config, length, dtype, interpret)
    return {
        "ok": all(off <= allowed for off, allowed in told.values()),
        "error": {what: off for what, (off, _) in told.items()},
        "allowed": {what: allowed for what, (_, allowed) in told.items()},
    }


def measure(problem: AttentionProblem, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each form: one row of tokens in one document, values and gradients.

    The ratio is that to all scores at once, where they fit; a form that does not fit is left out.
    FLOPs are those of the scores that are seen, the half of them, forward once and back two and a
    half times.
    """
    device = choice.current_device()
    _, config, length, dtype = problem
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, (1, length, heads, config.head_dim), dtype)
        for key, heads in zip(keys, (config.heads, *(config.kv_heads,) * 2), strict=True)
    ]
    # Interpreted, a kernel's time says nothing.
    timed = [form for form in forms(problem) if device.platform != "cpu" or form == "blocks"]
    programs: dict[str, Any] = {}
    for form in ("xla", *timed):
        try:
            run = jax.jit(jax.value_and_grad(_total(problem, form), argnums=(0, 1, 2)))
            programs[form] = run.lower(*arrays).compile()
            jax.block_until_ready(programs[form](*arrays))
        except jax.errors.JaxRuntimeError as error:
            programs.pop(form, None)
            if not device_memory.is_full(error):
                raise
    calls = {form: functools.partial(program, *arrays) for form, program in programs.items()}
    times = timing.in_turn(calls, rounds, device.platform)
    chip = chips.of_kind(device.kind)
    flops = 3.5 * 2 * config.heads * length**2 * config.head_dim
    for form, taken in times.items():
        rate, memory = flops / taken.median, programs[form].memory_analysis()
        yield {
            "shape": problem.label,
            "function": form,
            "ms": taken.median * 1e3,
            "ms_p10": taken.low * 1e3,
            "ms_p90": taken.high * 1e3,
            "ratio": taken.over(times["xla"]) if "xla" in times else None,
            "percent_of_peak": 100 * rate / chip.flops if chip and dtype != "float32" else None,
            "tflop_per_second": rate / 1e12,
            "temporary_mib": memory.temp_size_in_bytes / 2**20 if memory else None,
            "clock": taken.clock,
        }


def _total(problem: AttentionProblem, form: str) -> Any:
    attend = attention.of_form(form, problem.config, problem.length, None)

    def total(query, key, value):
        return jnp.sum(attend(jnp.int32(0), query, key, value, None).astype(jnp.float32) ** 2)

    return total
