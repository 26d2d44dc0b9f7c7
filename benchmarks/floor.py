"""The least time of a training step on this machine: its products, exponentials and bytes.

What a step cannot do without, each at the best rate that this machine shows for it in this run:

    products       every matrix product of both models, at the best of NumPy, XLA and torch (where
                   there is one), each shape by itself
    exponentials   three of each logit: the teacher's and the student's at T, the student's at 1;
                   the better of NumPy and XLA
    optimizer      AdamW's bytes, seven float32 of each weight, at the rate of a copy in memory

Nothing of it is shared between them, and nothing else counts: norms, activations, attention's
softmax and the rotation of positions are above the floor. The floor of memory is the weights of
both models, and the student's gradients and moments.

Torch may live in another Python: there this module is a program that makes products when asked.
"""

import collections
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import duel

Clock = Callable[[], float]  # does it once -> seconds
Shape = tuple[int, int, int]


def products(shapes: dict, vocab: int, batch: int, length: int) -> collections.Counter:
    """(rows, inner, columns) of each matrix product of a step -> how often it is made.

    A product of weights is made once forward, and for the student twice more on the way back.
    """
    tokens, count = batch * length, collections.Counter()
    for name, shape in shapes.items():
        embed, mlp, heads, layers = (shape[key] for key in ("embed", "mlp", "heads", "layers"))
        trained = name == "student"

        def add(rows, inner, columns, times, trained=trained):
            count[rows, inner, columns] += times
            if trained:  # by the input, and by the weights
                count[rows, columns, inner] += times
                count[inner, rows, columns] += times

        add(tokens, embed, embed, 4 * layers)
        add(tokens, embed, mlp, 2 * layers)
        add(tokens, mlp, embed, layers)
        add(tokens, embed, vocab, 1)
        width = embed // heads
        add(length, width, length, batch * heads * layers)
        add(length, length, width, batch * heads * layers)
    return count


def weights(shape: dict, vocab: int) -> int:
    """Weights of matrices of a model with heads and embeddings of their own."""
    embed, mlp, layers = shape["embed"], shape["mlp"], shape["layers"]
    return layers * (4 * embed**2 + 3 * embed * mlp) + 2 * vocab * embed


class Floor:
    """Measures the parts once a round; medians of the rounds make the floor.

    Args:
      shapes: of the models by name.
      vocab: tokens of both.
      batch: rows.
      length: tokens of a row.
      torch: a worker of this module that has torch, or None.

    Attributes:
      clocks: by part, a product's shape, "exponential" or "byte": seconds of one, by maker.
    """

    def __init__(
        self, shapes: dict, vocab: int, batch: int, length: int, torch: duel.Worker | None = None
    ):
        self._products = products(shapes, vocab, batch, length)
        self._logits = batch * length * vocab
        self._weights = {name: weights(shape, vocab) for name, shape in shapes.items()}
        self.clocks: dict[Any, dict[str, Clock]] = {
            shape: _product_clocks(*shape, torch) for shape in self._products
        }
        self.clocks |= {"exponential": _exponentials(), "byte": _bytes()}
        self._taken = {part: {name: [] for name in clocks} for part, clocks in self.clocks.items()}

    def measure(self) -> None:
        """One round: every maker of every part, one after the other."""
        for part, clocks in self.clocks.items():
            for name, clock in clocks.items():
                clock()  # brings operands back into the caches
                self._taken[part][name].append(clock())

    def result(self) -> dict:
        """Seconds of each part and of all, bytes, and by whom the products are made fastest."""
        best = {
            part: min((statistics.median(seconds), name) for name, seconds in taken.items())
            for part, taken in self._taken.items()
        }
        seconds = sum(times * best[shape][0] for shape, times in self._products.items())
        flops = sum(2.0 * times * m * k * n for (m, k, n), times in self._products.items())
        exponentials = 3 * self._logits * best["exponential"][0]
        optimizer = 7 * 4 * self._weights["student"] * best["byte"][0]
        held = 4 * (self._weights["teacher"] + 4 * self._weights["student"])
        return {
            "products": seconds,
            "exponentials": exponentials,
            "optimizer": optimizer,
            "total": seconds + exponentials + optimizer,
            "held_mib": held / 2**20,
            "product_gflop": flops / 1e9,
            "product_gflop_per_second": flops / seconds / 1e9,
            "fastest_for_shapes": dict(
                collections.Counter(best[shape][1] for shape in self._products)
            ),
            "vector_bits": vector_bits(),
        }


def vector_bits(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> int | None:
    """Bits of the widest vectors that the processor says it has; None where it does not say."""
    if not cpuinfo.exists():
        return None
    words = set(cpuinfo.read_text().split())
    known = (("avx512f", 512), ("avx2", 256), ("asimd", 128), ("sse2", 128))
    return next((bits for word, bits in known if word in words), None)


def _clock(make: Callable[[], object], parts: float = 1) -> Clock:
    """Seconds of one part of what a call makes."""

    def once() -> float:
        began = time.perf_counter()
        make()
        return (time.perf_counter() - began) / parts

    once()
    return once


def _operands(rows: int, inner: int, columns: int):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, inner), "f"), rng.standard_normal((inner, columns), "f")


def _product_clocks(
    rows: int, inner: int, columns: int, torch: duel.Worker | None
) -> dict[str, Clock]:
    """Who makes the product of these shapes."""
    import jax

    a, b = _operands(rows, inner, columns)
    on_device = jax.device_put(a), jax.device_put(b)
    program = jax.jit(jax.numpy.matmul).lower(*on_device).compile()
    makers = {
        "numpy": _clock(lambda: a @ b),
        "xla": _clock(lambda: jax.block_until_ready(program(*on_device))),
    }
    if torch is not None:
        makers["torch"] = lambda: torch.ask(f"{rows} {inner} {columns}")["seconds"]
    return makers


def _exponentials() -> dict[str, Clock]:
    """Who makes float32 exponentials, of blocks that stay in a cache: seconds of one."""
    import jax
    import numpy as np

    x = np.linspace(-20, 0, 2**16, dtype=np.float32)
    out, there = np.empty_like(x), jax.device_put(x)
    program = jax.jit(jax.numpy.exp).lower(there).compile()
    again = lambda make: _clock(lambda: [make() for _ in range(64)], 64 * x.size)
    return {
        "numpy": again(lambda: np.exp(x, out=out)),
        "xla": again(lambda: jax.block_until_ready(program(there))),
    }


def _bytes() -> dict[str, Clock]:
    """Seconds of one byte that is read or written in memory."""
    import numpy as np

    source = np.ones(2**25, np.float32)
    target = np.empty_like(source)
    return {"copy": _clock(lambda: np.copyto(target, source), 2 * source.nbytes)}


def main() -> None:
    """Torch's side: for each line `rows inner columns` the seconds of that product."""
    import torch

    clocks: dict[str, Clock] = {}
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        if line not in clocks:
            a, b = map(torch.from_numpy, _operands(*map(int, line.split())))
            clocks[line] = _clock(lambda a=a, b=b: torch.mm(a, b))
        print(json.dumps({"seconds": clocks[line]()}), flush=True)


if __name__ == "__main__":
    main()
