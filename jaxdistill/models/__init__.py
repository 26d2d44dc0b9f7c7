"""Decoder-only language models: load, make, save and run them."""

from jaxdistill.formats.huggingface import save
from jaxdistill.formats.loading import load, random, resolve, spec
from jaxdistill.models.architecture import (
    DecoderConfig,
    count_non_embedding_parameters,
    count_parameters,
    forward_flops_per_token,
)
from jaxdistill.models.model import Model
from jaxdistill.models.rope import Rope

__all__ = [
    "DecoderConfig",
    "Model",
    "Rope",
    "count_non_embedding_parameters",
    "count_parameters",
    "forward_flops_per_token",
    "load",
    "random",
    "resolve",
    "save",
    "spec",
]
