"""A model that is asked to be sharded is never whole on one host, not even while it is read."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.cli import launch
from jaxdistill.compress import quantize
from jaxdistill.formats import assemble
from jaxdistill.formats.config_json import read_config
from jaxdistill.models import count_parameters, decoder
from tests.also import also
from tests.models import oracle

RAW = oracle.CASES["llama2"] | {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 24,
    "vocab_size": 4096,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model in float32, and in int4."""
    folder = tmp_path_factory.mktemp("birth")
    model = models.random(read_config(RAW), seed=1)
    models.save(model, folder / "float32")
    models.save(quantize.quantized(model, "int4"), folder / "int4")
    for kind in ("float32", "int4"):
        shutil.copytree(folder / kind, folder / f"{kind} of another host")
    return folder


@pytest.fixture(scope="module")
def seen(folders):
    """kind -> what the processes saw; a pair is started once for each."""
    return functools.cache(lambda kind: born([folders / kind, folders / f"{kind} of another host"]))


def born(folders: list[pathlib.Path]) -> list[dict]:
    """What each of two processes with four devices saw while it loaded the model of its folder."""
    port = launch._free_port()
    started = []
    # What is freed goes back to the system at once, and counts as free.
    returned = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    for rank, folder in enumerate(folders):
        variables = os.environ | launch._environment(rank, 2, 4, port) | returned
        command = [sys.executable, "-m", "tests.models.birth", str(folder), str(folders[0])]
        started.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["float32", *also("int4")])
def test_each_process_reads_and_holds_its_part_alone(kind, folders, seen):
    file = sum(path.stat().st_size for path in (folders / kind).glob("*.safetensors"))
    for one in seen(kind):
        # An int4 model's scales are everywhere; all else is in eight parts, four of them here.
        most = 0.5 if kind == "float32" else 0.6
        assert 0.5 <= one["local"] / one["whole"] <= most
        assert 0.49 < one["read"] / file <= most
        assert one["together"] == one["read"]  # whole rows: no page of theirs is the other's
        assert one["same"]
        if kind == "float32":  # beside an int4 model this small, JAX's own memory is large
            # What lies here in the end, and the slices of one weight on their way.
            assert 0.5 < one["grown"] / one["whole"] < 0.75


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_one_process_cannot_read_all_processes_say(seen):
    said = [one["told"] for one in seen("float32")]
    assert said == [["ModelError", "process 1: no such block"], ["ModelError", "no such block"]]


@pytest.mark.parametrize("kind", ["float32", *also("int4")])
def test_processes_that_share_a_file_exchange_nothing_and_read_the_same_weights(kind, seen):
    for one in seen(kind):
        assert one["exchanged"] > 0 and one["exchanged_of_one_file"] == 0
        assert one["same_of_one_file"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_are_shared_without_overlap_and_the_slow_network_lies_under_data(seen):
    first, second = seen("float32")
    halves = {"owners": [0] * 4 + [1] * 4, "total": 496}
    lower, upper, every = [*range(8)], [*range(8, 16)], [*range(16)]
    # (data 2, fsdp 4) and (fsdp 2, tensor 4) give each process half of the batch; where tensor
    # alone spans the processes, both need all of it.
    expected = [(lower, upper), (lower, upper), (every, every)]
    for number, (here, there) in enumerate(expected):
        assert first["layouts"][number] == halves | {"rows": here}
        assert second["layouts"][number] == halves | {"rows": there}


def test_random_parameters_are_made_in_parts(mesh8):
    """A device has a quarter of each, and while they are made less than the whole of all."""
    config = read_config(RAW)
    places = assemble.nest(assemble.placement(config, mesh8, assemble.sharding.RULES))
    make = jax.jit(decoder.init, static_argnums=(0, 2), out_shardings=places)
    used = make.lower(config, jax.random.key(0), np.dtype("float32")).compile().memory_analysis()
    whole = 4 * count_parameters(config)
    assert used.output_size_in_bytes == pytest.approx(whole / 4, rel=0.01)
    assert used.output_size_in_bytes + used.temp_size_in_bytes < 0.75 * whole
