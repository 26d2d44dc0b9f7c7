"""A stored teacher: captured once, learned from in the same step, with the same numbers."""

import pathlib

import jax
import numpy as np
import pytest

from jaxdistill import commands
from jaxdistill.data.feed import CorpusFeed
from jaxdistill.run import setup, states, teacher_cache
from jaxdistill.train.step import place

# A student of its own, so that a stored teacher needs no weights.
STUDENT = "student={random: {layers: 1, embed: 32, mlp: 48, heads: 4}, compute_dtype: float32}"
FIXED = "method={name: kd, alpha: 0.3, temperature: 2.0}"


def captured(load_config, folder: pathlib.Path, *overrides: str, **options) -> dict:
    config = load_config(folder, STUDENT, FIXED, *overrides)
    section = commands.TeacherCache(output=str(folder / "cache"), **options)
    return teacher_cache.capture(config, section)


def curve(config, steps: int) -> np.ndarray:
    """[steps, 2] of loss and gradient norm, of a configuration's own step and feed."""
    mesh = setup.mesh_of(config, jax.devices()[:1])  # captured on another one
    models = setup.shapes_of(config, mesh)
    data = setup.data_of(config, models.tokenizer)
    if models.stored is not None:
        data = models.stored.beside(data, models.tokenizer)
    models = setup.load_models(config, models, mesh)
    method = setup.method_of(config, models)
    state = states.create(config, models.student, method.objective, method.tx, mesh)
    params = setup.teacher_params_of(models, method, mesh)
    step = setup.compile_step(config, method, state, params, mesh, check_kernels=False)
    feed = CorpusFeed(
        data["train"], batch_size=config.train.batch_size, seed=config.seed, left_out=list
    )
    row, found = 0, []
    for _ in range(steps):
        span, batch = feed(row, None)
        row = span.end_row
        state, means = step(state, params, place(batch, mesh))
        found.append([float(means[n].value) for n in ("loss/total", "optim/grad_norm")])
    return np.asarray(found)


@pytest.fixture(scope="module")
def online(load_config, tmp_path_factory) -> np.ndarray:
    return curve(load_config(tmp_path_factory.mktemp("online"), STUDENT, FIXED), 20)


def test_stored_hidden_states_train_as_the_teacher_that_runs(online, load_config, tmp_path):
    found = captured(load_config, tmp_path, dtype="float32")
    assert found["whole"]
    config = load_config(tmp_path, STUDENT, FIXED, f"teacher={{cache: {tmp_path}/cache}}",
                         "tokenizer.from=teacher")  # fmt: skip
    np.testing.assert_allclose(curve(config, 20), online, rtol=1e-6)
