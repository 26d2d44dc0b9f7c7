"""The fused form of `linear_divergence`: a gradient of its own, made on the way forward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels.linear_divergence import vjp
from jaxdistill.kernels.linear_divergence.chunk import Operands, Static, WantedGradients
from jaxdistill.kernels.linear_divergence.mesh import Layout, on_mesh, padded


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss_sums(static: tuple[Static, Layout], operands: Operands) -> dict[str, Array]:
    """Sums over the tokens by name: "loss", "count", "monitored" and the metrics, float32 []."""
    return _run(static, WantedGradients(), operands)[0]


def _run(static: tuple[Static, Layout], wanted: WantedGradients, operands: Operands):
    """The walk on heads that the layout divides; gradients without the padding."""
    call, place = static
    sums, gradients = on_mesh(call, place, wanted, padded(operands, place))
    return sums, vjp.without_padding(gradients, operands)


def _loss_sums_fwd(static, primals: Any):
    operands, wanted = vjp.of_primals(primals)
    sums, gradients = _run(static, wanted, operands)
    gradients = vjp.cast(gradients, operands)
    # d/d alpha = CE - T^2 D, both already summed.
    zero = jnp.float32(0)
    gradients["alpha"] = sums.get("loss/ce", zero) - sums.get("loss/divergence", zero)
    return sums, (gradients, operands)


def _loss_sums_bwd(static, residuals, cotangents):
    gradients, operands = residuals
    cotangent = cotangents["loss"]
    if not isinstance(cotangent, jax.Array):  # symbolic zero: nothing depends on the loss
        return (jax.tree.map(lambda _: None, operands),)
    return vjp.cotangents(
        {name: (cotangent * one).astype(one.dtype) for name, one in gradients.items()}
    )


loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd, symbolic_zeros=True)
