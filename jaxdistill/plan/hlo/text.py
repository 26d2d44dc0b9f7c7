"""The text of a compiled program as computations of operations, and how often its loops run."""

import functools
import math
import re
from typing import NamedTuple

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2,
    "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-#]+)")
_OPCODE = re.compile(r" ([\w\-]+)\(")
# A TPU's layouts have tiles; a memory space beside them is one on the chip, not the large one.
_ON_CHIP = re.compile(r"T\(.*S\([1-9]")


def nbytes(shape: str, *, on_chip: bool = True) -> float:
    """Bytes of a shape's text, tuples included: "f32[8,16]{1,0}" -> 512.

    Args:
      shape: the text.
      on_chip: whether arrays count that lie in a TPU's small memories.
    """
    total = 0.0
    for dtype, dims, layout in _SHAPE.findall(shape):
        if on_chip or not _ON_CHIP.search(layout):
            total += float(_BYTES.get(dtype, 0)) * math.prod(int(d) for d in dims.split(",") if d)
    return total


def dims(shape: str) -> list[int]:
    """The sizes of an array's shape: "f32[8,16]{1,0}" -> [8, 16]."""
    match = _SHAPE.search(shape)
    assert match, shape
    return [int(d) for d in match[2].split(",") if d]


def elements(shape: str) -> list[str]:
    """The parts of a tuple's shape; an array is its own only part."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for place, char in enumerate(shape):
        depth += (char in "([{") - (char in ")]}")
        if (char == "," and depth == 1) or depth == 0:
            parts.append(shape[start:place].strip())
            start = place + 1
    return [part for part in parts if part]


class Operation(NamedTuple):
    """A line of a computation.

    Attributes:
      name: by which others refer to it.
      shape: of its result, as text.
      opcode: "fusion", "while", "all-gather", ...
      rest: what follows the opening parenthesis.
      root: whether it is what the computation returns.
    """

    name: str
    shape: str
    opcode: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return _OPERAND.findall(re.split(r"\), ", self.rest)[0])

    def called(self, attribute: str) -> list[str]:
        """Names of the computations under an attribute."""
        match = re.search(rf"\b{attribute}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.rest)
        if not match:
            return []
        return [match[1]] if match[1] else re.findall(r"%?([\w.\-]+)", match[2])

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        either = [*self.called("true_computation"), *self.called("false_computation")]
        return self.called("branch_computations") or either

    @property
    def written_by(self) -> str:
        """The path of JAX's names that the operation comes from, "" if it tells none."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    def number(self, attribute: str) -> int | None:
        """An attribute that is a number, such as `index` or `channel_id`."""
        match = re.search(rf"\b{attribute}=(\d+)", self.rest)
        return int(match[1]) if match else None


