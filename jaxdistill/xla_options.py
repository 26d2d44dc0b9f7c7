"""Compiler options of a step: one table, and where each is recommended or measured.

They belong to one program and not to the process: a version of XLA that does not know one says so,
where a flag of the environment that is unknown ends the process before Python can tell why.
"""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

log = logging.getLogger(__name__)

MEASURED = "benchmarks/results/train_step_xeon_cpu.json"
SOURCE = "https://openxla.org/xla/flags_guidance"
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class Option(NamedTuple):
    """One option.

    Attributes:
      name: as XLA knows it, without dashes.
      value: in place of XLA's default.
      source: who recommends it, or what measured it.
      devices: of a program, from which on it has the option; one alone sends nothing.
    """

    name: str
    value: bool | int | str
    source: str
    devices: int = 2


OPTIONS: Mapping[str, tuple[Option, ...]] = {
    # LLVM keeps to 256 bits where a processor has 512: what is elementwise in the losses is slower.
    # And XLA copies AdamW's moments before it updates them, unless it looks where each is read.
    "cpu": (
        Option("xla_cpu_prefer_vector_width", 512, MEASURED, 1),
        Option("xla_cpu_copy_insertion_use_region_analysis", True, MEASURED, 1),
    ),
    "gpu": (Option("xla_gpu_enable_latency_hiding_scheduler", True, SOURCE),),
    "tpu": (
        Option("xla_tpu_enable_async_all_to_all", "true", SOURCE),
    ),
}  # fmt: skip


def options(
    platform: str, devices: int, environment: Mapping[str, str] = os.environ
) -> dict[str, bool | int | str]:
    """Name -> value of what a program is compiled with; what the environment names stays as it is.

    Args:
      platform: of its devices: "cpu", "gpu", "tpu" or another, which has none.
      devices: how many.
      environment: with XLA_FLAGS and LIBTPU_INIT_ARGS.
    """
    words = " ".join(environment.get(name, "") for name in _VARIABLES).split()
    decided = {word.lstrip("-").partition("=")[0] for word in words}
    table = [one for one in OPTIONS.get(platform, ()) if devices >= one.devices]
    return {one.name: one.value for one in table if one.name not in decided}


def compiled(lowered: jax.stages.Lowered, platform: str, devices: int) -> Any:
    """The program with the options of its platform; without those that its XLA does not know.

    Args:
      lowered: the program before compiling.
      platform: of its devices.
      devices: how many.
    """
    taken = options(platform, devices)
    while True:
        try:
            return lowered.compile(compiler_options=taken or None)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or taken.pop(unknown[1], None) is None:
                raise
            log.warning("this XLA has no option %s: the step is compiled without", unknown[1])
