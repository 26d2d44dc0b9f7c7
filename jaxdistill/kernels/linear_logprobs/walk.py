"""The two walks over chunks of a device's tokens: forward for the answers, back for the gradients.

    forward   hidden [N, D] -> chunk -> logits [chunk, V] -> answers of each row
    back      hidden [N, D] -> chunk -> logits, again     -> slopes -> d hidden, d head [V, D]

A cotangent per token is known only after the whole forward pass, so the way back makes a chunk's
logits again. Losses whose weights are known beforehand need one walk: `linear_divergence`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels.groups import in_groups
from jaxdistill.kernels.linear_divergence import chunk as chunks
from jaxdistill.kernels.linear_divergence.chunk import Operands, WantedGradients
from jaxdistill.kernels.linear_divergence.walk import Gradients, Pieces, cut
from jaxdistill.kernels.linear_logprobs import rows
from jaxdistill.kernels.linear_logprobs.outputs import Call, Cotangents, Logprobs, Residuals
from jaxdistill.kernels.softcap import soft_cap_slope


def forward(call: Call, operands: Operands) -> tuple[Logprobs, Residuals]:
    """The answers of a device's tokens on its rows of the head, and what the way back needs."""
    pieces = cut(call.static, operands, call.place.vocab, {})

    def body(_, of_chunk):
        x = pieces.of(of_chunk)
        counted, _, logits = _logits(pieces, x)

        def one(group):
            logits, temperature, counted, ids = group
            temperature = x.coefficients.temperature if temperature is None else temperature
            return rows.answer(
                logits, temperature, counted, ids, pieces.operands.sets, call.top_k,
                pieces.static, pieces.shards[0],
            )  # fmt: skip

        return None, in_groups(one, pieces.static.group, (logits, _per_row(x), counted, x.ids))

    answers = jax.lax.scan(body, None, pieces.per_token)[1]
    return jax.tree.map(pieces.join, answers)


def back(
    call: Call, wanted: WantedGradients, operands: Operands, kept: Residuals, cotangents: Cotangents
) -> Gradients:
    """The wanted gradients of a device's tokens on its rows of the head, by name."""
    more = {"kept": kept, "cotangents": cotangents}
    pieces = cut(call.static, operands, call.place.vocab, more)

    def body(totals, of_chunk):
        x = pieces.of(of_chunk)
        counted, hidden, logits = _logits(pieces, x)
        softcap = pieces.static.softcaps[0]

        def one(group):
            logits, temperature, counted, ids, kept, cotangents = group
            temperature = x.coefficients.temperature if temperature is None else temperature
            slope, moved = rows.slope(
                logits, temperature, counted, ids, pieces.operands.sets, kept, cotangents,
                pieces.shards[0],
            )  # fmt: skip
            if softcap is not None:
                slope = slope * soft_cap_slope(logits.astype(jnp.float32), softcap)
            return slope, moved

        group = (logits, _per_row(x), counted, x.ids, of_chunk["kept"], of_chunk["cotangents"])
        slope, moved = in_groups(one, pieces.static.group, group)
        gradients = chunks.pull_back(pieces.static, wanted, slope, hidden, x.student_head)
        if wanted.temperature:
            scalar = x.coefficients.has_scalar_temperature
            gradients["temperature"] = jnp.sum(moved) if scalar else moved
        written = {name: gradients.pop(name) for name in list(gradients) if name not in totals}
        return {name: totals[name] + gradients[name] for name in totals}, written

    totals, written = jax.lax.scan(body, pieces.zeros(wanted), pieces.per_token)
    return pieces.finish(totals, written)


def _logits(pieces: Pieces, x: Operands) -> tuple[Array, Array, Array]:
    """Of a chunk: which tokens count, their hidden states, and logits [chunk, V]."""
    counted = x.weights != 0
    hidden = jnp.where(counted[:, None], x.student_hidden, 0)
    static = pieces.static
    logits = chunks.logits(
        static, pieces.shards[0], hidden, x.student_head, x.student_bias, static.softcaps[0]
    )
    return counted, hidden, logits


def _per_row(x: Operands) -> Array | None:
    """The temperature of each row, None where one serves all."""
    return None if x.coefficients.has_scalar_temperature else x.coefficients.temperature
