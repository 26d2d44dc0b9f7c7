"""Devices that are only described: GPUs and TPU slices to compile for without owning one.

XLA and Mosaic compile end to end for a described GPU with the packages jax-cuda13-plugin,
jax-cuda13-pjrt, nvidia-cuda-nvcc and nvidia-nvvm, and for a TPU slice with libtpu; no driver and no
device is needed, and nothing runs. What they read from the environment must be set before JAX is
imported: start such a process with `environment`.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxdistill import chips
from jaxdistill.errors import ConfigError


class Gpu(NamedTuple):
    """A GPU as XLA's cost model sees it; NVIDIA's data sheets, as openxla/xla describes them.

    Attributes:
      name: of the device.
      capability: compute capability.
      cores: multiprocessors.
      fpus: float32 lanes of each.
      bandwidth: of memory, bytes per second.
      memory: bytes.
      l2: bytes.
      clock: GHz.
      shared: shared memory of a multiprocessor, bytes.
      shared_optin: the most a block can have, bytes.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    bandwidth: int
    memory: int
    l2: int
    clock: float
    shared: int
    shared_optin: int


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64,
        2_039_040_000_000, 85_100_068_864, 41_943_040, 1.41, 167_936, 166_912,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128,
        3_352_320_000_000, 84_942_979_072, 52_428_800, 1.98, 233_472, 232_448,
    ),
    "h200": Gpu(
        "NVIDIA H200", (9, 0), 132, 128,
        4_800_000_000_000, 150_000_000_000, 52_428_800, 1.98, 233_472, 232_448,
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 148, 128,
        7_672_320_000_000, 191_514_411_008, 132_644_864, 1.965, 233_472, 232_448,
    ),
    "gb200": Gpu(
        "NVIDIA GB200", (10, 0), 152, 128,
        7_928_064_000_000, 197_897_748_480, 135_528_448, 2.062, 233_472, 232_448,
    ),
}  # fmt: skip
_SIDES = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2, "v7x": 3}  # of a slice's torus
_LIBTPU_NAMES = {"v7x": "tpu7x"}  # where they are not ours
_DEVICES_OF_A_CHIP = {"v7x": 2}
_TARGET = re.compile(r"(gpu):(\w+)(?::(\d+(?:x\d+)?))?|(tpu):(\w+):(\d+(?:x\d+)*)|(cpu):(\d+)")
# The module to look for, and what to install, `{jax}` being JAX's own version.
_PACKAGES = {
    "gpu": ("jax_plugins.xla_cuda13", "pip install --no-deps jax-cuda13-plugin=={jax} "
            "jax-cuda13-pjrt=={jax} nvidia-cuda-nvcc nvidia-nvvm"),
    "tpu": ("libtpu", "pip install libtpu"),
}  # fmt: skip


class Target(NamedTuple):
    """What to compile for: "gpu:h100:8", "gpu:h100:2x8" (hosts x GPUs), "tpu:v5e:4x4" or "cpu:8".

    A TPU may have one number more than its kind has sides: how many slices there are. Of GPUs a
    host is what NVLink spans: of GB200 NVL72 all 72.
    """

    platform: str
    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"cpu:{sizes}" if self.platform == "cpu" else f"{self.platform}:{self.kind}:{sizes}"

    @property
    def size(self) -> int:
        """Devices."""
        return math.prod(self.shape) * _DEVICES_OF_A_CHIP.get(self.kind, 1)

    @property
    def chip(self) -> chips.Chip | None:
        """What is published of a device; None for a CPU."""
        return {"gpu": chips.GPUS, "tpu": chips.TPUS}.get(self.platform, {}).get(self.kind)


def parse(text: str) -> Target:
    """A target from its name.

    Raises:
      ConfigError: for a name that is none; the message shows some that are.
    """
    match = _TARGET.fullmatch(text)
    if not match:
        raise ConfigError(
            f"target = {text!r}: must look like gpu:h100:8, tpu:v5e:4x4 (chips) or cpu:8; GPUs are "
            f"{', '.join(GPUS)}; TPUs are {', '.join(chips.TPUS)}"
        )
    if match[1]:
        if match[2] not in GPUS:
            raise ConfigError(f"target = {text!r}: GPUs are {', '.join(GPUS)}")
        return Target("gpu", match[2], tuple(map(int, (match[3] or "1").split("x"))))
    if match[4]:
        if match[5] not in chips.TPUS:
            raise ConfigError(f"target = {text!r}: TPUs are {', '.join(chips.TPUS)}")
        return Target("tpu", match[5], tuple(map(int, match[6].split("x"))))
    return Target("cpu", "cpu", (int(match[8]),))


