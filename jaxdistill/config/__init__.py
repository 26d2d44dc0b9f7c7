"""The Config tree: load, override, validate, explain."""

from jaxdistill.config.keys import explain
from jaxdistill.config.loader import dump, load, loads, read
from jaxdistill.config.schema import Config

__all__ = ["Config", "dump", "explain", "load", "loads", "read"]
