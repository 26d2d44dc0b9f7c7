"""The chunked form of `linear_logprobs`: a gradient of its own, from a cotangent per token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jaxdistill.kernels.linear_divergence import vjp
from jaxdistill.kernels.linear_divergence.chunk import Operands, WantedGradients
from jaxdistill.kernels.linear_divergence.mesh import (
    Layout,
    add_up,
    gradient_specs,
    operand_specs,
    padded,
)
from jaxdistill.kernels.linear_divergence.walk import Gradients
from jaxdistill.kernels.linear_logprobs import walk
from jaxdistill.kernels.linear_logprobs.outputs import Call, Cotangents, Logprobs, Residuals


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Perturbed:
    """Which gradients are asked for; known when a program is traced, so no array."""

    wanted: WantedGradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logprobs(call: Call, operands: Operands) -> Logprobs:
    """The answers of every token."""
    return _forward(call, operands)[0]


def _forward(call: Call, operands: Operands) -> tuple[Logprobs, Residuals]:
    operands = padded(operands, call.place)
    if call.place.mesh is None:
        return walk.forward(call, operands)
    local = functools.partial(walk.forward, call)
    # All that comes back is per token; absent answers are no leaves.
    return jax.shard_map(
        local,
        mesh=call.place.mesh,
        in_specs=(operand_specs(call.place, operands),),
        out_specs=call.place.per_token,
        check_vma=False,
    )(operands)


def _logprobs_fwd(call: Call, primals: Any):
    operands, wanted = vjp.of_primals(primals)
    answers, kept = _forward(call, operands)
    return answers, (operands, kept, _Perturbed(wanted))


def _logprobs_bwd(call: Call, residuals: Any, cotangents: Logprobs):
    operands, kept, perturbed = residuals
    given = Cotangents(*(_given(getattr(cotangents, name)) for name in Cotangents._fields))
    if all(cotangent is None for cotangent in given):  # nothing depends on any of them
        return (jax.tree.map(lambda _: None, operands),)
    gradients = _back(call, perturbed.wanted, operands, kept, given)
    return vjp.cotangents(vjp.cast(gradients, operands))


def _given(cotangent: Any) -> Array | None:
    """A cotangent, None where it is a symbolic zero."""
    return cotangent.astype(jnp.float32) if isinstance(cotangent, jax.Array) else None


def _back(
    call: Call, wanted: WantedGradients, operands: Operands, kept: Residuals, cotangents: Cotangents
) -> Gradients:
    """Gradients of whole arrays, without the padding of the vocabulary."""
    place: Layout = call.place
    wide = padded(operands, place)

    def local(operands: Operands, kept: Residuals, cotangents: Cotangents) -> Gradients:
        return add_up(walk.back(call, wanted, operands, kept, cotangents), operands, place)

    if place.mesh is not None:
        tokens: PartitionSpec = place.per_token
        local = jax.shard_map(
            local,
            mesh=place.mesh,
            in_specs=(operand_specs(place, wide), tokens, tokens),
            out_specs=gradient_specs(place, wanted, wide),
            check_vma=False,
        )
    return vjp.without_padding(local(wide, kept, cotangents), operands)


logprobs.defvjp(_logprobs_fwd, _logprobs_bwd, symbolic_zeros=True)
