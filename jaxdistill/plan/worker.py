"""The process that compiles a step for a target: a JSON question on stdin, its answer on stdout.

`plan.search` starts it with the environment that the target's compiler needs, and with a folder
into which the compiler writes when each buffer is alive.
"""

import contextlib
import json
import os
import pathlib
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxdistill import config as configs
from jaxdistill import plan, xla_options
from jaxdistill.config import Config
from jaxdistill.config.ahead import passes
from jaxdistill.errors import FitError, UserError
from jaxdistill.models import count_parameters, experts, forward_flops_per_token
from jaxdistill.models.architecture import attention_flops_per_token
from jaxdistill.models.attention import KERNELS
from jaxdistill.plan import hlo, targets
from jaxdistill.plan.hlo import live
from jaxdistill.plan.targets import Target
from jaxdistill.run import ahead, on_policy, participants, setup, states, stored, teaching
from jaxdistill.run.participants import Models
from jaxdistill.run.setup import RunMethod
from jaxdistill.sharding import networks
from jaxdistill.train import step as steps

# The rest of a device's memory is for its runtime, libraries and fragments.
USABLE = 0.95


def main() -> None:
    """Answers one question; an error of the user's is an answer too."""
    question = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            config = configs.loads(question["config"])
            target = targets.parse(question["target"])
            parts = parts_of(config, target)
            answer = measure(config, target, *parts, question["dump"])
        except UserError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # whatever the compiler still does is of no use


def parts_of(config: Config, target: Target) -> tuple[jax.sharding.Mesh, Models, RunMethod]:
    """The mesh of described devices, the models without weights, and the method.

    Raises:
      UserError: whatever is wrong with the configuration on this target.
    """
    warnings.simplefilter("ignore")
    if target.platform == "gpu":
        with contextlib.suppress(ImportError):  # JAX 0.10 has no such kernels
            targets.assume_capability(target)
        targets.assume_cudnn(target)
    devices = targets.devices(target)
    mesh = setup.mesh_of(config, devices)
    models = participants.shapes_of(config, mesh, devices)
    return mesh, models, setup.method_of(config, models)


def measure(
    config: Config,
    target: Target,
    mesh: jax.sharding.Mesh,
    models: Models,
    method: RunMethod,
    dump: str,
) -> dict[str, Any]:
    """Compiles the step and counts: the dict that `search.plan` returns.

    Args:
      config: of the run.
      target: what to compile for.
      mesh: of the target's devices, but for those that are the teacher's own.
      models: without weights.
      method: of the configuration, or another in its place.
      dump: the folder of XLA_FLAGS=--xla_dump_to.
    """
    state = states.abstract(config, models.student.config, method.objective, method.tx, mesh)
    teacher_params = method.asked.abstract_params(mesh)
    batch = setup.abstract_batch_of(config, mesh, method.asked)
    asked = teaching.names(method.asked)
    dtype = config.student.compute_dtype
    held = plan.argument_bytes(state, teacher_params, batch, dtype, asked)
    away = plan.host_bytes(state, teacher_params)
    length = config.data.seq_len
    tokens = config.train.batch_size * length
    facts = {
        "target": str(target),
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "tokens_per_step": tokens,
        "attention": _attention(config, models, mesh),
        "compiler_options": xla_options.options(target.platform, mesh.size),
        "parameters": _counts(models, state),
    }
    embed = models.teacher.config.embed if models.teacher else None
    answers = None  # nobody can ask before about what the student will write
    if config.rollout is None:
        kept = teaching.stored(models.teaching).get("teacher")
        theirs = config.train.steps * config.train.batch_size * models.read_length(length)
        answers = stored.sizes(theirs, kept, models.read[1], embed)
    monitor = steps.recorded(config.train.log_every, config.train.steps)
    began = time.perf_counter()
    try:
        program = compiled(
            lambda: setup.compile_step(
                config, method, state, teacher_params, mesh, monitor, check_kernels=False
            ),
            pathlib.Path(dump),
        )
    except jax.errors.JaxRuntimeError as error:
        raise FitError(f"target = {target}: its compiler gives up: {error}") from None
    seconds = time.perf_counter() - began
    memory = _memory(program, held, target) | {"host": away}
    writing = on_policy.memory(config, models.student.config, mesh)
    if writing is not None:
        begin = on_policy.program_of(config, models, state, mesh)
        writing["temporaries"] = compiled(begin, pathlib.Path(dump), "write").total
        writing["total"] = sum(held.values()) + writing["temporaries"]
    apart = _apart(config, models, method.asked, batch, target, pathlib.Path(dump))
    largest = max(one["total"] for one in (memory, writing, apart) if one)
    places = networks(list(mesh.devices.flat))
    cost = plan.cost(program.text, mesh.shape, places, filled=experts.filled(mesh))
    cost = cost._replace(
        flops=cost.flops + _kernel_flops(config, models, mesh, apart=False),
        host_bytes=_from_host(away, config.train.micro_batches),
    )
    work = _work(config, models, method, target, cost, mesh, apart)
    return facts | {
        "teacher_cache": answers,
        "memory": memory,
        "rollout": writing,
        "teacher": apart,
        "fits": memory["available"] is None or largest <= memory["available"],
        "compile_seconds": seconds,
        **work,
    }


