"""Compiles one case for a described device and prints what is known of it as JSON.

    python -m tests.kernels.aot.compile_case gpu:h100 statistics-kl

A failure below JAX ends the process, so every case has one of its own.
"""

import glob
import json
import os
import pathlib
import re
import sys
import tempfile
import warnings

from jaxdistill.plan import targets
from tests.kernels.aot import sass

N, V, DS, DT, K = 8192, 128_256, 2048, 4096, 8
CHUNK, WIDTH = 1024, 64  # tokens of a chunk of N; hidden states that make no product worth naming


def main() -> None:
    target, case = targets.parse(sys.argv[1]), sys.argv[2]
    dump = tempfile.mkdtemp(prefix="aot_")
    os.environ.update(targets.environment(target))
    if target.platform == "gpu":
        wanted = ("PTXAS", "SASS_CTRL", "RESOURCES")
        os.environ |= {f"MOSAIC_GPU_DUMP_{name}": "1" for name in wanted}
        os.environ["MOSAIC_GPU_DUMP_TO"] = dump
    import jax

    warnings.simplefilter("ignore")
    if target.platform == "gpu":
        targets.assume_capability(target)
    print(json.dumps({"jax": jax.__version__} | compile_case(target, case) | kernel_facts(dump)))


def compile_case(target: targets.Target, case: str) -> dict:
    import jax

    from jaxdistill.plan import hlo

    mesh, function, arguments = make(target, case)
    # The abstract mesh tells Pallas, and `kernels.support`, which device this is for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    large = hlo.collectives(text)
    return {
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "output_gib": memory.output_size_in_bytes / 2**30,
        "gigabytes": hlo.bytes_moved(text) / 1e9,
        "per_pair": hlo.bytes_moved(text) / (N * V),
        "collectives": {k.name: k.shape for k in large},
        "largest_mib": max(map(hlo.nbytes, re.findall(r"\w+\[[\d,]+\]", text))) / 2**20,
        "custom_calls": re.findall(r'custom_call_target="([^"]+)"', text),
        "flops": hlo.product_flops(text),
    }


def make(target: targets.Target, case: str):
    """(mesh, function, abstract arguments) of a case."""
    import jax
    import jax.numpy as jnp

    from jaxdistill import kernels, sharding
    from jaxdistill.kernels import choice, measure, statistics
    from jaxdistill.kernels.operands import Coefficients, VocabularyShard

    found = targets.devices(target)
    name, _, option = case.partition("-")
    if name == "ring":
        return ring(found, option)
    eight = option == "mesh"
    mesh = sharding.make_mesh(devices=found if eight else found[:1])
    array = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*axes))
    )
    logits = array((N, V), jnp.float32 if option == "float32" else jnp.bfloat16)
    scalar, per_token = array((), jnp.float32), array((N,), jnp.float32)
    kinds = {
        "jsd": ("generalized_jsd", (0.5,)),
        "ab": ("alpha_beta_divergence", (0.2, 0.7)),
        "taid": ("forward_kl", ()),
    }
    kind, parameters = kinds.get(option, ("forward_kl", ()))

    def dense(student, teacher, weights, temperature):
        taid_t = 0.4 if option == "taid" else None
        values = kernels.divergence(
            student, teacher, kind=kind, parameters=parameters, temperature=temperature,
            taid_t=taid_t, implementation="xla" if option == "xla" else None,
        )  # fmt: skip
        return jnp.sum(values * weights)

    def alone(logits, temperature):
        given, numbers = {"s": logits}, Coefficients(jnp.float32(0), temperature)
        names, shard = ("sum_s", "self_s", statistics.LEAD), VocabularyShard((), 0, V)
        chosen = choice.choose(None, V, logits.dtype)
        return measure.measure(
            names, given, {"s": statistics.clamp(logits)}, numbers, chosen, shard
        )

    if name == "alone":
        return mesh, alone, (logits, scalar)
    if name == "trains":
        return mesh, *one_chunk(option, array)
    if name == "value":
        return mesh, dense, (logits, logits, per_token, scalar)
    if name == "gradient":
        return mesh, jax.value_and_grad(dense), (logits, logits, per_token, scalar)
    batch, head = ("fsdp", None) if eight else (), ("tensor", "fsdp") if eight else ()
    hidden = lambda width: array((N, width), jnp.bfloat16, *batch)
    heads = lambda width: array((V, width), jnp.bfloat16, *head)
    labels = array((N,), jnp.int32, *batch[:1])
    if name != "linear":
        known = array((N, K), jnp.int32, *batch), array((N, K), jnp.float32, *batch)
        function, taught = given_in_part(name, mesh.abstract_mesh if eight else None)
        arguments = (hidden(DS), heads(DS), *(known if not taught else (hidden(DT), heads(DT))))
        return mesh, jax.value_and_grad(function, (0, 1)), arguments

    def linear(hs, ws, ht, wt, labels, temperature):
        return kernels.linear_divergence(
            hs, ws, ht, wt, labels=labels, alpha=0.5, temperature=temperature,
            mesh=mesh.abstract_mesh if eight else None,
        )  # fmt: skip

    arguments = (hidden(DS), heads(DS), hidden(DT), heads(DT), labels, scalar)
    return mesh, jax.value_and_grad(linear, (0, 1), has_aux=True), arguments


