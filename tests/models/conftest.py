"""Transformers as an oracle, for tests marked `torch`."""

import pathlib
import warnings

import numpy as np
import pytest


@pytest.fixture(scope="session")
def transformers_model():
    """A function: folder -> transformers' model in float32, every tensor of the folder used."""

    def load(folder: pathlib.Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own
            from transformers import AutoModelForCausalLM

            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype="float32", output_loading_info=True, local_files_only=True
            )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        return model.eval()

    return load


@pytest.fixture(scope="session")
def transformers_logits(transformers_model):
    """A function: (folder, tokens [B, L]) -> transformers' logits [B, L, V]."""

    def logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers_model(folder)(torch.tensor(tokens)).logits.numpy()

    return logits
