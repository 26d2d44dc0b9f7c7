"""The model in one hand: logits, positions of packed rows."""

import jax.numpy as jnp
import numpy as np

from jaxdistill import models
from jaxdistill.models.decoder import segment_positions
from tests.models import oracle


def test_positions_restart_with_every_segment():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3], [1] * 7])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    assert segment_positions(segments).tolist() == expected


def test_logits_are_float32_in_the_dtype_asked_for(tmp_path):
    raw = oracle.CASES["llama2"]
    model = models.load(oracle.write_folder(tmp_path / "model", raw), dtype="bfloat16")
    tokens = oracle.tokens(raw)
    rough, fine = model.logits(tokens), model.logits(tokens, compute_dtype="float32")
    assert rough.dtype == fine.dtype == jnp.float32
    assert 0 < oracle.distance(rough, fine) < 0.1
    rounded = {name: np.asarray(jnp.asarray(value, jnp.bfloat16), np.float32)
               for name, value in oracle.tensors(raw).items()}  # fmt: skip
    assert oracle.distance(fine, oracle.logits(raw, rounded, tokens)) <= 2e-5
