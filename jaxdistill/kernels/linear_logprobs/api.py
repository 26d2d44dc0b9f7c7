"""`linear_logprobs`: log-probabilities, entropy and masses of sets from hidden states and a head.

For every token i with logits s = cap(h W^T + b) and q = softmax(s / T), numbers of its own, each
with a gradient by its own cotangent. Logits exist for one chunk of tokens at a time; the way back
makes them again.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxdistill.errors import ConfigError
from jaxdistill.kernels import checks, choice, operands
from jaxdistill.kernels.linear_divergence import arguments
from jaxdistill.kernels.linear_divergence.chunk import Operands
from jaxdistill.kernels.linear_divergence.mesh import layout
from jaxdistill.kernels.linear_logprobs import fused
from jaxdistill.kernels.linear_logprobs.outputs import Call, Logprobs
from jaxdistill.kernels.linear_logprobs.reference import reference
from jaxdistill.kernels.linear_logprobs.sets import Sets, columns_of
from jaxdistill.kernels.operands import Coefficients, LossSpec
from jaxdistill.kernels.sparse.checks import check_ids
from jaxdistill.sharding import AnyMesh


def linear_logprobs(
    hidden: ArrayLike,
    head: ArrayLike,
    ids: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    sets: Sets | None = None,
    top_k: int = 0,
    temperature: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    logits_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    mesh: AnyMesh | None = None,
    vocab_axes: str | Sequence[str] = (),
) -> Logprobs:
    """What softmax(cap(h W^T + b) / T) says of each token, exact in value and gradient.

        logprobs      log q_id                          log_sum_exp   log sum_v e^(s_v / T)
        entropy       -sum_v q_v log q_v                log_masses    log sum_{v in S} q_v

    The largest temporary is a few arrays of [chunk, V]. Each number may have its own cotangent: a
    ratio to an old log-probability times an advantage, a sum over the tokens of a word. A loss
    whose token weights are known beforehand is cheaper by `linear_divergence`, which makes its
    gradient on the way forward. Matrix products take the dtype of the hidden states, the rest is
    float32. It has reverse mode alone (grad, vjp, both under vmap and twice): no jvp.

    Args:
      hidden: [N, D] or [B, L, D], after the final norm; so are all that is per token.
      head: [V, D]; cast to the dtype of the hidden states for the products, its gradient is
        accumulated in float32.
      ids: [N] or [N, K] of any integer type, tokens whose log-probability is asked for; a negative
        one is none and gives 0, one of V or more is refused, or NaN where it is traced.
      mask: bool or float [N]; a token of weight 0 gives 0, -1 in place of a token, and has gradient
        0, whatever its hidden states hold. Other weights are all the same.
      sets: M sets of tokens, the same for all rows: each the ascending ids of its tokens, or a
        bool [V]; or all as bool [M, V]. They may overlap. A set that differs by token, such as what
        a sampler kept: give its tokens as `ids` and take logsumexp of their log-probabilities where
        ids >= 0, as the example in jaxdistill/README.md does.
      top_k: how many of the most likely tokens to return.
      temperature: T > 0, one number or [N]; may be traced and differentiated.
      bias: [V] added to the logits, or None.
      softcap: c, of logits c tanh(x / c), as Gemma has them; None for none.
      chunk: tokens per chunk and device; default from V and the device.
      logits_dtype: of a chunk's logits in memory; default float32. bfloat16 halves them, and rounds
        each to 3 digits: a log-probability at logits of 20 is then off by up to 0.12 nats, as one
        that rounds down beside one that rounds up.
      implementation: of the row statistics, see `kernels.support`; None takes the best that runs.
        "reference" is the definition itself, with all logits [N, V] in memory.
      mesh: with axes data, fsdp, tensor, context: their devices share the tokens, or the rows of
        the head where that moves less.
      vocab_axes: inside a shard_map of your own (check_vma=False), with `mesh` None: its axes that
        share the head's rows. `ids` count over all rows; `sets` are then bool [M, rows here]. The
        gradient of an array that other devices hold too is this device's part: add the parts with
        psum.

    Returns:
      `Logprobs`.

    Raises:
      ConfigError: for shapes that do not fit, ids beyond the vocabulary, a set that is empty, not
        ascending or not of different tokens, top_k outside 0 to V, a temperature that is not
        positive where a token counts, or axes that the mesh does not have. Numbers that are traced
        are not looked at: of a traced set an id counts once, one that is no token is left out, and
        a set of none has the log-mass -inf, without a gradient.

    >>> import jax.numpy as jnp
    >>> head = jnp.log(jnp.array([[0.5, 0.3, 0.2]])).T
    >>> said = linear_logprobs(jnp.ones((1, 1)), head, jnp.array([1]), sets=[[1, 2]])
    >>> print(said.logprobs.round(4), said.entropy.round(4), said.log_masses.round(4), said.argmax)
    [-1.204] [1.0297] [[-0.6931]] [0]

    Reference: Wijmans et al. 2024 (Cut Your Losses), arXiv 2411.09009, section 4, for logits that
    are made again on the way back.
    """
    arrays = arguments.arrays(hidden, head, bias)
    dims, vocab = arrays[0].shape[:-1], arrays[1].shape[0]
    axes = arguments.vocabulary_axes(vocab_axes, implementation)
    whole = vocab * (jax.lax.axis_size(axes) if axes else 1)
    weights = operands.per_token(None, mask, dims)[1]
    some = checks.counted(dims, mask)
    tokens = _ids(ids, dims, whole, some)
    checks.temperature(temperature, dims, some)
    checks.softcap("softcap", softcap)
    checks.whole("top_k", top_k, 0, whole)
    arguments.check_pieces(chunk, logits_dtype, None)
    # Of bfloat16 a log-probability would be off by 0.4 % of its logit: too much for a ratio of two.
    logits_dtype = logits_dtype or jnp.promote_types(arrays[0].dtype, jnp.float32)
    temperature = jnp.asarray(temperature, jnp.float32)
    if temperature.ndim:  # what is under the mask may be anything: 0 * NaN must not reach a slope
        temperature = jnp.where(weights == 0, 1.0, temperature)
    x = Operands(
        *arrays,
        teacher_hidden=None,
        teacher_head=None,
        teacher_bias=None,
        labels=None,
        weights=weights,
        coefficients=Coefficients(jnp.float32(0), temperature),
        monitor=None,
        ids=tokens,
        sets=None if sets is None else columns_of(sets, vocab, bool(axes)),
    )
    if implementation == choice.REFERENCE:
        said = reference(x, top_k, softcap, jnp.dtype(logits_dtype))
    else:
        operands.check_manual_axes(x)
        place = layout(mesh, dims, vocab, False, axes)
        loss = LossSpec(None, labels=False, vocab_axes=place.vocab)
        static = arguments.static(
            x, place, loss, (softcap, None), chunk, logits_dtype, implementation
        )
        said = fused.logprobs(Call(static, place, top_k), x)
    if said.logprobs is not None and np.ndim(ids) == len(dims):
        said = said._replace(logprobs=said.logprobs[..., 0])
    return said


def _ids(
    ids: ArrayLike | None, dims: tuple[int, ...], vocab: int, some: np.ndarray | None
) -> Array | None:
    """Tokens as int [..., K]; `some` of them have a weight."""
    if ids is None:
        return None
    tokens = checks.indices("ids", ids)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ConfigError(f"ids are {tokens.dtype}: they must be integers, the index of a token")
    if tokens.shape == dims:
        tokens = tokens[..., None]
    if tokens.shape[:-1] != dims or tokens.ndim != len(dims) + 1 or not tokens.shape[-1]:
        raise ConfigError(
            f"ids {list(np.shape(ids))}: must be {list(dims)} or {[*dims, 'K']}, K at least 1, as "
            "the hidden states have it"
        )
    if some is not None and not isinstance(tokens, jax.core.Tracer):
        check_ids("ids", np.asarray(tokens)[some], vocab, different=False)
    return tokens