def ring(devices: list, attention: str):
    """(mesh, value and gradients of attention in a ring of all devices, abstract arguments)."""
    import jax
    import jax.numpy as jnp

    from jaxdistill import sharding
    from jaxdistill.models import DecoderConfig
    from jaxdistill.models.attention import causal

    mesh = sharding.make_mesh(fsdp=1, context=len(devices), devices=devices)
    rows = jax.NamedSharding(mesh, sharding.spec(("batch", "length"), mesh=mesh))
    array = lambda dtype, *more: jax.ShapeDtypeStruct((1, N, *more), dtype, sharding=rows)
    config = DecoderConfig("llama", 64, 32 * 128, 64, 1, 32, 8, 128)

    def total(query, key, value, segments):
        attend = causal(config, N, segments, attention, balanced=True)
        return jnp.sum(attend(None, 0, query, key, value)[1].astype(jnp.float32) ** 2)

    shaped = [array(jnp.bfloat16, heads, 128) for heads in (32, 8, 8)]
    return mesh, jax.value_and_grad(total, (0, 1, 2)), (*shaped, array(jnp.int32))


def one_chunk(option: str, array):
    """(value and gradient of a chunk as a step makes them, abstract arguments): few products.

    The metrics are made where a traced number asks for them, so there are two kernels.
    """
    import jax
    import jax.numpy as jnp

    from jaxdistill import kernels

    words = option.split("-")
    kinds = {"taid": "forward_kl", "jsd": "generalized_jsd", "symmetric": "symmetric_kl"}
    kind = next((kinds[word] for word in words if word in kinds), "forward_kl")
    given = {"taid_t": 0.4} if "taid" in words else {}

    def loss(hs, ws, ht, wt, labels, temperature, monitor):
        return kernels.linear_divergence(
            hs, ws, ht, wt, kind=kind, monitor=monitor,
            labels=None if "unlabelled" in words else labels,
            alpha=0.0 if "unlabelled" in words else 0.5,
            temperature=1.0 if {"one", "taid"} & set(words) else temperature, **given,
        )  # fmt: skip

    hidden, head = array((CHUNK, WIDTH), jnp.bfloat16), array((V, WIDTH), jnp.bfloat16)
    more = array((CHUNK,), jnp.int32), array((), jnp.float32), array((), jnp.bool_)
    function = jax.value_and_grad(loss, (0, 1), has_aux=True)
    return function, (hidden, head, hidden, head, *more)


def given_in_part(name: str, mesh):
    """(a loss of the head that says more than a divergence, whether it has a teacher's head)."""
    import jax.numpy as jnp
    import numpy as np

    from jaxdistill import kernels

    def logprobs(hidden, head, ids, weights):
        said = kernels.linear_logprobs(hidden, head, ids, temperature=1.5, mesh=mesh)
        return jnp.sum(weights * said.logprobs) + jnp.sum(said.entropy + said.argmax)

    def sets(hidden, head, ids, weights):
        said = kernels.linear_logprobs(hidden, head, sets=[[1, 2, 3], [7]], mesh=mesh)
        return jnp.sum(weights[:, :2] * said.log_masses)

    def sparse(hidden, head, ids, logprobs):
        return kernels.linear_divergence(
            hidden, head, teacher_ids=ids, teacher_logprobs=logprobs, mesh=mesh
        )[0]

    def columns(hidden, head, taught, teacher):
        shared = np.arange(0, V, 2)
        return kernels.linear_divergence(
            hidden, head, taught, teacher, student_columns=shared, teacher_columns=shared,
            other_columns="bucket", mesh=mesh,
        )[0]  # fmt: skip

    found = {"logprobs": logprobs, "sets": sets, "sparse": sparse, "columns": columns}
    return found[name], name == "columns"


def kernel_facts(dump: str) -> dict:
    """Registers, spills, shared memory and main loop of each Mosaic kernel."""
    found = []
    for path in sorted(glob.glob(f"{dump}/*.ptxas")):
        text, stem = pathlib.Path(path).read_text(), path.removesuffix(".ptxas")
        resources = "".join(pathlib.Path(p).read_text() for p in glob.glob(f"{stem}*resources*"))
        shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
        loop = sass.main_loop(pathlib.Path(f"{stem}.sass_ctrl").read_text())
        found.append(
            {
                "registers": int(re.search(r"Used (\d+) registers", text)[1]),
                "spills": sum(map(int, re.findall(r"(\d+) bytes spill", text))),
                "shared": int(shared[1]) if shared else None,
                "loop": sum(loop.values()),
                "bulk_copies": sum(n for op, n in loop.items() if op.startswith("UTMALDG")),
                "async_copies": sum(n for op, n in loop.items() if op.startswith("LDGSTS")),
                "exponentials": loop["MUFU.EX2"],
            }
        )
    return {"kernels": found}


if __name__ == "__main__":
    main()