class Program:
    """Computations by name; "ENTRY" is the one that runs.

    Attributes:
      computations: name -> its operations, in order.
      unknown_loops: loops whose number of iterations nothing tells; each counts once.
    """

    def __init__(self, computations: dict[str, list[Operation]]):
        self.computations = computations
        self.unknown_loops: set[str] = set()
        self._by_name = {name: {op.name: op for op in ops} for name, ops in computations.items()}

    def operation(self, computation: str, name: str) -> Operation | None:
        """An operation by its name."""
        return self._by_name[computation].get(name)

    def shape(self, computation: str, name: str) -> str:
        """The shape of an operation's result, "" if there is none of this name."""
        operation = self.operation(computation, name)
        return operation.shape if operation else ""

    def root(self, computation: str) -> Operation:
        """What a computation returns."""
        return next(op for op in reversed(self.computations[computation]) if op.root)

    def trips(self, computation: str, loop: Operation) -> int:
        """Iterations of a `while`, told by the compiler or read off its condition and body.

        A TPU's program does not say it: there the loop must count up from a constant by a constant
        to a constant, as scans and the ring products of sharded matrices do.
        """
        told = re.search(r'known_trip_count":\{"n":"(\d+)', loop.rest)
        if told:
            return int(told[1])
        count = self._counted(computation, loop)
        if count is None:
            self.unknown_loops.add(loop.name)
        return count or 1

    def _counted(self, outside: str, loop: Operation) -> int | None:
        condition, body = loop.called("condition")[0], loop.called("body")[0]
        initial = self.operation(outside, loop.operands[0])
        compare = self.root(condition)
        if compare.opcode != "compare" or "direction=LT" not in compare.rest or initial is None:
            return None
        counter, bound = (self._element(condition, name) for name in compare.operands)
        if not isinstance(counter, _Carried):
            return None
        limit = self._number(outside, initial, bound)
        start = self._number(outside, initial, counter)
        root = self.root(body)
        if limit is None or start is None or root.opcode != "tuple":
            return None
        step = self._step(outside, initial, body, root.operands[counter.index], counter)
        return None if not step else max(0, -(-(limit - start) // step))

    def _step(self, outside, initial, body: str, name: str, counter: "_Carried") -> int | None:
        add = self.operation(body, name)
        while add is not None and add.opcode in ("copy", "bitcast"):
            add = self.operation(body, add.operands[0])
        if add is None or add.opcode != "add":
            return None
        sides = [self._element(body, operand) for operand in add.operands]
        others = [side for side in sides if side != counter]
        return self._number(outside, initial, others[0]) if len(others) == 1 else None

    def _number(self, outside: str, initial: Operation, value: "int | _Carried | None"):
        """A constant, or the constant that a loop carries in."""
        if isinstance(value, _Carried):
            if initial.opcode != "tuple":
                return None
            value = self._element(outside, initial.operands[value.index])
        return value if isinstance(value, int) else None

    def _element(self, computation: str, name: str) -> "int | _Carried | None":
        """What a name stands for: a constant, an element of what is carried, or neither."""
        op = self.operation(computation, name)
        while op is not None and op.opcode in ("copy", "bitcast", "convert"):
            op = self.operation(computation, op.operands[0])
        if op is None:
            return None
        if op.opcode == "constant":
            digits = re.match(r"(-?\d+)\)", op.rest)
            return int(digits[1]) if digits else None
        if op.opcode == "get-tuple-element":
            source = self.operation(computation, op.operands[0])
            if source is not None and source.opcode == "parameter":
                return _Carried(op.number("index") or 0)
        return None


class _Carried(NamedTuple):
    """An element of the tuple that a loop carries."""

    index: int


@functools.lru_cache(maxsize=8)
def parse(text: str) -> Program:
    """The program of a text; the last few are remembered."""
    computations: dict[str, list[Operation]] = {}
    current: list[Operation] | None = None
    made: dict[str, Operation] = {}
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if opened:
            current = computations.setdefault("ENTRY" if opened[1] else opened[2], [])
            made = {}
        elif current is not None and (operation := _operation(line)):
            if "#" in operation.rest:
                current += _parts(operation, made)
            made[operation.name] = operation
            current.append(operation)
    return Program(computations)


def _parts(op: Operation, made: dict[str, Operation]) -> list[Operation]:
    """The elements of tuples that an operand such as %x#1 stands for, as operations.

    Dumps write so; `Compiled.as_text` has a get-tuple-element instead.
    """
    new = []
    for operand in op.operands:
        names = operand.split("#")
        for depth in range(1, len(names)):
            source, name = "#".join(names[:depth]), "#".join(names[: depth + 1])
            if name not in made:
                shape = elements(made[source].shape)[int(names[depth])]
                rest = f"%{source}), index={names[depth]}"
                made[name] = Operation(name, shape, "get-tuple-element", rest, False)
                new.append(made[name])
    return new


def _operation(line: str) -> Operation | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    end = _end_of_shape(line, head.end())
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    shape, rest = line[head.end() : end], line[opcode.end() :]
    return Operation(head[2], shape, opcode[1], rest, bool(head[1]))


def _end_of_shape(line: str, start: int) -> int:
    """Where a shape ends: at the first space outside of brackets."""
    depth = 0
    for place in range(start, len(line)):
        char = line[place]
        depth += (char in "([{") - (char in ")]}")
        if char == " " and depth == 0:
            return place
    return len(line)
