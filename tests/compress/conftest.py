"""Tiny models of every family as folders, our loads of them, and calibration batches."""

import jax
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.sharding import make_mesh
from jaxdistill.train.step import place
from jaxdistill.types import Batch
from tests.models import oracle

FAMILIES = (
    "llama2",
    "llama3",
    "smollm2",
    "llama_biases",
    "mistral_window",
    "qwen2_windows",
    "qwen3",
)


def batch_of(tokens: np.ndarray, lengths: list[int] | None = None) -> Batch:
    """Rows of one document each; behind its length a row is padding."""
    rows, length = tokens.shape
    real = np.arange(length)[None] < np.asarray(lengths or [length] * rows)[:, None]
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    return Batch(
        tokens=tokens.astype(np.int32),
        targets=np.roll(tokens, -1, 1).astype(np.int32),
        mask=real & (positions < length - 1),
        positions=positions.astype(np.int32),
        segment_ids=real.astype(np.int32),
    )


@pytest.fixture(scope="session")
def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def load(tmp_path_factory, one_device):
    """(case, mesh) -> our model of it, and its Hugging Face tensors."""

    def load(case: str, mesh=None):
        raw = oracle.CASES[case]
        named = oracle.tensors(raw)
        folder = oracle.write_folder(tmp_path_factory.mktemp(case), raw, named)
        return models.load(folder, mesh=mesh or one_device, dtype="float32", tokenizer=False), named

    return load


@pytest.fixture(scope="session")
def batches(one_device):
    """(case, mesh) -> two batches, the second with padding."""

    def batches(case: str, mesh=None):
        raw = oracle.CASES[case]
        whole = batch_of(oracle.tokens(raw, 4, 12, seed=3))
        short = batch_of(oracle.tokens(raw, 4, 12, seed=4), [12, 7, 3, 0])
        return [place(batch, mesh or one_device) for batch in (whole, short)]

    return batches
