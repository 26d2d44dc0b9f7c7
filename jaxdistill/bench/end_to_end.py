"""A tiny run on the device at hand, stopped and resumed to the same bits, and beside XLA alone."""

import contextlib
import io
import pathlib
import tempfile
from typing import Any

from jaxdistill import config as configs
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice
from jaxdistill.report import read_metrics
from jaxdistill.run import session
from jaxdistill.train.hooks import NO_HOOKS, Hooks

STEPS, STOPPED = 6, 4
_CONFIG = """
version: 1
seed: 3
run: {{name: tiny, dir: {run}}}
teacher: {{random: {{layers: 2, embed: 32, mlp: 48, heads: 4, kv_heads: 2}}, dtype: float32}}
student: {{from: teacher, every: 2, compute_dtype: {dtype}}}
tokenizer: {{from: bytes}}
data:
  train: [{{path: {data}/train.txt, format: paragraphs}}]
  eval: [{{path: {data}/eval.txt, format: paragraphs}}]
  seq_len: 32
  cache_dir: {data}/cache
method: {{name: kd, alpha: 0.3, temperature: 2.0, implementation: {implementation}}}
optimizer: {{lr: 1e-2, warmup: 2, weight_decay: 0.0}}
train: {{steps: 6, batch_size: 8, eval_every: null, log_every: 1}}
checkpoint: {{every: {{steps: 3}}, keep: {{latest: 2}}}}
logging: {{progress: none, tensorboard: false}}
eval: {{max_rows: 8, samples: 0, compare: false}}
"""


class _Interrupt(Hooks):
    """Interrupts a run in a step between two checkpoints."""

    def __init__(self):
        self._begun = 0

    def at(self, point: str) -> None:
        """Raises before step `STOPPED` is dispatched."""
        self._begun += point == "step.before"
        if self._begun == STOPPED:
            raise KeyboardInterrupt


def run(dtype: str) -> dict[str, Any]:
    """Three runs: whole, stopped and resumed, and with the losses of XLA.

    Args:
      dtype: in which the student computes.

    Returns:
      {"ok", "losses" of the steps, "resumed": whether they are the same bits, "from_xla": the
      largest relative difference, or None where XLA makes the losses anyway}.
    """
    quiet = contextlib.redirect_stdout(io.StringIO())  # what runs print is not what is measured
    with quiet, tempfile.TemporaryDirectory(prefix="jaxdistill-bench-") as name:
        folder = pathlib.Path(name)
        (folder / "train.txt").write_text(_sentences(0, 60))
        (folder / "eval.txt").write_text(_sentences(1000, 8))
        whole = _losses(folder, "whole", dtype, "auto")
        try:
            _losses(folder, "stopped", dtype, "auto", _Interrupt())
        except KeyboardInterrupt:
            pass
        else:
            raise ConfigError(f"end to end: the run was not stopped in step {STOPPED}")
        session.resume(folder / "stopped")
        resumed = whole == _recorded(folder / "stopped")
        apart = None
        if choice.choose(None, 512, dtype) != "xla":
            xla = _losses(folder, "xla", dtype, "xla")
            apart = max(abs(whole[step] / xla[step] - 1) for step in xla)
    falls = whole[STEPS] < whole[1]
    right = apart is None or apart < (1e-2 if dtype == "bfloat16" else 1e-3)
    return {
        "ok": resumed and falls and right,
        "losses": [whole[step] for step in sorted(whole)],
        "resumed": resumed,
        "from_xla": apart,
    }


def _losses(
    folder: pathlib.Path, name: str, dtype: str, implementation: str, hooks: Hooks = NO_HOOKS
) -> dict[int, float]:
    """The loss of every step of a run."""
    text = _CONFIG.format(
        run=folder / name, data=folder, dtype=dtype, implementation=implementation
    )
    session.train(configs.loads(text, "bench device"), hooks=hooks)
    return _recorded(folder / name)


def _recorded(run: pathlib.Path) -> dict[int, float]:
    records = read_metrics(run)
    return {one["step"]: one["loss/total"] for one in records if "loss/total" in one}


def _sentences(first: int, count: int) -> str:
    """Text with something to learn in it, no two paragraphs the same."""
    words = "the quick brown fox jumps over a lazy dog while nine wizards box".split()
    lines = (
        " ".join(words[(i * k + k) % len(words)] for k in range(1, 9)) + f" {i}."
        for i in range(first, first + count)
    )
    return "\n\n".join(lines)
