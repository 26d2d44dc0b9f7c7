"""Our step against the same step with materialised logits, compiled for devices that are described.

    python -m benchmarks.plan                                   # all of it, a quarter of an hour
    python -m benchmarks.plan --only llama3_8b_to_1b tpu:v5e:4x4

Per device: memory, work, collectives and the floor on the step's time; of the loss, what it makes
in the step at its fullest moment, and the temporaries of a program that is the loss alone. Nothing
runs: no number here is a measured time. What is found is added to results/plan.json.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from benchmarks import compress, duel

ROOT = pathlib.Path(__file__).resolve().parents[1]
TPUS = ("tpu:v5e:4x4", "tpu:v5p:2x2x4")


def _minitron(name: str) -> tuple[str, ...]:
    """A student of Llama-3.1-8B as Minitron made it, in place of the configuration's."""
    shape = {"like": "teacher", "head_dim": compress.LLAMA["head_dim"], **compress.STUDENTS[name]}
    shown = ", ".join(f"{key}: {value}" for key, value in shape.items())
    return (f"student.random={{{shown}}}",)


# name -> configuration, overrides, targets
CASES = {
    "llama3_8b_to_1b": ("plan_llama3_8b_to_1b", (), (*TPUS, "gpu:h100:8")),
    "qwen3_32b_to_4b": ("plan_qwen3_32b_to_4b", (), (*TPUS, "gpu:h100:8")),
    "minitron_width_4b": ("plan_llama3_8b_to_1b", _minitron("width 4B"), ("tpu:v5p:2x2x4",)),
    "minitron_depth_4b": ("plan_llama3_8b_to_1b", _minitron("depth 4B"), ("tpu:v5p:2x2x4",)),
}
KEPT = (
    "mesh", "devices", "tokens_per_step", "parameters", "memory", "fits", "flops", "model_flops",
    "bytes", "sent_bytes", "collectives", "largest_collectives", "seconds", "floor_seconds",
    "tokens_per_second", "mfu", "source", "unknown_loops", "jax",
)  # fmt: skip


def main() -> None:
    """Compiles the cases and saves them; --child is one compilation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs=2, metavar=("CASE", "TARGET"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child()
    for name, (file, overrides, found) in CASES.items():
        for target in found:
            if options.only in (None, [name, target]):
                _add(name, target, _compared(file, overrides, target))


def _add(name: str, target: str, result: dict) -> None:
    """One more entry of the saved file."""
    path = duel.RESULTS / "plan.json"
    plans = json.loads(path.read_text())["plans"] if path.exists() else {}
    plans.setdefault(name, {})[target] = result
    print(
        name, target, json.dumps(result["summary"], indent=1), duel.save("plan", {"plans": plans})
    )


def _compared(file: str, overrides: tuple[str, ...], target: str) -> dict:
    from jaxdistill import config

    loaded = config.load(ROOT / "configs" / f"{file}.yaml", overrides)
    ask = lambda what, head: _asked(config.dump(loaded), target, what, head)
    steps = {head: ask("step", head) for head in ("fused", "materialised")}
    alone = {head: ask("loss", head)["temporaries"] for head in steps}
    within = {head: step["memory"]["most"]["loss"] for head, step in steps.items()}
    ratio = lambda sizes: sizes["materialised"] / sizes["fused"]
    ours, theirs = steps["fused"], steps["materialised"]
    return {
        "summary": {
            "loss_bytes_in_the_step": within,
            "loss_bytes_in_the_step_ratio": ratio(within),
            "loss_bytes_alone": alone,
            "loss_bytes_alone_ratio": ratio(alone),
            "total_gib": {head: step["memory"]["total"] / 2**30 for head, step in steps.items()},
            "fits": {head: step["fits"] for head, step in steps.items()},
            "floor_ms": {head: 1e3 * step["floor_seconds"] for head, step in steps.items()},
            "floor_ratio": ours["floor_seconds"] / theirs["floor_seconds"],
            "largest_collective_mib": ours["largest_collectives"][0]["bytes"] / 2**20,
        },
        "overrides": list(overrides),
        **{head: {key: step[key] for key in KEPT} for head, step in steps.items()},
    }


def _asked(text: str, target: str, what: str, head: str) -> dict:
    """The answer of a process with the environment that the target's compiler needs."""
    from jaxdistill.plan import search, targets

    with tempfile.TemporaryDirectory(prefix="bench-plan-") as dump:
        question = {"config": text, "target": target, "dump": dump, "what": what, "head": head}
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan", "--child"],
            input=json.dumps(question),
            env=search.environment(targets.parse(target), dump),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(run.stdout.splitlines()[-1])


