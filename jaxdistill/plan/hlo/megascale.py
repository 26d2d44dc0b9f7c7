"""Collectives between slices of TPUs as libtpu writes them: what a runtime of its own receives.

    recv(...), frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",
                                    _xla_megascale_transfer_type="ALL_REDUCE"}

Slices count from 1 there, devices of a slice from 0: 200003 is the fourth of the second. The target
above is four groups of two; others list their groups, or pairs. What devices of one slice do
together is in collectives of its own.
"""

import re

from jaxdistill.plan.hlo.text import Operation

_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_SLICE = 100_000
_TARGET = re.compile(
    r'_xla_megascale_target=(?:"\{([\d,]+)\}x\{(\d+):(\d+)\}"|(\{\{.*?\}\})|"(\{\{.*?\}\})")'
)


def kind_of(op: Operation) -> str | None:
    """What collective a receiving operation is; None for one that is none."""
    match = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest)
    return _KINDS.get(match[1]) if match and op.opcode == "recv" else None


def slice_size(text: str) -> int:
    """Devices of a slice, as far as the targets of a program name them."""
    return 1 + max(
        (number % _SLICE for one in _TARGET.finditer(text) for number in _ids(one)), default=0
    )


def groups_of(op: Operation, size: int) -> str:
    """Its groups, or pairs, as lists of the devices' places, of slices of that many devices."""
    target = _TARGET.search(op.rest)
    assert target, op
    place = lambda number: (number // _SLICE - 1) * size + number % _SLICE
    if target[1] is None:
        rows = re.findall(r"\{([\d,>-]+)\}", target[4] or target[5])
        rows = [[int(n) for n in re.split(r",|->", row)] for row in rows]
    else:
        slices = [int(n) for n in target[1].split(",")]
        members = range(int(target[2]), int(target[3]) + 1)
        rows = [[_SLICE * one + member for one in slices] for member in members]
    return "{" + ",".join("{" + ",".join(str(place(n)) for n in row) + "}" for row in rows) + "}"


def _ids(target: re.Match) -> list[int]:
    if target[1] is not None:
        return [int(target[3])]
    return [int(n) for n in re.findall(r"\d+", target[4] or target[5])]
