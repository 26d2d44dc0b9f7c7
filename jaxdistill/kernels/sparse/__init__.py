"""A teacher of whom only some tokens are known: the divergences, and their rows in a chunk."""

from jaxdistill.kernels.sparse.definition import KINDS, Known, SparseKind

__all__ = ["KINDS", "Known", "SparseKind"]
