"""Distil language models in JAX.

Importing the package imports nothing else: each name below is loaded when it is first used.
"""

import importlib
import typing

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from jaxdistill import kernels, losses, models, optim
    from jaxdistill.api import build, distill, resume
    from jaxdistill.callbacks import Callback
    from jaxdistill.config import load as load_config

_HOMES = {
    "Callback": ("jaxdistill.callbacks", "Callback"),
    "build": ("jaxdistill.api", "build"),
    "distill": ("jaxdistill.api", "distill"),
    "kernels": ("jaxdistill.kernels", None),
    "load_config": ("jaxdistill.config", "load"),
    "losses": ("jaxdistill.losses", None),
    "models": ("jaxdistill.models", None),
    "optim": ("jaxdistill.optim", None),
    "resume": ("jaxdistill.api", "resume"),
}

__all__ = [
    "Callback",
    "__version__",
    "build",
    "distill",
    "kernels",
    "load_config",
    "losses",
    "models",
    "optim",
    "resume",
]


def __getattr__(name: str) -> typing.Any:
    """Loads a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, attribute = _HOMES[name]
    module = importlib.import_module(home)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
