"""What a compiled program moves and computes, read from its text: bytes, collectives, products."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2,
    "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "optimization-barrier", "iota", "copy-done",
}  # fmt: skip
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPERATION = re.compile(
    r"\s+(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)"
)


class Kernel(NamedTuple):
    """One operation of the program, all its iterations together.

    Attributes:
      name: in the text.
      opcode: "fusion", "custom-call", "all-gather", ...
      read: bytes of its operands.
      written: bytes of its results.
      times: how often it runs.
      shape: of its result, as text.
      groups: the devices that take part together, for a collective, as text.
    """

    name: str
    opcode: str
    read: float
    written: float
    times: int
    shape: str
    groups: str


def nbytes(shape: str) -> float:
    """Bytes of a shape's text, tuples included: "f32[8,16]{1,0}" -> 512."""
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in _SHAPE.findall(shape)
    )


class _Operation(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return re.findall(r"%([\w.\-]+)", re.split(r"\), ", self.rest)[0])

    def called(self, attribute: str) -> list[str]:
        """Names of the computations under an attribute."""
        found = re.search(rf"\b{attribute}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.rest)
        if not found:
            return []
        return [found[1]] if found[1] else re.findall(r"%?([\w.\-]+)", found[2])

    @property
    def trips(self) -> int:
        """Iterations of a loop; 1 where the compiler does not know them."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)', self.rest)
        return int(found[1]) if found else 1


Computations = dict[str, list[_Operation]]


def _parse(text: str) -> Computations:
    computations: Computations = {}
    current: list[_Operation] | None = None
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if opened:
            current = computations.setdefault("ENTRY" if opened[1] else opened[2], [])
        elif current is not None and (found := _OPERATION.match(line)):
            current.append(_Operation(*found.groups()))
    return computations


def kernels(text: str) -> list[Kernel]:
    """The operations that touch memory, loops times their trip count.

    An upper bound: an operand that is only sliced counts whole, and what caches serve is not
    subtracted. A loop whose trip count the compiler does not know counts once.
    """
    return list(_kernels(_parse(text), "ENTRY", 1))


def _kernels(computations: Computations, name: str, times: int) -> Iterator[Kernel]:
    shapes: dict[str, str] = {}
    for op in computations.get(name, ()):
        shapes[op.name] = op.shape
        if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")):
            continue
        if op.opcode == "while":
            yield from _kernels(computations, op.called("body")[0], times * op.trips)
        elif op.opcode == "call":  # command buffers appear as calls
            yield from _kernels(computations, op.called("to_apply")[0], times)
        else:
            read = sum(nbytes(shapes[operand]) for operand in op.operands if operand in shapes)
            written = nbytes(op.shape)
            if op.opcode.endswith("-start"):  # it returns its operands beside its results
                written = max(0.0, written - read)
            groups = re.search(r"replica_groups=(\S+?)(?:, \w|$)", op.rest)
            devices = groups[1] if groups else ""
            yield Kernel(
                op.name, op.opcode, times * read, times * written, times, op.shape, devices
            )


def product_flops(text: str) -> float:
    """Floating-point operations of all matrix products, 2 per multiply-add, loops by their trips.

    Of a conditional's branches the largest counts. Library calls that are no `dot` any more count
    nothing: count them in a program that was compiled without a device.
    """
    computations = _parse(text)
    return _flops(computations, "ENTRY", {})


def _flops(computations: Computations, name: str, known: dict[str, float]) -> float:
    if name in known:
        return known[name]
    shapes = {op.name: op.shape for op in computations.get(name, ())}
    total = 0.0
    inner = lambda names: [_flops(computations, inside, known) for inside in names]
    for op in computations.get(name, ()):
        if op.opcode == "dot":
            total += _dot(op, shapes)
        elif op.opcode == "convolution":
            # A TPU's products: as many multiply-adds as the operands and the result imply.
            left, right = (_elements(shapes[operand]) for operand in op.operands[:2])
            total += 2.0 * math.sqrt(left * right * _elements(op.shape))
        elif op.opcode == "while":
            total += op.trips * sum(inner(op.called("body")))
        elif op.opcode == "conditional":
            branches = op.called("branch_computations") or [
                *op.called("true_computation"),
                *op.called("false_computation"),
            ]
            total += max(inner(branches), default=0.0)
        else:
            total += sum(inner(op.called("calls") + op.called("to_apply")))
    known[name] = total
    return total


def _elements(shape: str) -> int:
    found = _SHAPE.search(shape)
    assert found, shape
    return math.prod(int(d) for d in found[2].split(",") if d)


def _dot(op: _Operation, shapes: dict[str, str]) -> float:
    left = _SHAPE.search(shapes[op.operands[0]])
    assert left, op
    dims = [int(d) for d in left[2].split(",") if d]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    inner = math.prod(dims[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2.0 * _elements(op.shape) * inner


def bytes_moved(text: str) -> float:
    """Bytes read and written at the boundaries of all kernels."""
    return sum(kernel.read + kernel.written for kernel in kernels(text))


def collectives(text: str) -> dict[str, list[Kernel]]:
    """The program's collectives by kind; an asynchronous one counts at its start."""
    found = defaultdict(list)
    for kernel in kernels(text):
        kind = kernel.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            found[kind].append(kernel)
    return dict(found)