def environment(target: Target) -> dict[str, str]:
    """What a process that compiles for the target must find in its environment at its start."""
    own = {"JAX_PLATFORMS": "cpu"}
    if target.platform == "gpu":
        return own | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    if target.platform == "tpu":
        # No question to a cloud's metadata server which TPU this is, and no log of its absence.
        quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
        # No device is taken, so that several such processes may run, beside one that has it.
        several = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        return own | several | quiet
    flags = os.environ.get("XLA_FLAGS", "")
    count = f"--xla_force_host_platform_device_count={target.size}"
    return own | {"XLA_FLAGS": f"{flags} {count}".strip()}


def missing(target: Target) -> str | None:
    """The command that installs what compiling for the target lacks, None if it lacks nothing."""
    if target.platform not in _PACKAGES:
        return None
    module, command = _PACKAGES[target.platform]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    return None if spec else command.format(jax=importlib.metadata.version("jax"))


def check(target: Target) -> None:
    """Raises where the target cannot be compiled for here.

    Raises:
      ConfigError: with the command that installs what is missing.
    """
    lacking = missing(target)
    if lacking:
        raise ConfigError(
            f"target = {target.platform}:{target.kind}: its compiler is not installed: {lacking}"
        )


def devices(target: Target) -> list[Any]:
    """The described devices, or the CPU's own.

    Raises:
      ConfigError: if a package is missing, or the slice is none that exists.
    """
    import jax
    from jax.experimental import topologies

    check(target)
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.size]
    if target.platform == "gpu":
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=_gpu_config(GPUS[target.kind]),
            # slices x hosts x GPUs of a host
            topology=f"1x{math.prod(target.shape[:-1])}x{target.shape[-1]}",
        )
        return list(topology.devices)
    sides = _SIDES[target.kind]
    name = _LIBTPU_NAMES.get(target.kind, target.kind)
    name += f":{'x'.join(map(str, target.shape[:sides]))}"
    slices = math.prod(target.shape[sides:])
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except Exception as error:  # libtpu's errors have no class of their own
        raise ConfigError(f"target = {target}: no TPU slice that libtpu knows ({error})") from None


def assume_capability(target: Target) -> None:
    """Tells Mosaic GPU which GPU it compiles for: with no device to ask it takes any for an H100.

    It replaces a private function of JAX; only processes that merely compile may do so.
    """
    import jax.experimental.mosaic.gpu.core as core
    import jax.experimental.mosaic.gpu.utils as utils

    capability = GPUS[target.kind].capability
    for module in (core, utils):
        setattr(module, "_infer_arch", lambda: capability)  # noqa: B010


def assume_cudnn(target: Target) -> None:
    """Lets JAX write calls of cuDNN's attention for a GPU that is only described.

    JAX asks the cuDNN at hand for its version, and a device for its capability: none is at hand. It
    replaces private functions of JAX; only processes that merely compile may do so.
    """
    import jax._src.cudnn.fused_attention_stablehlo as attention

    own = GPUS[target.kind].capability
    least = lambda text: own >= tuple(int(x) for x in text.split("."))
    equal = lambda text: own == tuple(int(x) for x in text.split("."))
    replaced = {
        "check_cudnn_version": lambda: 91200,  # as `_gpu_config` describes it
        "check_compute_capability": least,
        "is_cuda_compute_capability_equal": equal,
    }
    for name, function in replaced.items():
        setattr(attention, name, function)


def _gpu_config(gpu: Gpu) -> str:
    """The text of XLA's GpuTargetConfigProto."""
    major, minor = gpu.capability
    # The accelerated feature set holds TMA, wgmma and tcgen05.
    feature = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared}
      shared_memory_per_block_optin: {gpu.shared_optin}
      core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.clock}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} device_memory_size: {gpu.memory}
      cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
      name: "{gpu.name}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
      driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
      dnn_version: "9.12.0"
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }}
    device_description_str: "{gpu.name}"
    """
