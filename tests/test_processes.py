"""When a process looks for others, and what it says where there are none."""

import jax
import pytest

from jaxdistill import processes
from jaxdistill.errors import ConfigError, LostProcessError

STEP = {"SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # a batch script, before srun
        (STEP | {"SLURM_NTASKS": "8"}, True),
        (STEP | {"SLURM_NTASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_cluster_of_one_is_no_cluster(environment, expected):
    assert processes.several(environment) is expected


def test_alone_it_does_nothing_and_says_when_there_should_be_more(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    processes.start()
    processes.start(1)
    assert not jax.distributed.is_initialized()
    jax.devices()  # too late to join anybody
    with pytest.raises(ConfigError, match="mesh.processes.*jaxdistill launch -n N"):
        processes.start(2)
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID = 'one': must be a whole number"):
        processes.start()


def test_only_the_loss_of_a_process_is_told_as_such(monkeypatch):
    broken = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    with pytest.raises(jax.errors.JaxRuntimeError), processes.lost_ones_told():
        raise broken  # alone, nobody can be lost
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LostProcessError, match="process 0 has lost another.*resume"):
        with processes.lost_ones_told():
            raise broken
    with pytest.raises(jax.errors.JaxRuntimeError), processes.lost_ones_told():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
