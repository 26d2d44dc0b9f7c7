"""What a training step asks of devices that are described: ours, and the same step in other forms.

    python -m benchmarks.plan                                  # all of it, two hours on two cores
    python -m benchmarks.plan --only llama3_8b_to_1b_8k tpu:v5e:4x4 --form ours --form xla

Forms of a step: `ours` as it is configured; `once`, its weights crossing the mesh once a step;
`xla`, attention in XLA's blocks, as where no kernel serves; `materialised`, its loss made from
logits of all tokens, by autodiff. Per device: memory, work, collectives and the floor on the step's
time; of the loss, what it makes in the step at its fullest moment, and of the last form the
temporaries of a program that is the loss alone. Nothing runs: no number here is a measured time.
What is found is added to results/plan.json after each program, with its date, beside what stands
there: `before` is of older code, whose commit is told.
"""

import argparse
import datetime
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from benchmarks import compress, duel

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAIRS = {"llama3_8b_to_1b": "plan_llama3_8b_to_1b", "qwen3_32b_to_4b": "plan_qwen3_32b_to_4b"}
TARGETS = ("tpu:v5e:4x4", "tpu:v5p:2x2x4", "gpu:h100:8", "tpu:v5e:16x16")
# A row for each of 256 chips; weights cross the mesh once with one micro-batch.
POD = ("train.batch_size=256", "train.micro_batches=1", "eval.batch_size=256")
LONG = ("data.seq_len=8192",)
FORMS = {
    "ours": (),
    "once": ("train.gather_once=both",),
    "xla": ("teacher.attention=xla", "student.attention=xla"),
    "materialised": (),
}


def _minitron(name: str) -> tuple[str, ...]:
    """A student of Llama-3.1-8B as Minitron made it, in place of the configuration's."""
    shape = {"like": "teacher", "head_dim": compress.LLAMA["head_dim"], **compress.STUDENTS[name]}
    shown = ", ".join(f"{key}: {value}" for key, value in shape.items())
    return (f"student.random={{{shown}}}",)


# name -> configuration, overrides, targets, forms
CASES = {
    **{name: (file, (), TARGETS, tuple(FORMS)) for name, file in PAIRS.items()},
    **{
        f"{name}_8k": (file, LONG, TARGETS, ("ours", "once", "xla")) for name, file in PAIRS.items()
    },
    **{
        f"minitron_{kind}_4b": (
            PAIRS["llama3_8b_to_1b"],
            _minitron(f"{kind} 4B"),
            ("tpu:v5p:2x2x4",),
            ("ours", "materialised"),
        )
        for kind in ("width", "depth")
    },
}
KEPT = (
    "mesh", "devices", "tokens_per_step", "parameters", "attention", "memory", "fits", "flops",
    "model_flops", "bytes", "sent_bytes", "network_bytes", "collectives", "largest_collectives",
    "seconds", "floor_seconds", "tokens_per_second", "mfu", "source", "unknown_loops", "jax",
)  # fmt: skip


def main() -> None:
    """Compiles the cases and saves them; --child is one compilation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs=2, metavar=("CASE", "TARGET"))
    parser.add_argument("--form", action="append", choices=FORMS, help="all that a case has")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child()
    for form, name, target, file, overrides in _rows():
        if form in (options.form or FORMS) and options.only in (None, [name, target]):
            _add(name, target, form, _compiled(file, overrides, target, form))


def _rows():
    """(form, case, target, configuration, overrides) of all programs, form after form."""
    for form in FORMS:
        for name, (file, overrides, found, forms) in CASES.items():
            for target in found if form in forms else ():
                pod = POD if target == "tpu:v5e:16x16" else ()
                if not (pod and form == "once"):  # with one micro-batch as it is
                    yield form, name, target, file, (*overrides, *pod)


def _add(name: str, target: str, form: str, step: dict) -> None:
    """One more form of an entry of the saved file, and what it has of the first."""
    path = duel.RESULTS / "plan.json"
    plans = json.loads(path.read_text())["plans"] if path.exists() else {}
    forms = plans.setdefault(name, {}).setdefault(target, {})
    forms[form] = step
    ours = forms.get("ours", step)
    ratios = {
        "sent": ours["sent_bytes"] / step["sent_bytes"],
        "memory": ours["memory"]["total"] / step["memory"]["total"],
        "floor": ours["floor_seconds"] / step["floor_seconds"],
    }
    print(name, target, form, json.dumps(step["summary"]), flush=True)
    print(f"  ours / {form}:", json.dumps(ratios), duel.save("plan", {"plans": plans}), flush=True)


def _compiled(file: str, overrides: tuple[str, ...], target: str, form: str) -> dict:
    from jaxdistill import config

    loaded = config.load(ROOT / "configs" / f"{file}.yaml", (*overrides, *FORMS[form]))
    ask = lambda what, head: _asked(config.dump(loaded), target, what, head)
    head, began = "materialised" if form == "materialised" else "fused", time.perf_counter()
    step = ask("step", head)
    largest = step["largest_collectives"][0]
    summary = {
        "sent_gb": step["sent_bytes"] / 1e9,
        "memory_gib": step["memory"]["total"] / 2**30,
        "fits": step["fits"],
        "floor_ms": 1e3 * step["floor_seconds"],
        "largest_collective_mib": largest["bytes"] / 2**20,
        "largest_collective": f"{largest['kind']} {largest['shape']}",
        "loss_in_the_step_mib": step["memory"]["most"]["loss"] / 2**20,
        "compile_seconds": time.perf_counter() - began,
    }
    if form == "materialised":
        alone = {head: ask("loss", head)["temporaries"] for head in ("fused", "materialised")}
        summary["loss_alone_mib"] = {head: size / 2**20 for head, size in alone.items()}
    today = datetime.date.today().isoformat()
    overrides = (*overrides, *FORMS[form])
    kept = {key: step[key] for key in KEPT} | {
        "largest_collectives": step["largest_collectives"][:4]
    }
    return {"date": today, "overrides": overrides, "summary": summary, **kept}


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
        attention=config.student.attention,
    )
    return dataclasses.replace(method, objective=objective, loss=loss)


def _loss_alone(config, mesh, models, method, dump: str) -> int:
    """Bytes of the loss's temporaries where value and gradients are all that is computed."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.plan import worker
    from jaxdistill.run import setup
    from jaxdistill.sharding import batch_sharding, replicated
    from jaxdistill.train import step as steps
    from jaxdistill.train.state import abstract_params
    from jaxdistill.types import Outputs, TeacherSignal

    rows = config.train.batch_size // config.train.micro_batches
    length = config.data.seq_len
    batch = steps.abstract_batch(setup.abstract_batch_of(config, mesh, method.asked), rows, mesh)
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
