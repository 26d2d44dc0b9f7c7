"""One chunk of tokens: from hidden states and heads to sums of the loss and their gradients.

The products run over the whole chunk. What follows them is elementwise in the logits and sums over
the vocabulary; it runs over groups of a chunk's rows, so that on a CPU the dozen passes over a
group find it in the cache. An accelerator fuses the passes: there a group is the whole chunk.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxdistill.kernels import choice, row_loss
from jaxdistill.kernels.row_loss import Numbers, Terms, Vocabulary
from jaxdistill.kernels.softcap import soft_cap, soft_cap_slope
from jaxdistill.kernels.statistics import LOWEST, Rows

# float32 logits of one model in a group of rows: both models' fit a core's second-level cache.
_GROUP_BYTES_CPU = 2**19


class Operands(NamedTuple):
    """Everything the loss reads; a leaf that is absent is None."""

    student_hidden: Array
    student_head: Array
    student_bias: Array | None
    teacher_hidden: Array | None
    teacher_head: Array | None
    teacher_bias: Array | None
    labels: Array | None
    weights: Array
    alpha: Array
    temperature: Array  # [] or [N]
    parameters: tuple[Array, ...]
    taid_t: Array | None
    smoothing: Array | None
    monitor: Array | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call.

    Attributes:
      terms: of the loss.
      chunk: tokens whose logits exist at one time on a device.
      group: rows of a chunk that the elementwise part takes at one time; divides chunk.
      tile: what a device's part of the vocabulary is padded to a multiple of.
      vocab: V, of all devices together and without padding.
      softcaps: of the student's and the teacher's logits, None for none.
      statistics: the implementation of the row statistics, see `choice`.
      logits_dtype: of the products' results.
    """

    terms: Terms
    chunk: int
    group: int
    tile: int
    vocab: int
    softcaps: tuple[float | None, float | None]
    statistics: str
    logits_dtype: DTypeLike


class Wanted(NamedTuple):
    """Which gradients a forward pass has to make on its way."""

    hidden: bool = False
    head: bool = False
    bias: bool = False
    temperature: bool = False

    @property
    def slope(self) -> bool:
        """Whether d loss / d logits is needed."""
        return self.hidden or self.head or self.bias