def _child() -> None:
    """Compiles the step, or the loss alone, with one of the two heads."""
    import os

    from jaxdistill import config
    from jaxdistill.plan import targets, worker

    question = json.load(sys.stdin)
    loaded = config.loads(question["config"])
    target = targets.parse(question["target"])
    mesh, models, method = worker.parts_of(loaded, target)
    if question["head"] == "materialised":
        method = _with_logits(loaded, models, method)
    if question["what"] == "step":
        answer = worker.measure(loaded, target, mesh, models, method, question["dump"])
    else:
        answer = {"temporaries": _loss_alone(loaded, mesh, models, method, question["dump"])}
    print(json.dumps(answer), flush=True)
    os._exit(0)


def _with_logits(config, models, method):
    """The same method, its loss made as it is written: from logits of all tokens, by autodiff."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from jaxdistill.models import decoder
    from jaxdistill.train import step as steps
    from jaxdistill.types import Mean

    def apply(params, student, signal, batch, knobs):
        logits, teacher = decoder.logits(student), decoder.logits(signal.outputs)
        alpha, temperature = knobs["alpha"], knobs["temperature"]
        log_q = jax.nn.log_softmax(logits / temperature)
        log_p = jax.nn.log_softmax(teacher / temperature)
        kl = temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        chosen = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        ce = jax.nn.logsumexp(logits, axis=-1) - chosen
        mask = batch.mask.astype(jnp.float32)
        total = jnp.sum((alpha * ce + (1 - alpha) * kl) * mask)
        return {"loss": Mean(total, jnp.sum(mask))}

    objective = method.objective._replace(apply=apply)
    loss = steps.make_loss(
        models.student.config,
        objective,
        compute_dtype=jnp.dtype(config.student.compute_dtype),
        remat=config.student.remat,
    )
    return dataclasses.replace(method, objective=objective, loss=loss)


def _loss_alone(config, mesh, models, method, dump: str) -> int:
    """Bytes of the loss's temporaries where value and gradients are all that is computed."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.plan import worker
    from jaxdistill.sharding import batch_sharding, replicated
    from jaxdistill.train import step as steps
    from jaxdistill.train.state import abstract_params
    from jaxdistill.types import Outputs, TeacherSignal

    rows = config.train.batch_size // config.train.micro_batches
    length = config.data.seq_len
    batch = steps.abstract_batch(rows, length, mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    knobs = {"alpha": scalar, "temperature": scalar}

    def arguments(arch, dtype, compute_dtype):
        params = abstract_params(arch, dtype, mesh)
        place = batch_sharding(mesh)
        hidden = jax.ShapeDtypeStruct((rows, length, arch.embed), compute_dtype, sharding=place)
        return hidden, params["embedding" if arch.tied_head else "head"]

    student = arguments(
        models.student.config, config.student.param_dtype, config.student.compute_dtype
    )
    dtype = jnp.dtype(config.teacher.dtype)
    teacher = arguments(models.teacher.config, dtype, dtype)

    def step(student, teacher, batch, knobs):
        def loss(student):
            signal = TeacherSignal(Outputs(*teacher))
            return method.objective.apply({}, Outputs(*student), signal, batch, knobs)["loss"].total

        return jax.value_and_grad(loss)(student)

    def compile():
        places = jax.tree.map(lambda leaf: leaf.sharding, student)
        with jax.set_mesh(mesh):
            jitted = jax.jit(step, out_shardings=(None, places))
            return jitted.lower(student, teacher, batch, knobs).compile()

    found = worker.compiled(compile, pathlib.Path(dump))
    sizes = re.findall(
        r"allocation \d+: size (\d+),(?! color)[^\n]*preallocated-temp", found.assignment
    )
    return sum(map(int, sizes))


if __name__ == "__main__":
    main()
