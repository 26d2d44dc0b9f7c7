"""A teacher of whom only some tokens are known: the divergences, and their rows in a chunk."""

from jaxdistill.kernels.sparse.definition import KINDS, SparseKind, SparseTeacher

__all__ = ["KINDS", "SparseKind", "SparseTeacher"]
