"""What makers publish of accelerators: peak FLOP/s, memory, bandwidths; the sources of each row."""

from collections.abc import Mapping
from typing import NamedTuple

_GOOGLE = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_DGX = "https://docs.nvidia.com/dgx/"
_AMD = "https://www.amd.com/en/products/accelerators/instinct/"


class Chip(NamedTuple):
    """One device, as JAX counts them: of a TPU7x chip, which shows two, a half.

    Attributes:
      kinds: how JAX's `device_kind` begins.
      flops: dense bfloat16 FLOP/s.
      memory: bytes.
      bandwidth: of the memory, bytes per second.
      links: bytes per second that it sends to its neighbours, all links together, in one
        direction: half of what is published for both. None where nothing is published.
      host: bytes per second from its host's memory, in one direction: half of what is published
        of PCI Express for both. None where nothing is published.
      network: bytes per second that it sends beyond its host (GPUs: one port of the maker's own
        machine for each) or slice (TPUs). None where nothing is published.
      source: where the numbers stand.
      network_source: where the network's stand.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    links: float | None
    host: float | None
    network: float | None
    source: str
    network_source: str | None


_V5E, _V5P, _V7X = _GOOGLE + "v5e", _GOOGLE + "v5p", _GOOGLE + "tpu7x"
_HOPPER_DGX = _DGX + "dgxh100-user-guide/introduction-to-dgxh100.html"

TPUS: Mapping[str, Chip] = {
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1200e9, None, None, None, _GOOGLE + "v4", None),
    "v5e": Chip(
        ("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 200e9, None,
        6.4e12 / 8 / 256,  # published for a pod of 256
        _V5E, _V5E,
    ),
    "v5p": Chip(("TPU v5",), 459e12, 95 * 2**30, 2765e9, 600e9, None, 50e9 / 8, _V5P, _V5P),
    "v6e": Chip(
        ("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1638e9, 400e9, None, 100e9 / 8,
        _GOOGLE + "v6e", _V7X,
    ),
    "v7x": Chip(
        ("TPU7x", "TPU v7x"), 2307e12 / 2, 192 * 2**30 / 2, 7380e9 / 2, 600e9 / 2,
        None, 100e9 / 8 / 2, _V7X, _V7X,
    ),
}  # fmt: skip
GPUS: Mapping[str, Chip] = {
    "a100": Chip(
        ("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, 32e9, 200e9 / 8,
        _NVIDIA + "a100/", _DGX + "dgxa100-user-guide/introduction-to-dgxa100.html",
    ),
    "h100": Chip(
        ("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 64e9, 400e9 / 8,
        _NVIDIA + "h100/", _HOPPER_DGX,
    ),
    "h200": Chip(
        ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 64e9, 400e9 / 8,
        _NVIDIA + "h200/", _HOPPER_DGX,
    ),
    "b200": Chip(
        ("NVIDIA B200",), 2250e12, 180e9, 8000e9, 900e9, None, 400e9 / 8,
        _NVIDIA + "dgx-b200/", _NVIDIA + "dgx-b200/",
    ),
    "gb200": Chip(
        ("NVIDIA GB200",), 2500e12, 186e9, 8000e9, 900e9, None, 400e9 / 8,
        _NVIDIA + "gb200-nvl72/", _NVIDIA + "dgx-gb200/",
    ),
    "mi300x": Chip(
        ("AMD Instinct MI300X", "AMD_Instinct_MI300X"), 1307.4e12, 192e9, 5300e9, 448e9, 64e9, None,
        _AMD + "mi300/mi300x.html", None,
    ),
}  # fmt: skip


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a device as JAX names it, None for one that is not in the tables."""
    matches = [
        (len(kind), chip)
        for chip in (*TPUS.values(), *GPUS.values())
        for kind in chip.kinds
        if device_kind.startswith(kind)
    ]
    return max(matches, key=lambda match: match[0])[1] if matches else None
