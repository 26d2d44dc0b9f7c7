"""Serves a model by OpenAI's protocol: `jaxdistill serve`."""

from jaxdistill.serve.command import serve

__all__ = ["serve"]
