"""TRL's or Liger's log-probabilities in a process of its own, for `peer_logprobs`; it needs torch.

    python peer_logprobs_worker.py FOLDER trl|liger

Questions come as lines of JSON on standard input, and answers go back so on standard output.
"""

import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def main() -> None:
    """Answers until nobody asks."""
    peer = PeerLogprobs(pathlib.Path(sys.argv[1]), sys.argv[2])
    for line in sys.stdin:
        told = json.loads(line)
        print(json.dumps(getattr(peer, told.pop("do"))(**told)), flush=True)


def _trl() -> tuple[str, Callable[..., Any]]:
    from trl.trainer.utils import selective_log_softmax

    return "trl", lambda hidden, head, ids: selective_log_softmax(hidden @ head.T, ids)


def _liger() -> tuple[str, Callable[..., Any]]:
    from liger_kernel.chunked_loss import fused_linear_ppo as module

    function = module._ChunkedSelectiveLogProbFunction
    width = module._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    return "liger-kernel", lambda *arrays: function.apply(*arrays, None, 1.0, width)


class PeerLogprobs:
    """mean_i a_i log q_i of given tokens, and its gradients by hidden states and head.

    Args:
      folder: where arrays are exchanged.
      name: "trl" or "liger".
    """

    def __init__(self, folder: pathlib.Path, name: str):
        import torch

        self._torch, self._folder = torch, folder
        self._package, self._logprobs = {"trl": _trl, "liger": _liger}[name]()
        self._on = "cuda" if torch.cuda.is_available() else "cpu"

    def begin(self) -> dict[str, str]:
        """What it is."""
        names = ("torch", self._package)
        return {name: importlib.metadata.version(name) for name in names} | {"on": self._on}

    def answer(self, dtype: str) -> dict[str, float]:
        """The value of the arrays in the folder."""
        load = lambda name: np.load(self._folder / f"{name}.npy", allow_pickle=False)
        hidden, head = (self._torch.from_numpy(load(name)) for name in ("hidden", "head"))
        self._hold(hidden, head, dtype)
        self._ids = self._torch.from_numpy(load("ids")).long().to(self._on)
        self._advantages = self._torch.from_numpy(load("advantages")).to(self._on)
        return {"value": self._value()}

    def prepare(self, tokens: int, vocab: int, width: int, dtype: str) -> dict[str, float | None]:
        """Draws a problem, whose time does not depend on what is in it, and what a step takes."""
        torch = self._torch
        self._hold(torch.randn(tokens, width), torch.randn(vocab, width) / width**0.5, dtype)
        self._ids = torch.randint(vocab, (tokens,), device=self._on)
        self._advantages = torch.randn(tokens, device=self._on)
        self._value()
        peak = Peak(torch, self._on)
        self._value()
        return {"peak_mib": peak.mib()}

    def step(self) -> dict[str, float]:
        """Seconds of a step."""
        began = time.perf_counter()
        self._value()  # its number is on the host when it comes back
        if self._on == "cuda":
            self._torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - began}

    def _hold(self, hidden: Any, head: Any, dtype: str) -> None:
        to = {"device": self._on, "dtype": getattr(self._torch, dtype)}
        self._arrays = [array.to(**to).requires_grad_() for array in (hidden, head)]

    def _value(self) -> float:
        for array in self._arrays:
            array.grad = None
        value = (self._advantages * self._logprobs(*self._arrays, self._ids)).mean()
        value.backward()
        return value.item()


class Peak:
    """The most memory from here on beside what is held now.

    Args:
      torch: the module.
      on: "cuda" or "cpu".
    """

    def __init__(self, torch: Any, on: str):
        self._cuda = torch.cuda if on == "cuda" else None
        if self._cuda is not None:
            self._cuda.synchronize()
            self._cuda.reset_peak_memory_stats()
            self._before = self._cuda.memory_allocated()
            return
        try:  # the process's high-water mark begins anew
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        except OSError:
            self._before = None

    def mib(self) -> float | None:
        """MiB; None where nothing tells."""
        if self._cuda is not None:
            return (self._cuda.max_memory_allocated() - self._before) / 2**20
        return None if self._before is None else (_status("VmHWM") - self._before) / 2**20


def _status(name: str) -> int:
    """A size in bytes that Linux tells of this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
