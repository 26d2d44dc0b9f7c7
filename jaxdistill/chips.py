"""What makers publish of accelerators: peak FLOP/s, memory, bandwidth, links; a source per row."""

from collections.abc import Mapping
from typing import NamedTuple

_GOOGLE = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


class Chip(NamedTuple):
    """One device.

    Attributes:
      kinds: how JAX's `device_kind` begins.
      flops: dense bfloat16 FLOP/s.
      memory: bytes.
      bandwidth: of the memory, bytes per second.
      links: bytes per second that it sends to its neighbours, all links together, in one
        direction: half of what is published for both. None where nothing is published.
      host: bytes per second from its host's memory, in one direction: half of what is published
        of PCI Express for both. None where nothing is published.
      source: where the numbers stand.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    links: float | None
    host: float | None
    source: str


TPUS: Mapping[str, Chip] = {
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1200e9, None, None, _GOOGLE + "v4"),
    "v5e": Chip(
        ("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 200e9, None, _GOOGLE + "v5e"
    ),
    "v5p": Chip(("TPU v5",), 459e12, 95 * 2**30, 2765e9, 600e9, None, _GOOGLE + "v5p"),
    "v6e": Chip(
        ("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1638e9, 400e9, None, _GOOGLE + "v6e"
    ),
}
GPUS: Mapping[str, Chip] = {
    "a100": Chip(("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, 32e9, _NVIDIA + "a100/"),
    "h100": Chip(("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 64e9, _NVIDIA + "h100/"),
    "h200": Chip(("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 64e9, _NVIDIA + "h200/"),
    "b200": Chip(("NVIDIA B200",), 2250e12, 180e9, 8000e9, 900e9, None, _NVIDIA + "dgx-b200/"),
}


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a device as JAX names it, None for one that is not in the tables."""
    matches = [
        (len(kind), chip)
        for chip in (*TPUS.values(), *GPUS.values())
        for kind in chip.kinds
        if device_kind.startswith(kind)
    ]
    return max(matches, key=lambda match: match[0])[1] if matches else None
