"""Floating-point operations of a program's matrix products, loops times their iterations."""

import math
import re

from jaxdistill.plan.hlo.text import Operation, Program, dims, parse

# As libtpu names its kernels for ragged products, the one that prepares their blocks aside.
_RAGGED = re.compile(r"ragged-dot-(?!metadata)")


def product_flops(text: str, filled: float = 1.0) -> float:
    """Floating-point operations of all matrix products, 2 per multiply-add, loops by their trips.

    Of a conditional's branches the largest counts. Library calls that are no `dot` any more count
    nothing: count them in a program that was compiled without a device. A ragged product that a
    TPU's compiler keeps counts each row once; those that other compilers write as products of all
    rows with all groups count as these.

    Args:
      text: of the compiled program.
      filled: the part of the rows of a TPU's ragged products that belongs to any group. It passes
        the blocks of the others by.
    """
    return _flops(parse(text), "ENTRY", filled, {})


def _flops(program: Program, name: str, filled: float, known: dict[str, float]) -> float:
    if name in known:
        return known[name]
    total = 0.0
    inner = lambda names: [_flops(program, inside, filled, known) for inside in names]
    for op in program.computations.get(name, ()):
        if op.opcode == "dot":
            total += _dot(op, program.shape(name, op.operands[0]))
        elif op.opcode == "convolution":
            total += _convolution(op, *(program.shape(name, x) for x in op.operands[:2]))
        elif op.opcode == "custom-call" and _RAGGED.match(op.name):
            total += filled * _ragged(op, [program.shape(name, x) for x in op.operands])
        elif op.opcode == "while":
            total += program.trips(name, op) * sum(inner(op.called("body")))
        elif op.opcode == "conditional":
            total += max(inner(op.branches), default=0.0)
        else:
            called = op.called("calls") + op.called("to_apply")
            total += sum(inner(called)) * _at_work(program, op, called, filled)
    known[name] = total
    return total


def _ragged(op: Operation, operands: list[str]) -> float:
    """Of a kernel for [P, D] x [X, D, F] -> [P, F], or the sum [P, D] x [P, F] -> [X, D, F]."""
    left = next(shape for shape in operands if not shape.startswith("s32"))  # behind the groups
    rows, width = dims(left)
    *groups, inner, outer = dims(op.shape)
    return 2.0 * rows * outer * (inner if groups else width)


def _at_work(program: Program, op: Operation, called: list[str], filled: float) -> float:
    """The part of a fused product that is computed: of a ragged one each row with one group.

    It is written as a product for each group, with masks, whose empty blocks are passed by.
    """
    groups = re.search(r'"num_groups_in_ragged_dot":"(\d+)"', op.rest)
    products = (
        one.opcode == "convolution" for inside in called for one in program.computations[inside]
    )
    return filled / int(groups[1]) if groups and any(products) else 1.0


def _dot(op: Operation, left: str) -> float:
    sizes = dims(left)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    inner = math.prod(sizes[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2.0 * math.prod(dims(op.shape)) * inner


def _convolution(op: Operation, left: str, right: str) -> float:
    """2 multiply-adds of real numbers: a TPU writes products, batched ones too, as convolutions.

    Batch dims become a window whose taps mostly meet padding or the holes of a dilation, so that
    only the pairs of an output and a tap that meet data count.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    assert labels, op
    lhs, rhs, out = (dict(zip(*pair, strict=True)) for pair in (
        (labels[1], dims(left)), (labels[2], dims(right)), (labels[3], dims(op.shape))
    ))  # fmt: skip
    window = re.search(r"window=\{([^}]*)\}", op.rest)
    options = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(label for label in lhs if label.isdigit())
    pairs = [
        _meeting(lhs[d], rhs[d], out[d], _dimension(options, int(d), len(spatial))) for d in spatial
    ]
    batch = lhs["b"] / (op.number("batch_group_count") or 1)
    return 2.0 * batch * rhs["i"] * rhs["o"] * math.prod(pairs)


def _dimension(options: dict[str, str], place: int, count: int) -> dict[str, int]:
    """stride, pad_low, lhs_dilate, rhs_dilate of one dim of a window, XLA's defaults filled in."""
    one = lambda name, default: options.get(name, "x".join([default] * count)).split("x")[place]
    return {
        "stride": int(one("stride", "1")),
        "pad": int(one("pad", "0_0").split("_")[0]),
        "lhs_dilate": int(one("lhs_dilate", "1")),
        "rhs_dilate": int(one("rhs_dilate", "1")),
    }


def _meeting(size: int, taps: int, outputs: int, window: dict[str, int]) -> int:
    """Pairs of an output position and a tap that meet an element of the input."""
    found, last = 0, (size - 1) * window["lhs_dilate"]
    for tap in range(taps):
        reach = tap * window["rhs_dilate"] - window["pad"]
        for output in range(outputs):
            place = output * window["stride"] + reach
            found += 0 <= place <= last and place % window["lhs_dilate"] == 0
    return found
