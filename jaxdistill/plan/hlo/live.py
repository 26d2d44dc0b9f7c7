"""The temporaries of a program and when they are alive, by the compiler's own notes.

XLA writes them beside the program's text: where each value lies (`*-buffer-assignment.txt` of
`--xla_dump_to`) and from when to when it is alive (`*-live-range.txt`).
"""

import re
from typing import NamedTuple

from jaxdistill.plan.hlo.text import Operation, Program

_RANGE = re.compile(r"\s+([\w.\-]+\{[\d,]*\}):(\d+)-(\d+)$")
_ALLOCATION = re.compile(r"allocation (\d+): size \d+, (.*)")
_VALUE = re.compile(r" value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)")


class Buffer(NamedTuple):
    """One value among the temporaries; values at one place share it, at one time or in turn.

    Attributes:
      place: (allocation, offset in it).
      nbytes: that it takes.
      first: the operation, by its place in the schedule, from which it is alive.
      last: until which.
      written_by: the path of JAX's names of what it is made by, "" if nothing tells it.
    """

    place: tuple[int, int]
    nbytes: int
    first: int
    last: int
    written_by: str


def temporaries(program: Program, assignment: str, live_ranges: str) -> list[Buffer]:
    """The values in the memory that a program takes for its temporaries."""
    listed = live_ranges.split("BufferLiveRange:")[1].split("Live ranges at")[0]
    alive = {m[1]: (int(m[2]), int(m[3])) for m in map(_RANGE.match, listed.splitlines()) if m}
    owners = {op.name: (name, op) for name, ops in program.computations.items() for op in ops}
    found, allocation = [], None
    for line in assignment.splitlines():
        if head := _ALLOCATION.match(line):
            # A color is a memory of its own: the first is the large one.
            temporary = "preallocated-temp" in head[2] and "color" not in head[2]
            allocation = int(head[1]) if temporary else None
        elif allocation is not None and (value := _VALUE.match(line)):
            name = value[1] if value[1].endswith("}") else value[1] + "{}"
            operation = name.split("{")[0]
            if name in alive and operation in owners:
                path = written_by(program, *owners[operation])
                place = (allocation, int(value[3]))
                found.append(Buffer(place, int(value[2]), *alive[name], path))
    return found


def written_by(program: Program, computation: str, op: Operation, depth: int = 6) -> str:
    """The path of an operation, or of the nearest one that it is made from."""
    if op.written_by or not depth:
        return op.written_by
    if op.opcode == "fusion":
        root = program.root(op.called("calls")[0])
        if root.written_by:
            return root.written_by
    for operand in op.operands:
        source = program.operation(computation, operand)
        if source is not None and source.opcode not in ("constant", "parameter"):
            path = written_by(program, computation, source, depth - 1)
            if path:
                return path
    return ""
