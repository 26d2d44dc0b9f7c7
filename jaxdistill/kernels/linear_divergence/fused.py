"""The fused form of `linear_divergence`: a gradient of its own, made on the way forward."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels.linear_divergence.chunk import Operands, Static, WantedGradients
from jaxdistill.kernels.linear_divergence.mesh import Layout, on_mesh, padded
from jaxdistill.kernels.operands import Coefficients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss_sums(static: tuple[Static, Layout], operands: Operands) -> dict[str, Array]:
    """Sums over the tokens by name: "loss", "count", "monitored" and the metrics, float32 []."""
    return _run(static, WantedGradients(), operands)[0]


def _run(static: tuple[Static, Layout], wanted: WantedGradients, operands: Operands):
    """The walk on heads that the layout divides; gradients without the padding."""
    call, place = static
    vocab = operands.student_head.shape[0]
    sums, gradients = on_mesh(call, place, wanted, padded(operands, place))
    for name in ("student_head", "student_bias"):
        if name in gradients:
            gradients[name] = gradients[name][:vocab]
    return sums, gradients


def _loss_sums_fwd(static, primals: Any):  # operands with a CustomVJPPrimal for each leaf
    operands = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    wanted = WantedGradients(
        hidden=primals.student_hidden.perturbed,
        head=primals.student_head.perturbed,
        bias=primals.student_bias is not None and primals.student_bias.perturbed,
        temperature=primals.coefficients.temperature.perturbed,
    )
    sums, gradients = _run(static, wanted, operands)
    like = operands._asdict() | operands.coefficients._asdict()
    gradients = {name: gradient.astype(like[name].dtype) for name, gradient in gradients.items()}
    # d/d alpha = CE - T^2 D, both already summed.
    zero = jnp.float32(0)
    gradients["alpha"] = sums.get("loss/ce", zero) - sums.get("loss/divergence", zero)
    return sums, (gradients, operands)


def _loss_sums_bwd(static, residuals, cotangents):
    gradients, operands = residuals
    cotangent = cotangents["loss"]
    if not isinstance(cotangent, jax.Array):  # symbolic zero: nothing depends on the loss
        return (jax.tree.map(lambda _: None, operands),)
    scaled = {
        name: (cotangent * gradient).astype(gradient.dtype) for name, gradient in gradients.items()
    }
    of: Callable[[Any], Any] = lambda fields: {name: scaled.get(name) for name in fields}
    coefficients = Coefficients(**of(Coefficients._fields))
    return (Operands(**of(Operands._fields) | {"coefficients": coefficients}),)


loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd, symbolic_zeros=True)
