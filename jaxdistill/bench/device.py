"""Proves the losses on the device at hand, then times them: what tells most first, within minutes.

A part that fails is a finding as well: the next one begins all the same.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxdistill.bench import attention_cases, device_checks, end_to_end, liger
from jaxdistill.bench import run as timed
from jaxdistill.bench.shapes import Shape, label
from jaxdistill.kernels import choice, rows
from jaxdistill.kernels.self_check import self_check
from jaxdistill.safe import whole_file


class Check(NamedTuple):
    """One thing that is found out: its name, and the function that returns the facts."""

    name: str
    run: Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class CheckSizes:
    """How large the problems are: a GPU's, or small ones for a CPU.

    Attributes:
      tokens: N of the checks.
      vocabs: V of the checks.
      dtypes: of logits.
      head: (N, V, D) of the checks of the head loss.
      shapes: of what is timed.
      attention: what is checked and timed of it.
      rounds: of timing.
    """

    tokens: tuple[int, ...]
    vocabs: tuple[int, ...]
    dtypes: tuple[str, ...]
    head: tuple[tuple[int, int, int], ...]
    shapes: tuple[Shape, ...]
    attention: attention_cases.AttentionSizes
    rounds: int


LARGE = CheckSizes(
    (64, 100, 824, 8192),
    (640, 50_304, 151_936),
    ("bfloat16", "float32", "float16"),
    ((100, 640, 64), (824, 50_304, 64)),
    (
        Shape("llama-3", 8192, 128_256, 2048, 4096, "bfloat16"),
        Shape("qwen", 4096, 151_936, 2560, 5120, "bfloat16"),
    ),
    attention_cases.LARGE,
    9,
)
SMALL = CheckSizes(
    (64, 9), (128, 93), ("float32", "bfloat16"), ((9, 93, 8),),
    (Shape("tiny", 16, 128, 8, 16, "float32"),), attention_cases.SMALL, 1,
)  # fmt: skip


def run(
    minutes: float,
    path: pathlib.Path | None,
    notice: Callable[[str], None],
    chosen: list[Check] | None = None,
    clock: Callable[[], float] = time.monotonic,
    peers_python: str | None = None,
) -> dict[str, Any]:
    """Finds out in turn what can be found out in so many minutes.

    The file holds after every part all that is known; it may be stopped at any second. A part that
    fails is a finding, with its error, and the rest goes on.

    Args:
      minutes: no part begins after them.
      path: of the JSON file; None writes none.
      notice: receives one line for each part.
      chosen: what is found out; None: all of `parts`, in sizes for the device.
      clock: seconds.
      peers_python: a Python that has torch and liger-kernel; None: this one, where it has them.

    Returns:
      What the file holds: {"machine", "parts": [{"name", "ok", "seconds", ...}], "left_out", "ok"}.
    """
    sizes = LARGE if choice.current_device().platform == "gpu" else SMALL
    ends = clock() + 60 * minutes
    todo = list(parts(sizes, peers_python) if chosen is None else chosen)
    result: dict[str, Any] = {"machine": machine(), "parts": [], "ok": True, "left_out": []}
    while todo and clock() < ends:
        part, began = todo.pop(0), clock()
        try:
            facts = part.run()
        except Exception as error:  # a kernel that does not compile or run is what is looked for
            facts = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        facts = {"name": part.name, "seconds": round(clock() - began, 2), **facts}
        result["parts"].append(facts)
        result["ok"] = result["ok"] and facts["ok"]
        result["left_out"] = [one.name for one in todo]
        notice(f"{part.name}: {'ok' if facts['ok'] else 'WRONG'} ({facts['seconds']:.1f} s)")
        if path is not None:
            whole_file.write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def machine() -> dict[str, Any]:
    """The device, the versions, and which implementations run on it, or why not."""
    device = choice.current_device()
    first = jax.devices()[0]
    distributions = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "numpy")
    versions = {}
    for name in (*distributions, "jaxdistill"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "memory": (first.memory_stats() or {}).get("bytes_limit"),
        "backend": getattr(first.client, "platform_version", None),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "support": {
            name: state.reason
            for name, state in choice.support(128_256, "bfloat16", device=device).items()
        },
    }


def parts(sizes: CheckSizes, peers_python: str | None = None) -> Iterator[Check]:
    """Everything, what tells most first; `peers_python` as in `run`."""
    first, vocab = sizes.dtypes[0], sizes.vocabs[0]
    for dtype in sizes.dtypes:
        yield Check(f"self-check {dtype}", functools.partial(_self_check, dtype))
    if choice.support(vocab - vocab % 64, first)["mosaic_gpu"].runs or device_checks.interpreter():
        for split, tokens in ((1, sizes.tokens[0]), (3, sizes.tokens[-1])):
            name = f"statistics {tokens}x{vocab} split {split}"
            yield Check(name, functools.partial(device_checks.statistics, tokens, vocab, split))
    cases = [("forward_kl", first, n, v) for n in sizes.tokens for v in sizes.vocabs]
    cases += [(kind, first, sizes.tokens[0], vocab) for kind in rows.KINDS]
    cases += [("forward_kl", dtype, sizes.tokens[:2][-1], vocab) for dtype in sizes.dtypes]
    rest = itertools.product(rows.KINDS, sizes.dtypes, sizes.tokens, sizes.vocabs)
    seen = list(dict.fromkeys(cases))
    yield from map(_dense_part, seen)
    for tokens, vocab, width in sizes.head:
        for name, given in {
            "kd": (None, False),
            "kd at 1": (None, True),
            "taid": (0.4, True),
        }.items():
            name = f"linear_divergence {tokens}x{vocab} {name}"
            yield Check(
                name, functools.partial(device_checks.head_loss, tokens, vocab, width, *given)
            )
        name = f"linear_logprobs {tokens}x{vocab}"
        yield Check(name, functools.partial(device_checks.logprobs, tokens, vocab, width))
    for problem in sizes.attention.checked:
        for form in attention_cases.forms(problem):
            name = f"attention {form} {problem.label}"
            yield Check(name, functools.partial(attention_cases.check, problem, form))
    yield Check(f"end to end {first}", functools.partial(end_to_end.run, first))
    for shape, kind in itertools.product(sizes.shapes, ("loss", "kernels")):
        name = f"time {kind} {label(shape)}"
        yield Check(name, functools.partial(_time, kind, shape, sizes.rounds))
    for shape in sizes.shapes:
        name = f"time beside Liger {label(shape)}"
        yield Check(name, functools.partial(liger.run, shape, sizes.rounds, peers_python))
    for problem in sizes.attention.timed:
        name = f"time attention {problem.label}"
        yield Check(name, functools.partial(_time_attention, problem, sizes.rounds))
    if sizes is not SMALL:
        yield from map(_dense_part, [case for case in rest if case not in seen])


def _self_check(dtype: str) -> dict[str, Any]:
    return {"ok": True, "implementation": self_check(dtype)}


def _dense_part(case: tuple[str, str, int, int]) -> Check:
    kind, dtype, tokens, vocab = case
    return Check(f"{kind} {dtype} {tokens}x{vocab}", functools.partial(device_checks.dense, *case))


def _time(kind: str, shape: Shape, rounds: int) -> dict[str, Any]:
    return {"ok": True, "rows": list(timed.measure(kind, shape, rounds, choice.current_device()))}


def _time_attention(problem: attention_cases.AttentionProblem, rounds: int) -> dict[str, Any]:
    return {"ok": True, "rows": list(attention_cases.measure(problem, rounds))}
