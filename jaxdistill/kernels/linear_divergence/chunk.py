"""One chunk of tokens: from hidden states and heads to sums of the loss and their gradients.

The products run over the whole chunk. What sums over the vocabulary runs over groups of a chunk's
rows, so that on a CPU the dozen passes over a group find it in the cache; an accelerator fuses the
passes, and there a group is the whole chunk. Slopes that are elementwise in the logits are one pass
over the chunk.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.kernels.columns.definition import Columns
from jaxdistill.kernels.columns.rows import ColumnRows
from jaxdistill.kernels.groups import in_groups, in_place
from jaxdistill.kernels.operands import Coefficients, LossSpec, VocabularyShard
from jaxdistill.kernels.softcap import soft_cap, soft_cap_slope
from jaxdistill.kernels.sparse.definition import SparseTeacher, silence
from jaxdistill.kernels.sparse.rows import SparseRows
from jaxdistill.kernels.statistics import LOWEST, Rows
from jaxdistill.kernels.tiling import ROWS as KERNEL_ROWS
from jaxdistill.kernels.token_loss import TokenLosses, TokenRows

# Logits of one model in a chunk: small enough to stay near a CPU's caches, large enough that a GPU
# or TPU reads heads and head gradient seldom (V = 128,256 in float32: 512 tokens).
_CHUNK_BYTES = {"cpu": 32 * 2**20}
_CHUNK_BYTES_ACCELERATOR = 2**28
_CHUNK_TOKENS = 2048  # more do not make products on an accelerator faster
_TILE_TOKENS = 128  # of a product's tile on an accelerator


class Operands(NamedTuple):
    """The arrays of a call; an absent one is None.

    Attributes:
      student_hidden: [N, D_S] or [B, L, D_S]; in a chunk [chunk, D_S].
      student_head: [V, D_S].
      student_bias: [V].
      teacher_hidden: [..., D_T].
      teacher_head: [V, D_T].
      teacher_bias: [V].
      labels: int [...].
      weights: float32 [...].
      coefficients: temperature is [] or [...].
      monitor: bool [], whether metrics are made.
      ids: int [..., K], tokens whose log-probabilities are asked for.
      known: of a teacher of whom only some tokens are known.
      sets: bool [V, M], the columns of M sets of tokens.
      columns: of the tokens that both heads have, where their vocabularies differ.
    """

    student_hidden: Array
    student_head: Array
    student_bias: Array | None
    teacher_hidden: Array | None
    teacher_head: Array | None
    teacher_bias: Array | None
    labels: Array | None
    weights: Array
    coefficients: Coefficients
    monitor: Array | None
    ids: Array | None = None
    known: SparseTeacher | None = None
    sets: Array | None = None
    columns: Columns | None = None


@dataclasses.dataclass(frozen=True)
class Static:
    """The static arguments of a call.

    Attributes:
      loss: what is computed.
      chunk: tokens whose logits exist at one time on a device.
      group: rows of a chunk that are summed at one time; divides chunk.
      tile: multiple to which a device's part of the vocabulary is padded.
      vocabularies: V of the student and of the teacher, of all devices together and without
        padding.
      softcaps: of the student's and the teacher's logits, None for none.
      implementation: of the row statistics, from `choice.choose`.
      logits_dtype: of the products' results.
      others: what becomes of columns that only one vocabulary has, of `columns.OTHERS`.
    """

    loss: LossSpec
    chunk: int
    group: int
    tile: int
    vocabularies: tuple[int, int]
    softcaps: tuple[float | None, float | None]
    implementation: str
    logits_dtype: DTypeLike
    others: str = "mask"


class WantedGradients(NamedTuple):
    """Which gradients the walk makes on its way forward."""

    hidden: bool = False
    head: bool = False
    bias: bool = False
    temperature: bool = False

    @property
    def slope(self) -> bool:
        """Whether d loss / d logits is needed."""
        return self.hidden or self.head or self.bias


def chunk_size(tokens: int, vocab: int, platform: str, itemsize: int = 4, gathered: int = 0) -> int:
    """Tokens per chunk for `tokens` local tokens: equal chunks near the platform's budget.

    An accelerator's chunks are whole tiles of its products and kernels, and may hold more tokens
    than there are: `walk` pads the last one with tokens of weight 0.

    Args:
      tokens: on this device.
      vocab: columns on this device.
      platform: of the device.
      itemsize: bytes of a logit.
      gathered: bytes of what the devices bring together for each token, however few columns each
        of them has. A CPU has them for a group of rows alone.
    """
    tokens = max(tokens, 1)  # of none there is one chunk's size, and no chunk
    budget = _CHUNK_BYTES.get(platform, _CHUNK_BYTES_ACCELERATOR)
    most = budget // (itemsize * vocab + (0 if platform == "cpu" else gathered))
    if platform == "cpu":
        pieces = -(-tokens // max(8, most))
        return min(tokens, _round_up(-(-tokens // pieces), 8))
    most = min(most, _CHUNK_TOKENS)
    tile = _TILE_TOKENS if most >= _TILE_TOKENS and tokens > KERNEL_ROWS else KERNEL_ROWS
    most = max(tile, most // tile * tile)
    return _round_up(-(-tokens // -(-tokens // most)), tile)


def whole_chunk(chunk: int, tokens: int, platform: str) -> int:
    """A chunk as asked for, at most all tokens; on a GPU whole tiles of the kernel's rows."""
    return _round_up(min(chunk, max(tokens, 1)), KERNEL_ROWS if platform == "gpu" else 1)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def run(
    static: Static,
    wanted: WantedGradients,
    x: Operands,
    shards: tuple[VocabularyShard, VocabularyShard],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums over the chunk's tokens, and the wanted gradients of the summed loss, by name.

    Args:
      static: of the call.
      wanted: which gradients.
      x: the operands of the chunk.
      shards: the student's and the teacher's columns on this device.
    """
    # A token of weight 0 may hold anything, NaN included: its hidden states become 0.
    counted = x.weights != 0
    silenced = lambda hidden: jnp.where(counted[:, None], hidden, 0)
    hidden = silenced(x.student_hidden)
    student_cap, teacher_cap = static.softcaps
    student = logits(static, shards[0], hidden, x.student_head, x.student_bias, student_cap)
    teacher = None
    if x.teacher_hidden is not None and x.teacher_head is not None:
        states = silenced(x.teacher_hidden)
        teacher = logits(static, shards[1], states, x.teacher_head, x.teacher_bias, teacher_cap)
    scalar = x.coefficients.has_scalar_temperature
    # So may its label and its own temperature: 0 * NaN must not reach a slope.
    per_row = PerRow(
        student,
        teacher,
        None if x.labels is None else jnp.where(counted, x.labels, 0),
        None if scalar else jnp.where(counted, x.coefficients.temperature, 1.0),
        None if x.known is None else silence(x.known, counted),
    )
    if static.group < static.chunk:
        # Logits are made once: the slopes would make their soft caps and casts again.
        per_row = jax.lax.optimization_barrier(per_row)
    measured, slope = _measured(static, wanted, x, per_row, shards)
    sums, gradients = _sums(measured, x.weights), {}
    if measured.by_temperature is not None:
        moved = measured.by_temperature * x.weights
        gradients["temperature"] = jnp.sum(moved) if scalar else moved
    if slope is not None:
        gradients |= pull_back(static, wanted, slope, hidden, x.student_head)
    return sums, gradients


class PerRow(NamedTuple):
    """What each row of a chunk has of its own, [n, ...]; an absent one is None."""

    student: Any
    teacher: Array | None
    labels: Array | None
    temperature: Array | None
    known: SparseTeacher | None


def _rows(
    static: Static, x: Operands, shards: tuple[VocabularyShard, VocabularyShard], of: PerRow
) -> TokenRows:
    """Some rows of a chunk."""
    coefficients = x.coefficients
    if of.temperature is not None:
        coefficients = coefficients._replace(temperature=of.temperature)
    own = (static.loss, static.implementation, coefficients, shards[0])
    own = (*own, of.student, of.teacher, of.labels)
    if of.known is not None:
        return SparseRows(*own, of.known, static.vocabularies[0])
    if x.columns is not None:
        return ColumnRows(*own, x.columns, static.others, shards[1])
    return TokenRows(*own)


class Measured(NamedTuple):
    """What rows of logits are reduced to, [n, ...] each; their slopes need no other reduction.

    Attributes:
      statistics: by name.
      losses: with the divergence as far as the slope by the logits needs it.
      metrics: by name; "monitored" is 1 or 0.
      target_entropy: of the target's distribution where it is measured, else None.
      by_temperature: d loss / d T, None where it is not asked for.
    """

    statistics: Rows
    losses: TokenLosses
    metrics: Rows
    target_entropy: Array | None
    by_temperature: Array | None


def _measured(
    static: Static,
    wanted: WantedGradients,
    x: Operands,
    per_row: PerRow,
    shards: tuple[VocabularyShard, VocabularyShard],
) -> tuple[Measured, Array | None]:
    """A chunk's rows reduced, group after group, and the weighted slopes [chunk, V] if wanted."""
    rows = functools.partial(_rows, static, x, shards)
    grouped = static.group < static.chunk
    kept = lambda rows: dataclasses.replace(rows, kept=grouped)

    def slope(rows: TokenRows, measured: Measured, weights: Array) -> Array:
        by_logits = rows.slope(measured.statistics, measured.losses) * weights[:, None]
        cap = static.softcaps[0]
        return by_logits if cap is None else by_logits * soft_cap_slope(rows.logits["s"], cap)

    if not wanted.slope or rows(per_row).elementwise:
        one = lambda group: _measure(kept(rows(group)), wanted, x.monitor)
        measured = in_groups(one, static.group, per_row)
        return measured, slope(rows(per_row), measured, x.weights) if wanted.slope else None

    def both(student: Array, group: tuple[PerRow, Array]) -> tuple[Array, Measured]:
        others, weights = group
        own = kept(rows(others._replace(student=student)))
        measured = _measure(own, wanted, x.monitor)
        done = measured.losses._replace(unscaled=None)
        return slope(own, measured, weights), measured._replace(losses=done)

    # Slopes take the place of float32 logits; a kernel reads a whole chunk's as they came.
    student = per_row.student.astype(jnp.float32) if grouped else per_row.student
    others = per_row._replace(student=None), x.weights
    by_logits, measured = in_place(both, static.group, student, others)
    return measured, by_logits


def _measure(rows: TokenRows, wanted: WantedGradients, monitor: Array | None) -> Measured:
    """Statistics, losses and metrics of rows that a cache holds, and what their slopes need."""
    statistics, metrics = _statistics(rows, monitor)
    losses = rows.losses(statistics)
    moved = rows.temperature_slope(statistics, losses) if wanted.temperature else None
    if losses.unscaled is not None:
        kept = losses.unscaled._replace(within=None)
        losses = losses._replace(unscaled=kept if wanted.slope else kept._replace(pull=None))
    entropy = rows.target_entropy(statistics) if "self_z" in statistics else None
    return Measured(statistics, losses, metrics, entropy, moved)


def _sums(measured: Measured, weights: Array) -> dict[str, Array]:
    """Sums over a chunk's tokens, by name."""
    total = lambda per_token: jnp.sum(jnp.where(weights == 0, 0.0, per_token) * weights)
    losses = measured.losses
    per_token = measured.metrics | {
        "loss/ce": losses.cross_entropy,
        "loss/divergence": losses.divergence,
        "loss/target_entropy": measured.target_entropy,
        "loss": losses.loss,
    }
    sums = {name: total(value) for name, value in per_token.items() if value is not None}
    return {"count": jnp.sum(weights)} | sums


def logits(
    static: Static,
    shard: VocabularyShard,
    hidden: Array,
    head: Array,
    bias: Array | None,
    softcap: float | None,
) -> Array:
    """hidden . head^T + bias, capped, [chunk, V]; padded columns are impossible entries."""
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[None, :]
    # Rounded before it is masked, so that a product may write what stays and no float32.
    logits = soft_cap(logits, softcap).astype(static.logits_dtype)
    if shard.padded:
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        # float16 has no LOWEST, and its least number is a possible logit.
        lowest = LOWEST if float(jnp.finfo(logits.dtype).min) <= LOWEST else -jnp.inf
        logits = jnp.where(column < shard.size, logits, lowest)
    return logits


def loss_statistics(rows: TokenRows) -> tuple[str, ...]:
    """What is measured of a chunk's rows where no metrics are made."""
    if rows.coefficients.taid_t is None or rows.divergence_row is None:
        return rows.loss_statistics()
    return (*rows.loss_statistics(), "self_z")  # of the target's entropy


def _statistics(rows: TokenRows, monitor: Array | None) -> tuple[Rows, dict[str, Array]]:
    """The statistics that the loss needs, and per token the metrics ("monitored" is 1 or 0)."""
    loss_names, metric_names = loss_statistics(rows), rows.metric_statistics()
    one = jnp.ones(len(rows.student), jnp.float32)
    if monitor is None:
        statistics = rows.measure(tuple(dict.fromkeys((*loss_names, *metric_names))))
        return statistics, rows.metrics(statistics) | {"monitored": one}
    # A branch has rows of its own: what they keep of what they made must not leave it.
    apart = lambda: dataclasses.replace(rows)

    def metrics() -> dict[str, Array]:
        own = apart()
        return own.metrics(own.measure(metric_names)) | {"monitored": one}

    none = lambda shapes: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if rows.reads_in_passes:
        nothing = none(jax.eval_shape(metrics))
        return rows.measure(loss_names), jax.lax.cond(monitor, metrics, lambda: nothing)
    # One read makes all of them; one with fewer sums makes the loss's.
    kept = jax.eval_shape(lambda: apart().measure(loss_names))

    def both() -> tuple[Rows, dict[str, Array]]:
        own = apart()
        statistics = own.measure(tuple(dict.fromkeys((*loss_names, *metric_names))))
        means = own.metrics(statistics) | {"monitored": one}
        return {name: statistics[name] for name in kept}, means

    nothing = none(jax.eval_shape(both)[1])
    return jax.lax.cond(monitor, both, lambda: (apart().measure(loss_names), nothing))


def pull_back(
    static: Static, wanted: WantedGradients, slope: Array, hidden: Array, head: Array
) -> dict[str, Array]:
    """From d loss / d logits to the gradients of hidden states, head and bias."""
    gradients = {}
    size = None
    narrow = slope.astype(hidden.dtype)
    if hidden.dtype == jnp.float16:
        # Its least number is 6e-8 and its largest 65,504: a weight of 1 / N, or a loss that is
        # scaled, would bring slopes beyond either. So each row is of size 1, and its size apart.
        size = _power_of_two(slope)
        narrow = (slope / size).astype(hidden.dtype)
    if wanted.hidden:
        by_hidden = jnp.einsum("nv,vd->nd", narrow, head, preferred_element_type=jnp.float32)
        by_hidden = by_hidden if size is None else by_hidden * size
        # Devices that share the vocabulary add their parts before rounding.
        shared = bool(static.loss.vocab_axes)
        gradients["student_hidden"] = by_hidden if shared else by_hidden.astype(hidden.dtype)
    if wanted.head:
        sized, most = hidden, None
        if size is not None:
            most = jnp.max(size)
            sized = hidden * (size / most).astype(hidden.dtype)
        by_head = jnp.einsum("nv,nd->vd", narrow, sized, preferred_element_type=jnp.float32)
        gradients["student_head"] = by_head if most is None else by_head * most
    if wanted.bias:
        gradients["student_bias"] = jnp.sum(slope, axis=0)
    return gradients


def _power_of_two(slope: Array) -> Array:
    """The power of two above each row's largest entry, [n, 1]; 1 for a row of zeros."""
    exponent = jnp.frexp(jnp.max(jnp.abs(slope), axis=1, keepdims=True))[1]
    return jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -100, 127))  # a float32 in any case
