"""Plans a run: compiles its step for a target, and looks for what makes it fit, or faster."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from jaxdistill import config as configs
from jaxdistill import errors
from jaxdistill.config import Config
from jaxdistill.errors import UserError
from jaxdistill.plan import faster, targets
from jaxdistill.plan.targets import Target

Notice = Callable[[str], None]


def plan(
    config: Config,
    target: str,
    *,
    tries: int = 8,
    minutes: float = 10.0,
    notice: Notice = lambda line: None,
) -> dict[str, Any]:
    """What one step of a configuration asks of each device of a target, as a dict for JSON.

    The step is the one that `train` runs, compiled for arrays that have shapes and places only, in
    a process of its own: compilers read their settings when JAX starts, and some end the process
    when they fail. `plan.describe` makes text of the result.

    Args:
      config: of the run; its models may be random shapes, or folders that hold a config.json.
      target: such as tpu:v5p:2x2x4, gpu:h100:8 or cpu:8.
      tries: how many changes are compiled, at most. If it does not fit, single ones, and where none
        is enough the best of them together; if it does, those that may be faster.
      minutes: after which no change that may be faster is begun.
      notice: called with a line on what is being compiled.

    Raises:
      ConfigError: for an unknown target, a missing compiler, a mesh that is not the target's.
      ModelError: if the shapes of a model cannot be told from here.
    """
    targets.check(targets.parse(target))
    notice(f"compiling the step for {target}")
    with config.written.told():
        planned = _measured(config, target)
    if not tries or (planned["fits"] and planned["floor_seconds"] is None):
        return planned
    if not planned["fits"]:
        outcomes = list(_search(config, target, planned, tries, notice))
        fitting = [outcome for outcome in outcomes if outcome["fits"]]
        fitting.sort(key=lambda outcome: outcome["seconds_per_token"] or 0.0)
        return planned | {"tried": len(outcomes), "changes": fitting[:3]}
    attempt = lambda overrides: _tried(config, target, overrides, notice)
    search = faster.Search(planned, attempt, tries, 60 * minutes)
    outcomes = list(search.over(faster.kinds(config, planned["mesh"])))
    gains = [one for one in outcomes if one["fits"] and faster.better(one, planned)]
    gains.sort(key=lambda one: (one["floor_seconds"], sum(one["seconds"].values())))
    return planned | {"tried": len(outcomes), "faster": gains[:3]}


def _measured(config: Config, target: str) -> dict[str, Any]:
    """The answer of a process that compiles the step for the target."""
    with tempfile.TemporaryDirectory(prefix="jaxdistill-plan-") as dump:
        question = {"config": configs.dump(config), "target": target, "dump": dump}
        run = subprocess.run(
            [sys.executable, "-m", "jaxdistill.plan.worker"],
            input=json.dumps(question),
            env=environment(targets.parse(target), dump),
            capture_output=True,
            text=True,
        )
    lines = run.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        last = run.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(f"target = {target}: the compiler ended its process ({last[0][:500]})")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise getattr(errors, answer["kind"])(answer["error"])
    return answer


def environment(target: Target, dump: str) -> dict[str, str]:
    """The environment of a process that compiles for a target and tells when buffers are alive."""
    own = targets.environment(target)
    flags = own.get("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    flags += f" --xla_dump_to={dump} --xla_dump_hlo_as_text"
    flags += " --xla_dump_hlo_module_re=jit_(step|write|read)"
    # A program out of JAX's cache would not be compiled, and tell nothing.
    own |= {"XLA_FLAGS": flags.strip(), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return {**os.environ, **own}


@dataclasses.dataclass(frozen=True)
class _Change:
    """Settings that may make a step fit.

    Attributes:
      about: what it changes; changes about the same thing are not combined.
      overrides: as on the command line.
    """

    about: str
    overrides: tuple[str, ...]


def changes(config: Config, mesh: dict[str, int]) -> Iterator[_Change]:
    """What may be tried, what costs least first; not all of it need be valid for the models."""
    wide = [key for key, one in config.teacher_sections.items() if one.dtype == "float32"]
    if wide:
        yield _Change("teacher", tuple(f"{key}.dtype=bfloat16" for key in wide))
    order = ("none", "dots", "full")
    for remat in order[order.index(config.student.remat) + 1 :]:
        yield _Change("remat", (f"student.remat={remat}",))
    rows_apart = mesh["data"] * mesh["fsdp"] * mesh.get("expert", 1)
    if mesh["data"] > 1:
        whole = mesh["data"] * mesh["fsdp"]  # also over slow networks
        yield _Change("mesh", ("mesh.data=1", f"mesh.fsdp={whole}"))
    for more in (2, 4, 8):
        micro = config.train.micro_batches * more
        rows = config.train.batch_size // micro
        if rows and rows % rows_apart == 0:
            yield _Change("micro-batches", (f"train.micro_batches={micro}",))
    yield _Change("chunk", ("method.chunk=256",))
    for tensor in (2, 4):
        if mesh["fsdp"] % tensor == 0:
            fsdp, parts = mesh["fsdp"] // tensor, mesh["tensor"] * tensor
            yield _Change("mesh", (f"mesh.fsdp={fsdp}", f"mesh.tensor={parts}"))
    teacher = config.teacher
    away = teacher and (teacher.offload or teacher.cache or teacher.mesh)
    if teacher and (teacher.source or teacher.random) and not away:
        yield _Change("place of the teacher", ("teacher.offload=true",))
    parts = 2 * mesh["context"] if mesh["context"] > 1 else 1
    if config.data.seq_len % (2 * parts) == 0:
        yield _Change("length", (f"data.seq_len={config.data.seq_len // 2}",))


def _search(
    config: Config, target: str, found: dict[str, Any], tries: int, notice: Notice
) -> Iterator[dict[str, Any]]:
    """Single changes first; if none fits, those together that saved most."""
    total = found["memory"]["total"]
    outcomes = []
    for change in changes(config, found["mesh"]):
        if len(outcomes) >= tries:
            break
        outcome = _tried(config, target, change.overrides, notice)
        if outcome is not None:
            outcomes.append((change, outcome))
            yield outcome
    if any(outcome["fits"] for _, outcome in outcomes):
        return
    best: dict[str, tuple[float, _Change]] = {}
    for change, outcome in outcomes:
        saved = total - outcome["total"]
        if saved > 0 and saved > best.get(change.about, (0.0, change))[0]:
            best[change.about] = (saved, change)
    ranked = [change for _, change in sorted(best.values(), key=lambda pair: -pair[0])]
    for count in range(2, len(ranked) + 1):
        overrides = tuple(word for change in ranked[:count] for word in change.overrides)
        outcome = _tried(config, target, overrides, notice)
        if outcome is not None:
            yield outcome
            if outcome["fits"]:
                return


def _tried(
    config: Config, target: str, overrides: tuple[str, ...], notice: Notice
) -> dict[str, Any] | None:
    """What a changed configuration needs, None where it is none or no compiler takes it."""
    notice(f"trying {' '.join(overrides)}")
    try:
        changed = configs.loads(configs.dump(config), "changed", overrides)
        planned = _measured(changed, target)
    except UserError:
        return None
    floor = planned["floor_seconds"]
    return {
        "overrides": list(overrides),
        "total": planned["memory"]["total"],
        "floor_seconds": floor,
        "seconds": planned["seconds"],
        "seconds_per_token": None if floor is None else floor / planned["tokens_per_step"],
        "fits": planned["fits"],
    }