def _apart(
    config: Config,
    models: Models,
    asked: teaching.Teaching,
    batch: Any,
    target: Target,
    folder: pathlib.Path,
) -> dict[str, Any] | None:
    """What a teacher on devices of its own asks of each of them; None where it computes elsewhere.

    Its program for the shapes of a step's batch is compiled like the step.
    """
    if not isinstance(asked, ahead.Ahead):
        return None
    mesh, params = asked.mesh, asked.held(asked.mesh)
    read = steps.abstract_batch(asked.read(batch), config.train.batch_size, mesh)
    reads = asked.reads(passes(config.train))
    program = compiled(lambda: reads.prepare(None, params, read), folder, "read")
    places = networks(list(mesh.devices.flat))
    cost = plan.cost(program.text, mesh.shape, places, filled=experts.filled(mesh))
    cost = cost._replace(flops=cost.flops + _kernel_flops(config, models, mesh, apart=True))
    seconds = cost.seconds(target.chip)
    return {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "parameters": plan.local_bytes(params),
        "total": program.total,
        "flops": cost.flops,
        "sent_bytes": cost.link_bytes,
        "hidden_bytes": plan.local_bytes(batch.teacher),
        "seconds": seconds,
        "floor_seconds": max(seconds.values(), default=None),
    }


class Compiled(NamedTuple):
    """What a compiler wrote down of a program.

    Attributes:
      text: the scheduled program.
      assignment: where each value lies.
      live_ranges: when it is alive.
      total: bytes of arguments, results and temporaries, as they are laid out in memory.
    """

    text: str
    assignment: str
    live_ranges: str
    total: int


def compiled(work: Callable[[], Any], folder: pathlib.Path, name: str = "step") -> Compiled:
    """The program as soon as its buffers are laid out.

    What a compiler does afterwards is machine code, most of its work on a TPU and nothing that a
    plan needs: it goes on in a thread that ends with the process.
    """
    failed: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # told by the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    before = None
    while True:
        finished = not thread.is_alive()
        dump = _dumped(folder, name)
        if dump is not None and (dump == before or finished):
            return dump
        if failed and dump is None:
            raise failed[0]
        assert not finished, f"the compiler wrote nothing to {folder}"
        before = dump
        thread.join(0.5)


def _dumped(folder: pathlib.Path, name: str) -> Compiled | None:
    """What is in the folder, once all of it has begun to be there."""

    def read(ending: str) -> str:
        files = list(folder.glob(f"*jit_{name}*after_optimizations{ending}.txt"))
        return files[0].read_text() if files else ""

    text, assignment = read(""), read("-buffer-assignment")
    live_ranges = read("-live-range")
    # The first table of the report is that of the large memory.
    total = re.search(r"Total bytes: (\d+)\s", read("-memory-usage-report"))
    whole = text.rstrip().endswith("}") and "\nENTRY " in text and "Live ranges at" in live_ranges
    if not (whole and assignment and total):
        return None
    return Compiled(text, assignment, live_ranges, int(total[1]))


