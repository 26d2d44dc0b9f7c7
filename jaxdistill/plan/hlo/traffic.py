"""Bytes that a program's kernels read and write in the large memory, loops times their trips."""

from collections.abc import Iterator
from typing import NamedTuple

from jaxdistill.plan.hlo.text import Operation, Program, elements, nbytes, parse

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "optimization-barrier", "iota", "copy-done",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveDone")
_SLICES = ("dynamic-slice", "slice", "gather")


class KernelCall(NamedTuple):
    """One operation of the program, all its iterations together.

    Attributes:
      name: in the text.
      opcode: "fusion", "custom-call", "all-gather", ...
      read: bytes of its operands.
      written: bytes of its results.
      times: how often it runs.
      shape: of its result, as text.
    """

    name: str
    opcode: str
    read: float
    written: float
    times: int
    shape: str


def kernels(text: str) -> list[KernelCall]:
    """The operations that touch memory, loops times their trip count.

    An operand that a kernel only takes a slice of counts as the slice, a result that it only
    writes a part of as the part; arrays in a TPU's on-chip memory count nothing. Bytes that caches
    serve are not subtracted. Of a conditional's branches the one counts that moves most.
    """
    return list(_kernels(parse(text), "ENTRY", 1))


def bytes_moved(text: str) -> float:
    """Bytes read and written at the boundaries of all kernels."""
    return sum(kernel.read + kernel.written for kernel in kernels(text))


def _kernels(program: Program, name: str, times: int) -> Iterator[KernelCall]:
    for op in program.computations.get(name, ()):
        if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")):
            continue
        if op.opcode == "custom-call" and any(f'"{free}"' in op.rest for free in _FREE_CALLS):
            continue
        if op.opcode == "while":
            inside = times * program.trips(name, op)
            yield from _kernels(program, op.called("body")[0], inside)
        elif op.opcode == "call":  # command buffers appear as calls
            yield from _kernels(program, op.called("to_apply")[0], times)
        elif op.opcode == "async-start":
            yield from _kernels(program, op.called("calls")[0], times)
        elif op.opcode == "conditional":
            ways = [list(_kernels(program, branch, times)) for branch in op.branches]
            yield from max(ways, key=lambda way: sum(k.read + k.written for k in way), default=[])
        else:
            read, written = _bytes(program, name, op)
            yield KernelCall(op.name, op.opcode, times * read, times * written, times, op.shape)


def _large(shape: str) -> float:
    return nbytes(shape, on_chip=False)


def _bytes(program: Program, name: str, op: Operation) -> tuple[float, float]:
    """Bytes that one run of an operation reads and writes."""
    shapes = [program.shape(name, operand) for operand in op.operands]
    if op.opcode == "fusion":
        return _fusion(program, op, shapes)
    if op.opcode in _SLICES:
        return min(nbytes(op.shape), _large(shapes[0])), _large(op.shape)
    if op.opcode == "dynamic-update-slice":
        return _large(shapes[1]), _large(shapes[1])
    if op.opcode in ("slice-start", "dynamic-slice-start"):  # a prefetch to a TPU's own memory
        part = elements(op.shape)[1]
        return min(nbytes(part), _large(shapes[0])), _large(part)
    read = sum(map(_large, shapes))
    written = _large(op.shape)
    if op.opcode.endswith("-start"):  # it returns its operands beside its results
        written = max(0.0, written - read)
    return read, written


def _fusion(program: Program, op: Operation, shapes: list[str]) -> tuple[float, float]:
    inside = op.called("calls")[0]
    parameters = {
        int(one.rest.split(")")[0]): one.name
        for one in program.computations[inside]
        if one.opcode == "parameter"
    }
    read = sum(
        min(_large(shape), _read_of(program, inside, parameters[place]))
        for place, shape in enumerate(shapes)
        if place in parameters
    )
    root = program.root(inside)
    results = root.operands if root.opcode == "tuple" else [root.name]
    parts = elements(op.shape)
    written = sum(
        min(_large(shape), _written_of(program, inside, result))
        for shape, result in zip(parts, results, strict=False)
    )
    return read, written


def _read_of(program: Program, computation: str, name: str) -> float:
    """Bytes that a fused computation needs of one of its values."""
    total = 0.0
    for user in program.computations[computation]:
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode in _SLICES and first:
            total += nbytes(user.shape)
        elif user.opcode == "bitcast":
            total += _read_of(program, computation, user.name)
        elif (user.opcode == "dynamic-update-slice" and first) or _chained(user):
            continue
        elif user.opcode == "tuple":
            continue  # handed on as it is
        else:
            return float("inf")
    return total


def _written_of(program: Program, computation: str, name: str) -> float:
    """Bytes that a fused computation writes of one of its results."""
    op = program.operation(computation, name)
    assert op is not None, name
    if op.opcode == "bitcast":
        return _written_of(program, computation, op.operands[0])
    if op.opcode == "dynamic-update-slice":
        return nbytes(program.shape(computation, op.operands[1]))
    if op.opcode in ("parameter", "get-tuple-element") or _chained(op):
        return 0.0
    return float("inf")


def _chained(op: Operation) -> bool:
    """Whether an operation is one of the pieces of a collective that runs beside fusions."""
    return "chain_id=" in op.rest