def group_size(chunk: int, vocab: int, platform: str) -> int:
    """Rows per group: the largest divisor of `chunk` within the cache's share on a CPU."""
    if platform != "cpu":
        return chunk
    most = max(1, _GROUP_BYTES_CPU // (4 * vocab))
    return max(size for size in range(1, min(most, chunk) + 1) if chunk % size == 0)


def run(
    plan: Plan, wanted: Wanted, x: Operands, vocabulary: Vocabulary
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums over the chunk's tokens, and the gradients of the summed loss that are wanted."""
    # A token of weight 0 may hold anything, NaN included: give it harmless hidden states.
    counted = x.weights != 0
    quiet = lambda hidden: jnp.where(counted[:, None], hidden, 0)
    hidden = quiet(x.student_hidden)
    student = _logits(plan, hidden, x.student_head, x.student_bias, plan.softcaps[0], vocabulary)
    teacher = None
    if x.teacher_hidden is not None and x.teacher_head is not None:
        teacher = _logits(
            plan,
            quiet(x.teacher_hidden),
            x.teacher_head,
            x.teacher_bias,
            plan.softcaps[1],
            vocabulary,
        )
    per_row = (student, teacher, x.labels, x.weights, x.temperature if x.temperature.ndim else None)

    def one(group):
        return _group(plan, wanted, x, vocabulary, *group)

    if plan.group == plan.chunk:
        sums, slope, per_temperature = one(per_row)
    else:
        split = lambda array: array.reshape(-1, plan.group, *array.shape[1:])
        sums, slope, per_temperature = jax.lax.map(one, jax.tree.map(split, per_row))
        sums = jax.tree.map(lambda parts: jnp.sum(parts, axis=0), sums)
        slope = None if slope is None else slope.reshape(student.shape)
        if per_temperature is not None:
            per_temperature = per_temperature.reshape(-1)
    gradients = {}
    if per_temperature is not None:
        whole = x.temperature.ndim == 0
        gradients["temperature"] = jnp.sum(per_temperature) if whole else per_temperature
    if slope is not None:
        gradients |= _pull_back(plan, wanted, slope, hidden, x.student_head)
    return sums, gradients


def _logits(
    plan: Plan,
    hidden: Array,
    head: Array,
    bias: Array | None,
    softcap: float | None,
    vocabulary: Vocabulary,
) -> Array:
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[None, :]
    logits = soft_cap(logits, softcap)
    # Rounded before it is masked, so that a product may write what is kept and no float32.
    logits = logits.astype(plan.logits_dtype)
    if vocabulary.padded:
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        impossible = max(LOWEST, float(jnp.finfo(logits.dtype).min))
        logits = jnp.where(column < vocabulary.rows, logits, impossible)
    return logits


def _group(
    plan: Plan,
    wanted: Wanted,
    x: Operands,
    vocabulary: Vocabulary,
    student: Array,
    teacher: Array | None,
    labels: Array | None,
    weights: Array,
    temperature: Array | None,
) -> tuple[dict[str, Array], Array | None, Array | None]:
    """Sums over a group's rows; d loss / d logits [n, V] and d loss / d T [n] where wanted."""
    terms = plan.terms
    numbers = Numbers(
        x.alpha,
        x.temperature if temperature is None else temperature,
        x.parameters,
        x.taid_t,
        x.smoothing,
    )
    total = lambda per_token: jnp.sum(jnp.where(weights == 0, 0.0, per_token) * weights)
    row = terms.row(numbers)
    logits = row_loss.logits_of(terms, numbers, student, teacher)
    found, shown = _statistics(plan, row, numbers, logits, student, teacher, vocabulary, x.monitor)
    sums = {"count": jnp.sum(weights), "monitored": jnp.sum(weights) * shown.pop("monitored")}
    sums |= {name: total(value) for name, value in shown.items()}
    loss, slopes, by_temperature = jnp.zeros_like(weights), [], None
    if labels is not None:
        ce = row_loss.cross_entropy(numbers, logits, found, labels, vocabulary)
        sums["loss/ce"] = total(ce)
        loss += x.alpha * ce
        if wanted.slope:
            ce_slope = row_loss.cross_entropy_slope(numbers, logits, found, labels, vocabulary)
            slopes.append(x.alpha * ce_slope)
    if teacher is not None:
        read = None
        if row is not None and row.closed is None:
            read = choice.second_read(plan.statistics, terms.kind, numbers, student, teacher, found)
        value, slope, by_temperature = _pull(
            terms, wanted, row, numbers, logits, found, labels, vocabulary, read
        )
        sums["loss/divergence"] = total(value)
        if "self_z" in found:
            sums["loss/target_entropy"] = total(row_loss.target_entropy(found))
        loss += (1 - x.alpha) * value
        if slope is not None:
            slopes.append((1 - x.alpha) * slope)
        if by_temperature is not None:
            by_temperature = (1 - x.alpha) * by_temperature * weights
    elif wanted.temperature:
        by_temperature = jnp.zeros_like(weights)
    sums["loss"] = total(loss)
    slope = sum(slopes) * weights[:, None] if wanted.slope else None
    softcap = plan.softcaps[0]
    if slope is not None and softcap is not None:
        slope = slope * soft_cap_slope(logits["s"], softcap)
    return sums, slope, by_temperature


def _statistics(
    plan: Plan, row, numbers: Numbers, logits: Rows, student, teacher, vocabulary, monitor
) -> tuple[Rows, Rows]:
    """The statistics that the loss needs, and per token the metrics ("monitored" is 1 or 0)."""
    terms = plan.terms
    loss_names = row_loss.needed(terms, row, numbers.taid_t is not None)
    metric_names = row_loss.monitored(terms)

    def measure(names):
        return choice.statistics(
            plan.statistics, names, numbers, logits, student, teacher, vocabulary
        )

    one = jnp.float32(1)
    passes = plan.statistics == "xla" and choice.reads_in_passes(choice.target())
    if monitor is None or not passes:
        # A fused pass makes the metrics on its way; leaving them out would save nothing.
        found = measure(tuple(dict.fromkeys((*loss_names, *metric_names))))
        return found, row_loss.metrics(terms, found) | {"monitored": one}
    metrics = lambda: row_loss.metrics(terms, measure(metric_names)) | {"monitored": one}
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(metrics))
    return measure(loss_names), jax.lax.cond(monitor, metrics, lambda: nothing)


def _pull(
    terms: Terms,
    wanted: Wanted,
    row,
    numbers: Numbers,
    logits: Rows,
    found: Rows,
    labels,
    vocabulary,
    read,
) -> tuple[Array, Array | None, Array | None]:
    """Per token T^2 D; its slope by the student's logits [n, V] and by T [n] where wanted."""
    temperature = numbers.temperature
    scale = temperature**2 if terms.scale_by_t2 else jnp.float32(1)
    column = lambda x: x[:, None] if x.ndim else x
    if row is None:
        value, slope, by_temperature = _function(terms, numbers, logits, labels)
    else:
        value, slope_sum = row_loss.divergence(row, numbers, logits, found, vocabulary, read)
        slope = by_temperature = None
        if wanted.slope or wanted.temperature:
            slope = row_loss.divergence_slope(row, numbers, logits, found, slope_sum)
        if wanted.temperature and slope is not None:
            by_temperature = row_loss.temperature_slope(
                row, numbers, logits, found, slope, vocabulary
            )
    if by_temperature is not None:
        by_temperature = scale * by_temperature
        if terms.scale_by_t2:
            by_temperature += 2 * temperature * value
    slope = None if slope is None else column(scale / temperature) * slope
    return (
        scale * value,
        slope if wanted.slope else None,
        by_temperature if wanted.temperature else None,
    )


def _function(
    terms: Terms, numbers: Numbers, logits: Rows, labels: Array | None
) -> tuple[Array, Array, Array]:
    """A divergence that is a function of whole rows, and its slopes by u = s / T and by T."""
    k = 1 / numbers.temperature
    column = k[:, None] if k.ndim else k
    drawn_to = logits["z" if "z" in logits else "t"]
    kind = terms.kind
    assert callable(kind), "a named kind has a row"
    evaluate = lambda s, z: kind(s, z, labels)
    value, pull = jax.vjp(evaluate, logits["s"] * column, drawn_to * column)
    by_student, by_teacher = pull(jnp.ones_like(value))
    moved = jnp.sum(by_student * logits["s"] + by_teacher * drawn_to, axis=1)
    return value, by_student, -moved * k**2


def _pull_back(
    plan: Plan, wanted: Wanted, slope: Array, hidden: Array, head: Array
) -> dict[str, Array]:
    """From d/d logits to hidden states, head and bias."""
    gradients = {}
    narrow = slope.astype(hidden.dtype)
    if wanted.hidden:
        by_hidden = jnp.einsum("nv,vd->nd", narrow, head, preferred_element_type=jnp.float32)
        # Devices that share the vocabulary add their parts before rounding.
        gradients["student_hidden"] = (
            by_hidden if plan.terms.axes else by_hidden.astype(hidden.dtype)
        )
    if wanted.head:
        gradients["student_head"] = jnp.einsum(
            "nv,nd->vd", narrow, hidden, preferred_element_type=jnp.float32
        )
    if wanted.bias:
        gradients["student_bias"] = jnp.sum(slope, axis=0)
    return gradients
