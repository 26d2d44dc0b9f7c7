"""A run on meshes with tensor and context axes: the same numbers; meshes that cannot work."""

import json
import pathlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxdistill import api
from jaxdistill.errors import ConfigError
from jaxdistill.run import participants, setup, states
from tests.also import also

WIDE = (
    "teacher.random={layers: 4, embed: 32, mlp: 48, heads: 4, kv_heads: 1}",
    "student={random: {like: teacher, layers: 2}, compute_dtype: float32}",
    "train.steps=3",
    "train.eval_every=3",
)


def losses(result):
    lines = (pathlib.Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss/total" in line]
    return [line["loss/total"] for line in steps] + [result.metrics["eval/kl_t1"]]


@pytest.fixture(scope="module")
def plain(load_config, tmp_path_factory):
    config = load_config(tmp_path_factory.mktemp("plain"), *WIDE, "mesh={data: 8, fsdp: 1}")
    return losses(api.train(config))


@pytest.mark.parametrize(
    "overrides",
    [
        ("mesh={fsdp: 2, tensor: 4}", "train.gather_once=both", "train.micro_batches=2"),
        *also(
            (("mesh={fsdp: 2, context: 4}", "teacher.sharding=whole"),),
            (("mesh={data: 2, fsdp: 1, tensor: 2, context: 2}", "teacher.sharding=all"),),
        ),
    ],
)
def test_a_run_is_the_same_on_any_mesh(overrides, plain, load_config, tmp_path):
    if jax.device_count() != 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    result = api.train(load_config(tmp_path, *WIDE, *overrides))
    assert losses(result) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("mesh={fsdp: 1, tensor: 8}",), "heads = 4.*: take one of 1, 2, 4"),
        (("mesh={fsdp: 2, context: 4}", "data.seq_len=28"), r"multiple of 2 \* mesh.context = 8"),
        (("mesh={fsdp: 2, tensor: 2}",), "does not divide the 8 devices"),
    ],
)
def test_a_mesh_that_cannot_work_is_told_with_its_numbers(overrides, words, load_config, tmp_path):
    if jax.device_count() != 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    with pytest.raises(ConfigError, match=words):
        api.train(load_config(tmp_path, *overrides))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def compiled_anew():
    """Programs out of JAX's cache are not compiled, and say nothing."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


MESHES = (
    "{data: 2, fsdp: 2, tensor: 2}",
    *also("{data: 2, fsdp: 4}", "{fsdp: 2, context: 4}"),
)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.usefixtures("compiled_anew")
def test_no_array_is_brought_whole_to_every_device(mesh, load_config, tmp_path, capfd):
    """The compiler says where it can lay an array out no other way; 257 rows are of tokens."""
    if jax.device_count() != 8:
        pytest.skip(f"needs 8 devices, XLA shows {jax.device_count()}")
    padded = ("teacher.random.vocab_size=512", "student={random: {like: teacher}}")
    config = load_config(tmp_path, *WIDE, *padded, f"mesh={mesh}")
    devices = setup.mesh_of(config)
    models = participants.shapes_of(config, devices)
    method = setup.method_of(config, models)
    state = states.abstract(config, models.student.config, method.objective, method.tx, devices)
    teacher = method.asked.abstract_params(devices)
    setup.compile_step(config, method, state, teacher, devices)
    assert "full rematerialization" not in capfd.readouterr().err
