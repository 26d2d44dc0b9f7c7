"""One chunk of tokens: from hidden states and heads to sums of the loss and their gradients.

The products run over the whole chunk. What follows them is elementwise in the logits and sums over
the vocabulary; it runs over groups of a chunk's rows, so that on a CPU the dozen passes over a
group find it in the cache. An accelerator fuses the passes: there a group is the whole chunk.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill.kernels import rows
from jaxdistill.sharding import AnyMesh

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
    temperature: Array
    parameters: tuple[Array, ...]


PER_TOKEN = ("student_hidden", "teacher_hidden", "labels", "weights")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call.

    Attributes:
      kind: of the divergence.
      scale_by_t2: whether it is multiplied by T^2.
      chunk: tokens whose logits exist at one time on a device.
      group: rows of a chunk that the elementwise part takes at one time; divides chunk.
      mesh: whose devices share the tokens, or None.
    """

    kind: str
    scale_by_t2: bool
    chunk: int
    group: int
    mesh: AnyMesh | None


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


def group_size(chunk: int, vocab: int, platform: str | None = None) -> int:
    """Rows per group: the largest divisor of `chunk` within the cache's share on a CPU."""
    if (platform or jax.default_backend()) != "cpu":
        return chunk
    most = max(1, _GROUP_BYTES_CPU // (4 * vocab))
    return max(size for size in range(1, min(most, chunk) + 1) if chunk % size == 0)


def run(plan: Plan, wanted: Wanted, x: Operands) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums over the chunk's tokens, and the gradients of the summed loss that are wanted."""
    # A token of weight 0 may hold anything, NaN included: give it harmless hidden states.
    counted = x.weights != 0
    quiet = lambda hidden: jnp.where(counted[:, None], hidden, 0)
    hidden = quiet(x.student_hidden)
    student_logits = _logits(hidden, x.student_head, x.student_bias)
    teacher_logits = None
    if x.teacher_hidden is not None and x.teacher_head is not None:
        teacher_logits = _logits(quiet(x.teacher_hidden), x.teacher_head, x.teacher_bias)
    per_row = (student_logits, teacher_logits, x.labels, x.weights)

    def one(group):
        return _group(plan, wanted, x, *group)

    if plan.group == plan.chunk:
        sums, slope = one(per_row)
    else:
        split = lambda array: array.reshape(-1, plan.group, *array.shape[1:])
        sums, slope = jax.lax.map(one, jax.tree.map(split, per_row))
        sums = jax.tree.map(lambda parts: jnp.sum(parts, axis=0), sums)
        slope = None if slope is None else slope.reshape(student_logits.shape)
    gradients = {"temperature": sums.pop("temperature")} if wanted.temperature else {}
    if slope is not None:
        gradients |= _pull_back(wanted, slope, hidden, x.student_head)
    return sums, gradients


def _logits(hidden: Array, head: Array, bias: Array | None) -> Array:
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)[None, :]


class _Softmax(NamedTuple):
    """Logits of one model and what turns them into log-probabilities.

    Maximum and log-sum stay two numbers: added into one, logits of 300 would cost the
    log-probabilities their last five bits.
    """

    logits: Array  # [n, V] float32
    top: Array  # [n, 1] their maximum
    log_sum: Array  # [n, 1] logsumexp of logits - top
    log_sum_t: Array  # [n, 1] logsumexp of (logits - top) / T
    cold: Array  # [] 1 / T

    @property
    def log_probs(self) -> Array:
        """log softmax(logits), [n, V]."""
        return (self.logits - self.top) - self.log_sum

    @property
    def log_probs_t(self) -> Array:
        """log softmax(logits / T), [n, V]."""
        return (self.logits - self.top) * self.cold - self.log_sum_t


def _softmax(logits: Array, temperature: Array) -> _Softmax:
    cold = 1 / temperature
    top = jnp.max(logits, axis=1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=1, keepdims=True))
    log_sum_t = jnp.log(jnp.sum(jnp.exp((logits - top) * cold), axis=1, keepdims=True))
    return _Softmax(logits, top, log_sum, log_sum_t, cold)


