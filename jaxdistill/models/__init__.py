"""Decoder-only language models: load, make, save and run them."""

import importlib
import typing

from jaxdistill.models.architecture import (
    DecoderConfig,
    count_non_embedding_parameters,
    count_parameters,
    forward_flops_per_token,
)
from jaxdistill.models.model import Model
from jaxdistill.models.rope import Rope

if typing.TYPE_CHECKING:
    from jaxdistill.formats.huggingface import save
    from jaxdistill.formats.loading import load, random, resolve, spec

# Doors for whoever has a model in hand. The formats import this package: they come when asked for.
_DOORS = {
    "load": "jaxdistill.formats.loading",
    "random": "jaxdistill.formats.loading",
    "resolve": "jaxdistill.formats.loading",
    "save": "jaxdistill.formats.huggingface",
    "spec": "jaxdistill.formats.loading",
}

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


def __getattr__(name: str) -> typing.Any:
    """Loads a door when it is first used (PEP 562)."""
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_DOORS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
