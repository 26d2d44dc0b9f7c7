"""The least time of a training step on this machine: its products, exponentials and bytes.

What a step cannot do without, each at the best rate that this machine shows for it in this run:

    products       every matrix product of both models, at the best of NumPy, XLA and torch (where
                   there is one), each shape by itself
    exponentials   three of each logit: the teacher's and the student's at T, the student's at 1;
                   the better of NumPy and XLA
    optimizer      AdamW's bytes, seven float32 of each weight, at the rate of a copy in memory

Nothing of it is shared between them, and nothing else counts: norms, activations, attention's
softmax and the rotation of positions are above the floor.
"""

import collections
import pathlib
import statistics
import time
from collections.abc import Callable

ROUNDS = 5


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


def measure(shapes: dict, vocab: int, batch: int, length: int) -> dict:
    """Seconds of each part and of all, and by whom the products are made fastest."""
    seconds, flops, makers = 0.0, 0.0, collections.Counter()
    for (rows, inner, columns), times in products(shapes, vocab, batch, length).items():
        each = _in_turn(_makers(rows, inner, columns))
        best = min(each, key=each.__getitem__)
        seconds += times * each[best]
        flops += 2.0 * times * rows * inner * columns
        makers[best] += 1
    exponentials = 3 * batch * length * vocab * _exponential()
    optimizer = 7 * 4 * weights(shapes["student"], vocab) * _byte()
    return {
        "products": seconds,
        "exponentials": exponentials,
        "optimizer": optimizer,
        "total": seconds + exponentials + optimizer,
        "product_gflop": flops / 1e9,
        "product_gflop_per_second": flops / seconds / 1e9,
        "fastest_for_shapes": dict(makers),
        "vector_bits": vector_bits(),
    }


def vector_bits(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> int | None:
    """Bits of the widest vectors that the processor says it has; None where it does not say."""
    if not cpuinfo.exists():
        return None
    words = set(cpuinfo.read_text().split())
    known = (("avx512f", 512), ("avx2", 256), ("asimd", 128), ("sse2", 128))
    return next((bits for word, bits in known if word in words), None)


def _makers(rows: int, inner: int, columns: int) -> dict[str, Callable[[], object]]:
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(rows, inner)), rng.normal(size=(inner, columns))
    a, b = a.astype(np.float32), b.astype(np.float32)
    on_device = jax.device_put(a), jax.device_put(b)
    program = jax.jit(jax.numpy.matmul).lower(*on_device).compile()
    makers: dict[str, Callable[[], object]] = {
        "numpy": lambda: a @ b,
        "xla": lambda: jax.block_until_ready(program(*on_device)),
    }
    try:
        import torch
    except ImportError:
        return makers
    tensors = torch.from_numpy(a), torch.from_numpy(b)
    return makers | {"torch": lambda: torch.mm(*tensors)}


def _exponential() -> float:
    """Seconds of one float32 exponential, of blocks that stay in a cache."""
    import jax
    import numpy as np

    x = np.linspace(-20, 0, 2**16, dtype=np.float32)
    out, there = np.empty_like(x), jax.device_put(x)
    program = jax.jit(jax.numpy.exp).lower(there).compile()
    makers = {
        "numpy": lambda: [np.exp(x, out=out) for _ in range(64)],
        "xla": lambda: [jax.block_until_ready(program(there)) for _ in range(64)],
    }
    return min(_in_turn(makers).values()) / (64 * x.size)


def _byte() -> float:
    """Seconds of one byte that is read or written in memory."""
    import numpy as np

    source = np.ones(2**25, np.float32)
    target = np.empty_like(source)
    seconds = _in_turn({"copy": lambda: np.copyto(target, source)})["copy"]
    return seconds / (2 * source.nbytes)


def _in_turn(makers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each, one after the other in every round."""
    taken = {name: [] for name in makers}
    for make in makers.values():
        make()
    for _ in range(ROUNDS):
        for name, make in makers.items():
            began = time.perf_counter()
            make()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}
