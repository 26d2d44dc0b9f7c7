"""Joins this process with the others of its run, before JAX looks for devices.

JAX itself finds the others under Slurm, Open MPI, Cloud TPU and GKE. Elsewhere, and under
`jaxdistill launch`, three variables say it:

    JAX_COORDINATOR_ADDRESS    where process 0 listens, host:port
    JAX_NUM_PROCESSES          how many there are
    JAX_PROCESS_ID             which of them this is, from 0
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

import jax

from jaxdistill.errors import ConfigError, LostProcessError

# A process that cannot be heard for so long is lost, and the others end with it.
HEARTBEAT_SECONDS = 15
_BROKEN = ("Gloo", "NCCL", "Connection reset", "Connection closed", "coordination service")
_REMEDY = (
    "start it with `jaxdistill launch -n N -- train ...`, srun or mpirun, or set "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
)


def start(processes: int | None = None) -> None:
    """Joins the processes of a run; alone, and when called again, it does nothing.

    Args:
      processes: how many there must be; None: as many as the environment says.

    Raises:
      ConfigError: if there are fewer or more, or the environment says something impossible.
    """
    if not jax.distributed.is_initialized():
        count, process = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
        told = "JAX_COORDINATOR_ADDRESS" in os.environ or several(os.environ)
        if told or (processes or 1) > 1:
            _join(count, process)
    if processes is not None and jax.process_count() != processes:
        raise ConfigError(
            f"mesh.processes = {processes}: there are {jax.process_count()}: {_REMEDY}"
        )


def _join(count: int | None, process: int | None) -> None:
    # What to do about SIGTERM is the run's to decide; JAX's notice would only swallow it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=process,
            # What the variables say is not for a cluster's guess to complete.
            cluster_detection_method=None if None in (count, process) else "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"mesh.processes: the other processes cannot be joined ({reason}): {_REMEDY}"
        ) from error


@contextlib.contextmanager
def lost_ones_told() -> Iterator[None]:
    """Tells in words that another process is gone, where collectives inside fail of it.

    Raises:
      LostProcessError: in place of JAX's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if jax.process_count() == 1 or not any(words in text for words in _BROKEN):
            raise
        raise LostProcessError(
            f"process {jax.process_index()} has lost another process of this run ({text[:200]}): "
            "`jaxdistill resume` goes on from the last checkpoint, `launch --restart` does so by "
            "itself"
        ) from error


def several(environment: Mapping[str, str]) -> bool:
    """Whether a cluster that JAX knows says that this process is one of several.

    A batch script's own shell, and tasks of one process, have others of these variables too.
    """
    hosts = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    return (
        ("SLURM_STEP_NODELIST" in environment and environment.get("SLURM_NTASKS", "1") != "1")
        or environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
        or any("," in environment.get(name, "") for name in hosts)
        or environment.get("MEGASCALE_NUM_SLICES", "1") != "1"
    )


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ConfigError(f"{name} = {text!r}: must be a whole number")
    return None if text is None else int(text)