def _group(
    plan: Plan,
    wanted: Wanted,
    x: Operands,
    student_logits: Array,
    teacher_logits: Array | None,
    labels: Array | None,
    weights: Array,
) -> tuple[dict[str, Array], Array | None]:
    """Sums over a group of rows, and d loss / d student logits [n, V] where it is wanted."""
    total = lambda per_token: jnp.sum(per_token * weights)
    student = _softmax(student_logits, x.temperature)
    sums = {"count": jnp.sum(weights), "student/entropy": total(_entropy(student))}
    loss = jnp.float32(0)
    slopes = []  # one term per part of the loss
    if labels is not None:
        at_label = jnp.take_along_axis(student_logits, labels[:, None], axis=1, mode="clip")
        sums["loss/ce"] = total((student.log_sum - (at_label - student.top))[:, 0])
        loss += x.alpha * sums["loss/ce"]
        is_label = jax.lax.broadcasted_iota(jnp.int32, student_logits.shape, 1) == labels[:, None]
        slopes.append(x.alpha * (jnp.exp(student.log_probs) - is_label))
    if teacher_logits is not None:
        teacher = _softmax(teacher_logits, x.temperature)
        sums |= _agreement(student, teacher, total)
        row = rows.make(plan.kind, *x.parameters)
        value, slope, slope_t = _divergence(plan, row, x.temperature, student, teacher)
        sums["loss/divergence"] = total(value)
        loss += (1 - x.alpha) * sums["loss/divergence"]
        slopes.append((1 - x.alpha) * slope)
        if wanted.temperature:
            sums["temperature"] = (1 - x.alpha) * total(slope_t)
    elif wanted.temperature:
        sums["temperature"] = jnp.float32(0)
    sums["loss"] = loss
    return sums, sum(slopes) * weights[:, None] if wanted.slope else None


def _entropy(model: _Softmax) -> Array:
    """-sum p log p at T = 1, [n]."""
    return -jnp.sum(jnp.exp(model.log_probs) * model.log_probs, axis=1)


def _agreement(
    student: _Softmax, teacher: _Softmax, total: Callable[[Array], Array]
) -> dict[str, Array]:
    """What is worth knowing at T = 1, from logits that exist anyway."""
    # Comparing with the maxima beats two argmax passes; a tie counts as agreement.
    same_top = jnp.any((student.logits == student.top) & (teacher.logits == teacher.top), axis=1)
    gap = teacher.log_probs - student.log_probs
    return {
        "loss/kl_t1": total(jnp.sum(jnp.exp(teacher.log_probs) * gap, axis=1)),
        "agree/top1": total(same_top),
        "teacher/entropy": total(_entropy(teacher)),
    }


def _divergence(
    plan: Plan, row: rows.Row, temperature: Array, student: _Softmax, teacher: _Softmax
) -> tuple[Array, Array, Array]:
    """Per token: T^2 D, d(T^2 D) / d student logits [n, V], and d(T^2 D) / d T."""
    log_q, log_p = student.log_probs_t, teacher.log_probs_t
    scale = temperature**2 if plan.scale_by_t2 else jnp.float32(1)
    value = jnp.sum(row.value(log_p, log_q), axis=1)
    toward = _through_softmax(row.dlogq(log_p, log_q), log_q)
    from_teacher = _through_softmax(row.dlogp(log_p, log_q), log_p)
    # u = z / T, so du/dT = -z / T^2; rows of either slope sum to 0, so shifted logits serve.
    moved = toward * (student.logits - student.top) + from_teacher * (teacher.logits - teacher.top)
    slope_t = -scale * jnp.sum(moved, axis=1) / temperature**2
    if plan.scale_by_t2:
        slope_t = slope_t + 2 * temperature * value
    return scale * value, scale / temperature * toward, slope_t


def _through_softmax(slope: Array, log_probs: Array) -> Array:
    """From d/d log-probabilities to d/d logits: g - q * sum(g)."""
    return slope - jnp.exp(log_probs) * jnp.sum(slope, axis=1, keepdims=True)


def _pull_back(wanted: Wanted, slope: Array, hidden: Array, head: Array) -> dict[str, Array]:
    """From d/d logits to hidden states, head and bias."""
    gradients = {}
    narrow = slope.astype(hidden.dtype)
    if wanted.hidden:
        gradients["student_hidden"] = jnp.einsum(
            "nv,vd->nd", narrow, head, preferred_element_type=jnp.float32
        ).astype(hidden.dtype)
    if wanted.head:
        gradients["student_head"] = jnp.einsum(
            "nv,nd->vd", narrow, hidden, preferred_element_type=jnp.float32
        )
    if wanted.bias:
        gradients["student_bias"] = jnp.sum(slope, axis=0)
    return gradients
