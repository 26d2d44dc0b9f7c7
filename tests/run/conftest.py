"""A tiny run, as a user would write it, and the folder of one that is finished."""

import pathlib

import jax
import pytest

from jaxdistill import api, config
from jaxdistill.callbacks import Callback
from jaxdistill.evaluate.held_out import HeldOut
from jaxdistill.run import participants, setup, terminal

CONFIG = """
version: 1
seed: 3
run: {{name: tiny, dir: {folder}/run}}
teacher:
  random: {{layers: 4, embed: 32, mlp: 48, heads: 4, kv_heads: 2}}
  dtype: float32
student: {{from: teacher, every: 2, compute_dtype: float32}}
tokenizer: {{from: bytes}}
data:
  train: [{{path: {data}/train.txt, format: paragraphs}}]
  eval: [{{path: {data}/eval.txt, format: paragraphs}}]
  seq_len: 32
  cache_dir: {data}/cache
method: {{name: kd, alpha: 0.3, temperature: {{schedule: linear, start: 1.0, end: 2.0}}}}
optimizer: {{lr: 1e-2, warmup: 2, weight_decay: 0.0}}
train: {{steps: 6, batch_size: 8, micro_batches: 1, eval_every: 3, log_every: 1}}
checkpoint: {{every: {{steps: 3}}, keep: {{latest: 3}}}}
logging: {{progress: none, tensorboard: false}}
eval: {{max_rows: 8, samples: 0, compare: false}}
"""


def sentences(first: int, count: int) -> str:
    """Text with something to learn in it, no two paragraphs the same."""
    words = "the quick brown fox jumps over a lazy dog while nine wizards box".split()
    lines = (
        " ".join(words[(i * k + k) % len(words)] for k in range(1, 9)) + f" {i}."
        for i in range(first, first + count)
    )
    return "\n\n".join(lines)


_MAKE_MESH, _WRITE_PAGE, SPEED = setup.make_mesh, terminal.write_page, HeldOut.speed


def take_devices(patch: pytest.MonkeyPatch, count: int) -> None:
    """Runs in this process take its first devices only."""
    make = setup.make_mesh
    patch.setattr(
        setup,
        "make_mesh",
        lambda devices, **axes: make(**axes, devices=devices or jax.devices()[:count]),
    )


@pytest.fixture(scope="session", autouse=True)
def _untimed():
    """Models of a table are timed in `finished` alone: each takes a program of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOut, "speed", lambda rows, step, params: 1000.0)
        yield


@pytest.fixture(scope="module")
def plain_runs():
    """For files that are about neither meshes nor pages: one device, and no page drawn.

    A program for one device compiles in a third of the time of one for eight.
    """
    with pytest.MonkeyPatch.context() as patch:
        take_devices(patch, 1)
        patch.setattr(terminal, "write_page", lambda folder: None)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.txt").write_text(sentences(0, 120))
    (folder / "eval.txt").write_text(sentences(1000, 12))
    return folder


@pytest.fixture(scope="session")
def load_config(data):
    """(folder, overrides) -> Config."""

    def load(folder: pathlib.Path, *overrides: str) -> config.Config:
        text = CONFIG.format(folder=folder, data=data)
        return config.loads(text, "test.yaml", overrides)

    return load


class Heard(Callback):
    """Writes down what a run reports: (method, step, names of the numbers)."""

    def __init__(self):
        self.calls, self.began, self.ended = [], None, None

    def start(self, run):
        self.began = run
        return {"note": "mine"}

    def record(self, step, values):
        self.calls.append(("record", step, set(values)))

    def evaluation(self, step, values):
        self.calls.append(("evaluation", step, set(values)))

    def samples(self, step, rows):
        self.calls.append(("samples", step, len(rows)))

    def checkpoint(self, step, path):
        self.calls.append(("checkpoint", step, path))

    def end(self, ending):
        self.ended = ending


@pytest.fixture(scope="session")
def heard() -> Heard:
    """What `finished` reported to the callback that it was given."""
    return Heard()


@pytest.fixture(scope="session")
def finished(load_config, tmp_path_factory, heard) -> api.RunResult:
    """A run with everything: control, samples, table, report, a callback.

    The same whichever file asks first, also one with `plain_runs`.
    """
    folder = tmp_path_factory.mktemp("finished")
    config = load_config(folder, "eval.compare=true", "eval.samples=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", _MAKE_MESH)
        patch.setattr(terminal, "write_page", _WRITE_PAGE)
        patch.setattr(HeldOut, "speed", SPEED)
        return api.train(config, callbacks=[heard])


def models_of(loaded, mesh):
    """The models of a configuration with their parameters."""
    return participants.load_models(loaded, participants.shapes_of(loaded, mesh), mesh)
