"""A program's collectives: how often they run, what they carry, and over which axes of the mesh."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxdistill.plan.hlo import megascale
from jaxdistill.plan.hlo.text import Operation, Program, elements, nbytes, parse

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip


class Collective(NamedTuple):
    """One collective of the program.

    Attributes:
      name: in the text.
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", ...
      shape: of its result on one device, as text.
      nbytes: of its result on one device, of one run.
      times: how often it runs.
      written_by: the path of JAX's names that it comes from.
      groups: the devices that take part together, as text.
    """

    name: str
    kind: str
    shape: str
    nbytes: float
    times: int
    written_by: str
    groups: str

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of the mesh, larger than 1, that it runs over."""
        return axes_of(self.groups, mesh)

    def link_bytes(self, mesh: Mapping[str, int]) -> float:
        """Bytes that a device sends in all its runs, by the algorithms that send least.

        With n devices and a result of R bytes: all-gather and all-to-all R (n - 1) / n, all-reduce
        2 R (n - 1) / n, reduce-scatter R (n - 1), a permutation R.
        """
        n = max(map(len, _groups(self.groups, math.prod(mesh.values()))))
        if n == 1 or not self.axes(mesh):
            return 0.0
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }.get(self.kind, (n - 1) / n)
        return self.times * self.nbytes * share

    def network_bytes(self, networks: Sequence[int]) -> float:
        """Of these the bytes that leave a device's fast network: a mean over the busiest network.

        A group of n devices in k networks works in two stages, among the devices of each network
        and then between the networks, so that with a result of R bytes a device sends to others:
        all-gather R (k - 1) / n, all-reduce 2 R (k - 1) / n, reduce-scatter R (k - 1), all-to-all
        R (k - 1) / k, and a permutation R where its pair crosses.

        Args:
          networks: of each place of the mesh the number of its network.
        """
        lies = np.asarray(networks)
        groups = _groups(self.groups, len(lies))
        if self.kind == "collective-permute":
            leaving = [lies[a] for a, b in groups if lies[a] != lies[b]]
            sent = max(
                (leaving.count(one) / np.sum(lies == one) for one in set(leaving)), default=0
            )
        else:
            sent = max(self._crossing(len(group), len(set(lies[group]))) for group in groups)
        return float(self.times * self.nbytes * sent)

    def _crossing(self, n: int, k: int) -> float:
        """The part of the result that a device of a group sends to other networks."""
        return {
            "all-gather": (k - 1) / n,
            "all-reduce": 2 * (k - 1) / n,
            "reduce-scatter": float(k - 1),
            "collective-broadcast": (k - 1) / n,
        }.get(self.kind, (k - 1) / k)


def collectives(text: str) -> list[Collective]:
    """All collectives; an asynchronous one counts at its start, one between slices at its end.

    On a TPU one may be cut into pieces that run inside fusions, of one channel: it counts once. A
    reduce-scatter is a fusion there of an all-reduce and a slice.
    """
    program = parse(text)
    sends: list[Collective] = []
    pieces: dict[int, Collective] = {}
    size = megascale.slice_size(text)
    for channel, one in _walk(program, "ENTRY", 1, size):
        if channel is None:
            sends.append(one)
        elif channel not in pieces or one.times < pieces[channel].times:
            pieces[channel] = one
    return sends + list(pieces.values())


def _walk(
    program: Program, name: str, times: int, size: int
) -> Iterator[tuple[int | None, Collective]]:
    """(channel of a piece, or None; collective) of a computation and of those it calls."""
    for op in program.computations.get(name, ()):
        kind = op.opcode.removesuffix("-start")
        if kind in KINDS:
            channel = op.number("channel_id") if "chain_id=" in op.rest else None
            yield channel, _collective(op, kind, times)
        elif beyond := megascale.kind_of(op):
            shape, groups = elements(op.shape)[0], megascale.groups_of(op, size)
            yield (
                None,
                Collective(op.name, beyond, shape, nbytes(shape), times, op.written_by, groups),
            )
        elif op.opcode == "while":
            yield from _walk(program, op.called("body")[0], times * program.trips(name, op), size)
        elif scattered := _scattered(program, op):
            yield (
                None,
                _collective(scattered, "reduce-scatter", times)._replace(
                    shape=op.shape, nbytes=nbytes(op.shape), written_by=op.written_by
                ),
            )
        else:
            for inside in op.called("calls") + op.called("to_apply") + op.branches:
                yield from _walk(program, inside, times, size)


def _scattered(program: Program, op: Operation) -> Operation | None:
    """The all-reduce of a fusion that is a reduce-scatter, or None."""
    for name in op.called("calls"):
        if name.startswith("all-reduce-scatter"):
            return next((o for o in program.computations[name] if o.opcode == "all-reduce"), None)
    return None


def _collective(op: Operation, kind: str, times: int) -> Collective:
    shape = op.shape
    if op.opcode.endswith("-start") and kind != "all-reduce":
        shape = elements(shape)[1]  # (operands, results, ...)
    pairs = re.search(r"source_target_pairs=(\{\{.*?\}\}|\{\})", op.rest)
    groups = re.search(r"replica_groups=(.*?)(?:, (?!device_ids=)\w+=|$)", op.rest)
    who = pairs[1] if pairs else groups[1] if groups else ""
    return Collective(op.name, kind, shape, nbytes(shape), times, op.written_by, who)


def axes_of(groups: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which devices of one group differ; places count in the mesh's order."""
    sizes = tuple(mesh.values())
    places = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=-1)
    differs = np.zeros(len(sizes), bool)
    for group in _groups(groups, int(np.prod(sizes))):
        differs |= (places[group] != places[group[0]]).any(axis=0)
    return tuple(axis for axis, moves in zip(mesh, differs, strict=True) if moves)


def _groups(text: str, devices: int) -> list[np.ndarray]:
    """Lists of devices, or the pairs of a permutation; no text means all devices."""
    named = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))?\s*\{(.*?)\}", text)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[3])
        ids = np.arange(devices) if named[2] is None else _iota(named[2])
        if ids is None or "device_ids" in named[1] or ":(" in named[3]:
            return [np.arange(devices)]  # parts of an axis: not told apart from all devices
        ids = ids.reshape(tuple(sizes.values()))
        places = [list(sizes).index(name) for name in chosen]
        ids = np.moveaxis(ids, places, range(-len(places), 0))
        return list(ids.reshape(-1, int(np.prod([sizes[name] for name in chosen] or [1]))))
    iota = re.match(r"\[([\d,]+)\]<=(.*)", text)
    ids = _iota(iota[2]) if iota else None
    if iota and ids is not None:
        return list(ids.reshape(_numbers(iota[1])))
    listed = re.findall(r"\{([\d,\s]+)\}", text)
    groups = [np.array([int(d) for d in part.split(",")]) for part in listed]
    return groups or [np.arange(devices)]


def _iota(text: str) -> np.ndarray | None:
    """The devices in the order of `[4,2]T(1,0)`: counted in that shape, its axes then exchanged."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return None
    shape = _numbers(match[1])
    ids = np.arange(np.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(match[2])) if match[2] else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
