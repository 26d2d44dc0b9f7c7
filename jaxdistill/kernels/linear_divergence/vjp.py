"""What the gradients of both operations on a head share: primals apart, cotangents by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from jaxdistill.kernels.linear_divergence.chunk import Operands, WantedGradients
from jaxdistill.kernels.operands import Coefficients


def of_primals(primals: Any) -> tuple[Operands, WantedGradients]:
    """The operands, and which gradients are wanted, of a CustomVJPPrimal for each leaf."""
    operands = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    wanted = WantedGradients(
        hidden=primals.student_hidden.perturbed,
        head=primals.student_head.perturbed,
        bias=primals.student_bias is not None and primals.student_bias.perturbed,
        temperature=primals.coefficients.temperature.perturbed,
    )
    return operands, wanted


def cast(gradients: Mapping[str, Array], operands: Operands) -> dict[str, Array]:
    """Gradients by name in the dtypes of what they are gradients by."""
    like = operands._asdict() | operands.coefficients._asdict()
    return {name: gradient.astype(like[name].dtype) for name, gradient in gradients.items()}


def without_padding(gradients: Mapping[str, Array], operands: Operands) -> dict[str, Array]:
    """Gradients by name, those of the head without the rows that `mesh.padded` added."""
    vocab, of_head = operands.student_head.shape[0], ("student_head", "student_bias")
    return {name: one[:vocab] if name in of_head else one for name, one in gradients.items()}


def cotangents(gradients: Mapping[str, Array]) -> tuple[Operands]:
    """What a backward pass returns: None where there is no gradient of that name."""
    of: Callable[[Any], Any] = lambda fields: {name: gradients.get(name) for name in fields}
    coefficients = Coefficients(**of(Coefficients._fields))
    return (Operands(**of(Operands._fields) | {"coefficients": coefficients}),)
