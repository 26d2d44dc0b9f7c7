"""The door for other people's JAX: losses, kernels and optim with jax, numpy and optax alone."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

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
