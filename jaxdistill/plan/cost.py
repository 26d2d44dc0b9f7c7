"""The work of a compiled step on one device, and the least time that the device can do it in."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdistill.chips import Chip
from jaxdistill.plan import hlo


class Cost(NamedTuple):
    """What one step costs a device.

    Attributes:
      flops: of matrix products, loops times their iterations.
      nbytes: read and written in the large memory.
      collectives: by kind and axes: how often, bytes of the results, bytes sent, and of these the
        bytes that leave the host or slice.
      largest: the largest collectives of all, each with where it comes from.
      unknown_loops: loops that count once because nothing tells their iterations.
      host_bytes: that come from the memory of the host, in one direction.
    """

    flops: float
    nbytes: float
    collectives: list[dict[str, Any]]
    largest: list[dict[str, Any]]
    unknown_loops: list[str]
    host_bytes: float = 0.0

    @property
    def link_bytes(self) -> float:
        """Bytes that the device sends."""
        return sum(entry["sent_bytes"] for entry in self.collectives)

    @property
    def network_bytes(self) -> float:
        """Of these the bytes that leave its host or slice."""
        return sum(entry["network_bytes"] for entry in self.collectives)

    def seconds(self, chip: Chip | None) -> dict[str, float]:
        """Least seconds of computing, of traffic of memory and host, and of sending; {} if unknown.

        Each alone at the published peak, with all links of the device busy at once, and its share
        of the network beyond its host or slice: no program with this work is faster than the
        longest of them.
        """
        if chip is None:
            return {}
        seconds = {"compute": self.flops / chip.flops, "memory": self.nbytes / chip.bandwidth}
        if chip.links is not None:
            seconds["links"] = (self.link_bytes - self.network_bytes) / chip.links
        if chip.network is not None and self.network_bytes:
            seconds["network"] = self.network_bytes / chip.network
        if self.host_bytes and chip.host is not None:
            seconds["host"] = self.host_bytes / chip.host
        return seconds


def cost(
    text: str,
    mesh: Mapping[str, int],
    networks: Sequence[int] | None = None,
    most: int = 8,
    filled: float = 1.0,
) -> Cost:
    """Counts the work in a program's text; a collective over one device is none.

    Args:
      text: of the compiled step.
      mesh: axis -> size.
      networks: of each place of the mesh the number of the fast network that it lies in
        (`sharding.networks`); None: all in one.
      most: how many of the largest collectives are told apart.
      filled: as `hlo.product_flops` takes it.
    """
    networks = [0] * math.prod(mesh.values()) if networks is None else networks
    sends = [one for one in hlo.collectives(text) if one.axes(mesh)]
    sums: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for one in sends:
        axes = one.axes(mesh)
        entry = sums.setdefault(
            (one.kind, axes),
            {"kind": one.kind, "axes": axes, "times": 0}
            | {"bytes": 0.0, "sent_bytes": 0.0, "network_bytes": 0.0},
        )
        entry["times"] += one.times
        entry["bytes"] += one.times * one.nbytes
        entry["sent_bytes"] += one.link_bytes(mesh)
        entry["network_bytes"] += one.network_bytes(networks)
    largest = sorted(sends, key=lambda one: -one.nbytes)[:most]
    return Cost(
        flops=hlo.product_flops(text, filled),
        nbytes=hlo.bytes_moved(text),
        collectives=sorted(sums.values(), key=lambda entry: -entry["sent_bytes"]),
        largest=[
            {
                "kind": one.kind,
                "axes": one.axes(mesh),
                "shape": one.shape.split("{")[0],
                "bytes": one.nbytes,
                "times": one.times,
                "from": one.written_by,
            }
            for one in largest
        ],
        unknown_loops=sorted(hlo.parse(text).unknown_loops),
    )
