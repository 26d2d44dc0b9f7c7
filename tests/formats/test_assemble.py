"""Parameter trees put together slice by slice, and random ones that no mesh changes."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.formats import assemble, slices
from jaxdistill.formats.config_json import read_config
from jaxdistill.models import decoder
from tests.models import oracle

RAW = oracle.CASES["qwen3_biases"]


class _Memory:
    """Tensors from a dict, counting what is read."""

    def __init__(self):
        self.named, self.reads = oracle.tensors(RAW), []

    def read(self, name, index, memory=None):
        self.reads.append(name)
        return self.named[name][index]

    def dtype(self, name):
        return self.named[name].dtype


def test_layers_are_stacked_and_kernels_turned():
    source = _Memory()
    params = assemble.assemble(read_config(RAW), source)
    for layer in range(3):
        theirs = source.named[f"model.layers.{layer}.self_attn.k_proj.weight"]
        np.testing.assert_array_equal(
            params["layers"]["attention"]["key"]["kernel"][layer], theirs.T
        )
    assert sorted(source.reads) == sorted(source.named)


def test_replicas_are_read_once(mesh8):
    source = _Memory()
    assemble.assemble(read_config(RAW), source, mesh=mesh8)
    assert source.reads.count("model.layers.0.self_attn.q_norm.weight") == 1
    assert source.reads.count("model.layers.0.mlp.up_proj.weight") == 2  # tensor 2; fsdp 2 shares


def test_a_large_tensor_is_read_a_few_rows_at_a_time(monkeypatch):
    source = _Memory()
    whole = assemble.assemble(read_config(RAW), source)
    rows, width = source.named["model.layers.0.mlp.up_proj.weight"].shape
    monkeypatch.setattr(slices, "_PIECE", 5 * width * 4)
    source.reads.clear()
    jax.tree.map(np.testing.assert_array_equal, assemble.assemble(read_config(RAW), source), whole)
    assert source.reads.count("model.layers.0.mlp.up_proj.weight") == -(-rows // 5) > 1


def test_random_parameters_do_not_depend_on_the_mesh(mesh8):
    config = read_config(RAW)
    one, spread = models.random(config, seed=5), models.random(config, seed=5, mesh=mesh8)
    jax.tree.map(np.testing.assert_array_equal, one.params, spread.params)
    assert not spread.params["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
    other = models.random(config, seed=6).params
    assert not np.array_equal(one.params["embedding"], other["embedding"])


def test_random_takes_a_dtype():
    params = models.random(read_config(RAW), dtype="bfloat16").params
    shapes = decoder.shapes(read_config(RAW), "bfloat16")
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, shapes)


def test_layers_of_two_dtypes_and_float64_meet_in_float32():
    source = _Memory()
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        dtype = np.float64 if name == "model.norm.weight" else np.float16
        source.named[name] = source.named[name].astype(dtype)
    params = assemble.assemble(read_config(RAW), source)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_a_kernel_of_several_tiles_is_turned_whole(dtype):
    """Sizes that no tile divides, as they are and widened."""
    values = np.arange(200 * 431, dtype=np.uint16).reshape(200, 431).view(ml_dtypes.bfloat16)
    place = np.zeros((431, 200), dtype)
    slices.fill(place, values.T)
    expected = values.astype(dtype).T
    np.testing.assert_array_equal(
        place.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8)
    )


def test_a_cpus_devices_take_what_was_read_without_a_copy(mesh8, monkeypatch):
    made, empty = [], slices._empty
    monkeypatch.setattr(slices, "_empty", lambda *of: made.append(empty(*of)) or made[-1])
    params = assemble.assemble(read_config(RAW), _Memory(), mesh=mesh8)
    held = {
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
    }
    assert held <= {block.ctypes.data for block in made}
