"""Compiler options of a step: which programs get them, and whether compilers know them."""

import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxdistill import xla_options
from jaxdistill.plan import targets
from jaxdistill.sharding import replicated
from jaxdistill.train import step as steps
from jaxdistill.xla_options import Option

ROOT = pathlib.Path(__file__).parents[2]
GPU = "xla_gpu_enable_latency_hiding_scheduler"


def test_programs_get_the_options_of_their_platform_and_number_of_devices():
    assert xla_options.options("gpu", 8, {})[GPU] is True
    assert xla_options.options("gpu", 1, {}) == xla_options.options("other", 8, {}) == {}
    assert xla_options.options("cpu", 1, {}) == {
        "xla_cpu_prefer_vector_width": 512,
        "xla_cpu_copy_insertion_use_region_analysis": True,
    }
    for one in itertools.chain(*xla_options.OPTIONS.values()):
        assert one.source.startswith("https://") or (ROOT / one.source).is_file()


@pytest.mark.parametrize("name", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_what_the_user_has_set_stays(name):
    given = {name: f"--xla_dump_to=here --{GPU}=false"}
    assert GPU not in xla_options.options("gpu", 8, given)


def test_the_step_is_compiled_with_them(mesh8, monkeypatch, caplog):
    """An option that this XLA does not know is told, and left out; a wrong value is an error."""
    state = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=replicated(mesh8))}
    step = lambda state, teacher, batch: (state, {})
    monkeypatch.setitem(xla_options.OPTIONS, "cpu", (Option("xla_no_such_option", True, ""),))
    assert steps.compiled(step, state, None, None, mesh8)(
        {"w": jax.device_put(jnp.ones(8), replicated(mesh8))}, None, None
    )
    assert "this XLA has no option xla_no_such_option" in caplog.text
    monkeypatch.setitem(xla_options.OPTIONS, "cpu", (Option("xla_cpu_use_xnnpack", "perhaps", ""),))
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid bool"):
        steps.compiled(step, state, None, None, mesh8)


PROGRAM = """
import sys, jax, jax.numpy as jnp
from jaxdistill import xla_options
from jaxdistill.plan import targets
target = targets.parse(sys.argv[1])
mesh = jax.sharding.Mesh(targets.devices(target), ("all",))
place = jax.NamedSharding(mesh, jax.P("all"))
x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place)
options = xla_options.options(target.platform, mesh.size)
assert options
print(jax.jit(lambda x: x @ x).lower(x).compile(compiler_options=options).as_text()[:10])
"""


@pytest.mark.parametrize("name", ["gpu:h100:2", "tpu:v5e:2x2", "tpu:v7x:2x2x1"])
def test_compilers_know_them(name):
    target = targets.parse(name)
    if lacking := targets.missing(target):
        pytest.skip(f"compiling for {name} needs {lacking}")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "LIBTPU"))}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        env=clean | targets.environment(target),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
