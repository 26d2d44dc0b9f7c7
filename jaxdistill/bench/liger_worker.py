"""Liger's chunked distillation loss in a process of its own, for `liger`; it needs torch.

    python liger_worker.py FOLDER

Questions come as lines of JSON on standard input, and answers go back so on standard output.
"""

import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

_NAMES = ("hidden", "head", "teacher_hidden", "teacher_head", "labels")


def main() -> None:
    """Answers until nobody asks."""
    liger = Liger(pathlib.Path(sys.argv[1]))
    for line in sys.stdin:
        told = json.loads(line)
        print(json.dumps(getattr(liger, told.pop("do"))(**told)), flush=True)


class Liger:
    """The loss and its gradients by the student's hidden states and head.

    Args:
      folder: where arrays are exchanged.
    """

    def __init__(self, folder: pathlib.Path):
        import torch
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

        self._torch, self._function = torch, LigerFusedLinearJSDFunction
        self._on = "cuda" if torch.cuda.is_available() else "cpu"
        self._folder = folder
        self._arrays: Sequence[Any] = ()

    def begin(self, alpha: float, temperature: float) -> dict[str, str]:
        """What it is; the weight of cross-entropy and T are those of all steps."""
        self._alpha, self._temperature = alpha, temperature
        versions = {name: importlib.metadata.version(name) for name in ("torch", "liger-kernel")}
        return versions | {"on": self._on}

    def answer(self) -> dict[str, float]:
        """The value of the arrays in the folder; the gradients are written beside them."""
        load = lambda name: np.load(self._folder / f"{name}.npy", allow_pickle=False)
        arrays = [self._torch.from_numpy(load(name)).to(self._on) for name in _NAMES]
        self._arrays = [*arrays[:4], arrays[4].long()]
        value = self._value()
        for name, array in zip(_NAMES, self._arrays[:2], strict=False):
            np.save(self._folder / "answers" / f"{name}.npy", array.grad.cpu().numpy())
        return {"value": value}

    def prepare(self, tokens: int, vocab: int, student: int, teacher: int, dtype: str) -> dict:
        """Draws a problem, whose time does not depend on what is in it, and compiles its step."""
        made = {"device": self._on, "dtype": getattr(self._torch, dtype)}
        normal = lambda *shape: self._torch.randn(*shape, **made)
        heads = [normal(vocab, width) / width**0.5 for width in (student, teacher)]
        labels = self._torch.randint(vocab, (tokens,), device=self._on)
        self._arrays = normal(tokens, student), heads[0], normal(tokens, teacher), heads[1], labels
        self._value()
        return {}

    def step(self) -> dict[str, float | None]:
        """Seconds of a step, and on a GPU the most memory that it took beside its arrays."""
        gpu, peak, before = self._torch.cuda, None, 0
        if self._on == "cuda":
            gpu.synchronize()
            gpu.reset_peak_memory_stats()
            before = gpu.memory_allocated()
        began = time.perf_counter()
        self._value()
        if self._on == "cuda":
            gpu.synchronize()
            peak = (gpu.max_memory_allocated() - before) / 2**20
        return {"seconds": time.perf_counter() - began, "peak_mib": peak}

    def _value(self) -> float:
        hidden, head, taught, teacher_head, labels = self._arrays
        for array in (hidden, head):
            array.requires_grad_()
            array.grad = None
        value = self._function.apply(
            hidden, head, taught, teacher_head, labels, None, None,
            self._alpha, 1.0 - self._alpha, 0.0, -100, self._temperature, True, 1024,
        )  # fmt: skip
        value.backward()
        return value.item()


if __name__ == "__main__":
    main()
