"""Kernels of projections that say themselves how a vector is multiplied by them."""

import abc
from typing import Any

from jax import Array
from jax.typing import DTypeLike


class Kernel(abc.ABC):
    """Stands where a projection's kernel array stands, and goes through `lax.scan` like one."""

    @abc.abstractmethod
    def dot(self, x: Array) -> Array:
        """x @ kernel, for x [..., in]."""

    @abc.abstractmethod
    def astype(self, dtype: DTypeLike) -> "Kernel":
        """The kernel as a layer computes with it."""

    @abc.abstractmethod
    def dequantized(self) -> Array:
        """The kernel as an array."""


def is_kernel(leaf: Any) -> bool:
    """Whether a leaf of the parameters is a kernel that says itself how it is multiplied."""
    return isinstance(leaf, Kernel)


def times(x: Array, kernel: Any) -> Array:
    """x @ kernel, for x [..., in] and a kernel of any kind."""
    return kernel.dot(x) if is_kernel(kernel) else x @ kernel


def array(kernel: Any) -> Array:
    """A kernel of any kind as an array."""
    return kernel.dequantized() if is_kernel(kernel) else kernel