def _attention(config: Config, models: Models, mesh: jax.sharding.Mesh) -> dict[str, str]:
    """What computes the attention of whom."""
    with jax.set_mesh(mesh):
        return {who: form for who, (form, *_) in participants.attention_of(config, models).items()}


def _kernel_flops(config: Config, models: Models, mesh: jax.sharding.Mesh, *, apart: bool) -> float:
    """FLOPs on a device of attention kernels, which show no products: by formula.

    Two products forward and five backward, of pairs that see each other; with rematerialization the
    student's forward pass twice. With `apart` those of a teacher on devices of its own, else all
    others.
    """
    rows, total = config.train.batch_size, 0.0
    with jax.set_mesh(mesh):
        chosen = participants.attention_of(config, models)
    own = {"teacher"} if isinstance(models.teaching, ahead.Ahead) else set()
    for who, (form, model, length, _) in chosen.items():
        if (who in own) == apart and form in KERNELS:
            again = config.student.remat != "none"
            several = len(teaching.names(models.teaching)) or 1  # each reads its share of the rows
            passes = 3.5 + again if who == "student" else 1.0 / several
            total += passes * rows * length * attention_flops_per_token(model, length)
    return total / mesh.size


def _from_host(away: dict[str, int], parts: int) -> float:
    """Bytes that come from the host in a step: the teacher's layers in each of its parts."""
    return away.get("optimizer", 0) + parts * away.get("teacher", 0)


def _counts(models: Models, state: Any) -> dict[str, int]:
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    trainable, frozen = count(state.params), count(state.frozen)
    online = teaching.online(models.teaching).values()
    teacher = sum(count_parameters(one.model.config) for one in online)
    return {"total": trainable + frozen + teacher, "trainable": trainable, "teacher": teacher}


def _memory(program: Compiled, held: dict[str, int], target: Target) -> dict[str, Any]:
    """Bytes of a device, by kind; temporaries by what is alive when most is."""
    made = live.temporaries(hlo.parse(program.text), program.assignment, program.live_ranges)
    at_peak, most = plan.temporary_bytes(made)
    return {
        "arguments": held,
        "temporaries": program.total - sum(held.values()),
        "at_peak": at_peak,
        "most": most,
        "total": program.total,
        "available": available(target),
    }


def available(target: Target) -> float | None:
    """Bytes of a device that a program may fill, None for a CPU, whose devices share them."""
    return None if target.chip is None else USABLE * target.chip.memory


def _work(
    config: Config,
    models: Models,
    method: RunMethod,
    target: Target,
    cost: plan.Cost,
    mesh: jax.sharding.Mesh,
    apart: dict[str, Any] | None,
) -> dict[str, Any]:
    """FLOPs, bytes, collectives and the floor on the step's time, beside that of the teacher's."""
    tokens, chip = config.train.batch_size * config.data.seq_len, target.chip
    length = config.data.seq_len
    model_flops = 3 * forward_flops_per_token(models.student.config, length)
    model_flops += method.asked.flops_per_token(length, models.read_length(length))
    seconds = cost.seconds(chip)
    beside = [apart["floor_seconds"]] if apart and seconds else []
    floor = max([*seconds.values(), *beside], default=None)
    devices = len(ahead.devices(method.asked, mesh))
    known = chip is not None and floor is not None
    return {
        "flops": cost.flops,
        "model_flops": model_flops * tokens / devices,
        "bytes": cost.nbytes,
        "sent_bytes": cost.link_bytes,
        "host_bytes": cost.host_bytes,
        "network_bytes": cost.network_bytes,
        "collectives": cost.collectives,
        "largest_collectives": cost.largest,
        "unknown_loops": cost.unknown_loops,
        "seconds": seconds,
        "floor_seconds": floor,
        "tokens_per_second": tokens / floor if known else None,
        "mfu": model_flops * tokens / devices / (floor * chip.flops) if known else None,
        "source": chip.source if chip else None,
        "network_source": chip.network_source if chip else None,
    }


if __name__ == "__main__":
    main()
