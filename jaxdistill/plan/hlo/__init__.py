"""What a compiled program does, read from its text: bytes, products, collectives, live buffers."""

from jaxdistill.plan.hlo.collectives import Collective, collectives
from jaxdistill.plan.hlo.products import product_flops
from jaxdistill.plan.hlo.text import Program, dims, elements, nbytes, parse
from jaxdistill.plan.hlo.traffic import KernelCall, bytes_moved, kernels

__all__ = [
    "Collective",
    "KernelCall",
    "Program",
    "bytes_moved",
    "collectives",
    "dims",
    "elements",
    "kernels",
    "nbytes",
    "parse",
    "product_flops",
]
