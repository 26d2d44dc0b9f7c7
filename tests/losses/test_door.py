"""The door for other people's JAX: losses, kernels and optim with jax, numpy and optax alone."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest

from jaxdistill import losses

PYPROJECT = pathlib.Path(__file__).resolve().parents[2] / "pyproject.toml"
_PROGRAM = """
import importlib, sys
import jax, numpy, optax

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
before = {name.partition(".")[0] for name in sys.modules}
module = importlib.import_module("jaxdistill.NAME")
for name in module.__all__:
    getattr(module, name)
CALL
after = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
assert after <= {"jaxdistill"}, sorted(after)
"""

_CALLS = {
    "losses": "module.adaptive_kl(jax.numpy.ones((2, 5)), jax.numpy.ones((2, 5)))",
    "kernels": "module.linear_divergence(*[jax.numpy.ones((5, 4))] * 4)",
    "optim": "module.taid(10).init({})",
}


def _refused() -> set[str]:
    """What the package depends on but for jax, numpy and optax, by the name of its import."""
    lines = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in lines}
    imported = {"pyyaml": "yaml", "orbax-checkpoint": "orbax", "tensorboardx": "tensorboardX"}
    return {imported.get(name, name) for name in names - {"jax", "numpy", "optax", "ml_dtypes"}}


@pytest.mark.parametrize("name", _CALLS)
def test_it_works_where_only_jax_numpy_and_optax_are_installed(name):
    program = _PROGRAM.replace("NAME", name).replace("CALL", _CALLS[name])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", f"REFUSED = {sorted(_refused())!r}\n{program}"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_once_and_in_order():
    assert losses.__all__ == sorted(set(losses.__all__))
    for name in losses.__all__:
        assert getattr(losses, name).__doc__, name


@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl", "alphanet", "smoothed_forward_kl"])
def test_losses_run_inside_a_shard_map_of_ones_own(name):
    """Rows over devices; the gradient of each row is its own."""
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    student, teacher = (jax.random.normal(jax.random.key(i), (16, 11)) for i in range(2))
    loss = lambda s, t: getattr(losses, name)(s, t, temperature=2.0)
    both = lambda s, t: (loss(s, t), jax.grad(lambda s: loss(s, t).sum())(s))
    rows = jax.P("rows")
    spread = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows)))
    for ours, plain in zip(spread(student, teacher), jax.jit(both)(student, teacher), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
