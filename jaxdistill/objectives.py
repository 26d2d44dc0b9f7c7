"""One function per method, all on one page.

An objective is a pair of pure functions, in Optax's manner:

    init(key) -> parameters of its own, trained with the student and dropped at export ({} for most)
    apply(params, student, signal, batch, knobs) -> {name: Mean}

`apply` gets the student's and the teacher's hidden states and heads, never logits, and returns sums
and counts over the batch's counted tokens; the mean named "loss" is optimised, the rest is shown.
`knobs` holds the numbers that may move during a run, by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from jaxdistill import losses
from jaxdistill.kernels.linear_divergence import linear_divergence
from jaxdistill.kernels.row_loss import Function
from jaxdistill.sharding import current_mesh
from jaxdistill.types import Batch, Mean, Outputs, TeacherSignal

# A bool among the knobs: whether the metrics at T = 1 are wanted; absent, they are.
MONITOR = "monitor"
# A mean among an objective's own: what adaptive knobs read instead of the loss.
CONTROL = "control"
Apply = Callable[[Any, Outputs, TeacherSignal, Batch, Mapping[str, Array]], dict[str, Mean]]


class Objective(NamedTuple):
    """What a method minimises.

    Attributes:
      init: key -> parameters of its own.
      apply: (params, student, signal, batch, knobs) -> named means, "loss" among them.
      knobs: names that `apply` reads from `knobs`.
      needs_teacher: whether `signal` must hold a teacher.
      student_taps: layers of the student whose outputs `apply` reads.
      teacher_taps: layers of the teacher.
      prepare: whole batch -> more knobs, made before it is split into micro-batches; or None.
    """

    init: Callable[[Array], Any]
    apply: Apply
    knobs: tuple[str, ...] = ()
    needs_teacher: bool = True
    student_taps: tuple[int, ...] = ()
    teacher_taps: tuple[int, ...] = ()
    prepare: Callable[[Batch], Mapping[str, Array]] | None = None


class Head(TypedDict, total=False):
    """How the fused head loss is computed; but for rounding the same numbers come out in any case.

    Attributes:
      vocab: how many rows of both heads are real tokens; padded rows behind them are left out.
      chunk: tokens whose logits exist at one time on a device; None chooses.
      implementation: of the row statistics, see `kernels.support`; None chooses.
      logits_dtype: in which logits are kept; None: that of the hidden states.
    """

    vocab: Required[int]
    chunk: int | None
    implementation: str | None
    logits_dtype: str | None


def sft(**head: Unpack[Head]) -> Objective:
    """Supervised fine-tuning: cross-entropy of the data, no teacher."""

    def apply(params, student, signal, batch, knobs):
        return _from_heads(head, student, None, batch, knobs, alpha=1.0)

    return Objective(_no_parameters, apply, needs_teacher=False)


def kd(
    *,
    divergence: str | Function = "forward_kl",
    parameters: tuple[float, ...] = (),
    scale_by_t2: bool = True,
    label_smoothing: float | None = None,
    **head: Unpack[Head],
) -> Objective:
    """Knowledge distillation: alpha * CE + (1 - alpha) * T^2 * D(teacher, student).

    Knobs: alpha, temperature.

    Args:
      divergence: a kind of `kernels.rows.KINDS`, `forward_kl` is KL(teacher || student); or a
        function of whole rows, such as `losses.whole_rows` makes.
      parameters: the kind's own numbers.
      scale_by_t2: multiply the divergence by T^2.
      label_smoothing: eps of the cross-entropy.
      head: see `Head`.

    Reference: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2.
    """

    def apply(params, student, signal, batch, knobs):
        return _from_heads(
            head,
            student,
            signal.outputs,
            batch,
            knobs,
            kind=divergence,
            parameters=parameters,
            alpha=knobs["alpha"],
            temperature=knobs["temperature"],
            scale_by_t2=scale_by_t2,
            label_smoothing=label_smoothing,
        )

    return Objective(_no_parameters, apply, ("alpha", "temperature"))


def taid(**head: Unpack[Head]) -> Objective:
    """TAID: alpha * CE + (1 - alpha) * KL(softmax((1 - t) sg(student) + t teacher) || student).

    The target mixes logits, the student in it is a constant, there is no temperature; t is the
    adaptive knob `optim.taid`, which reads the cross-entropy form of the loss, KL + H(target).
    Knobs: alpha, taid_t.

    Reference: Shing et al. 2025, arXiv 2501.16937, equations 2 to 5.
    """

    def apply(params, student, signal, batch, knobs):
        means = _from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], taid_t=knobs["taid_t"],
        )  # fmt: skip
        divergence, entropy = means["loss/divergence"], means["loss/target_entropy"]
        return means | {CONTROL: Mean(divergence.total + entropy.total, divergence.count)}

    return Objective(_no_parameters, apply, ("alpha", "taid_t"))


def ctkd(
    *,
    t_start: float = 1.0,
    t_range: float = 20.0,
    width: int | None = None,
    **head: Unpack[Head],
) -> Objective:
    """CTKD: the temperature is learned against the student, T = t_start + t_range sigmoid(w).

        alpha * CE + (1 - alpha) * T^2 * KL(teacher || student),    dw = reversal * d loss / dw

    `reversal` <= 0 grows from 0 to -1 on a cosine: w ascends the loss, softly at first. With
    `width` (of the student's hidden states) every token has its own T, from w . hidden + b.
    Knobs: alpha, reversal.

    Reference: Li et al. 2022, arXiv 2211.16231, equations 5 to 9.
    """

    def init(key):
        return {"temperature": losses.init_temperature_head(width)}

    def apply(params, student, signal, batch, knobs):
        w = losses.temperature_head(params["temperature"], student.hidden)
        w = losses.reverse_gradient(w, knobs["reversal"])
        temperature = losses.ctkd_temperature(w, t_start=t_start, t_range=t_range)
        means = _from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], temperature=temperature,
        )  # fmt: skip
        counted = batch.mask.astype(jnp.float32)
        shown = jax.lax.stop_gradient(jnp.sum(temperature * counted))
        return means | {"loss/temperature": Mean(shown, jnp.sum(counted))}

    return Objective(init, apply, ("alpha", "reversal"))


def hidden(
    *,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    widths: tuple[int, int],
    distance: str = "cosine",
    balanced: bool = False,
    **head: Unpack[Head],
) -> Objective:
    """Hidden states beside logits: alpha CE + (1 - alpha) T^2 KL + weight mean_k distance_k.

    distance_k compares the k-th pair of layers, the student's projected where widths differ, over
    the tokens that the loss counts. `balanced` multiplies it by the knob feature_balance.
    Knobs: alpha, temperature, feature_weight and feature_balance.

    Args:
      layers: of student and teacher, from `losses.layer_map`.
      widths: of the student's and the teacher's hidden states.
      distance: "cosine" or "mse" (of normalised states).
      balanced: whether there is a knob feature_balance.
      head: see `Head`.

    Reference: Jiao et al. 2020 (TinyBERT), arXiv 1909.10351; Sanh et al. 2019, arXiv 1910.01108.
    """
    measure = {"cosine": losses.hidden_cosine, "mse": losses.hidden_mse}[distance]
    pairs, (narrow, wide) = len(layers[0]), widths

    def init(key):
        if narrow == wide:
            return {}
        scale = narrow**-0.5
        return {"projectors": {"kernel": scale * jax.random.normal(key, (pairs, narrow, wide))}}

    def apply(params, student, signal, batch, knobs):
        means = _from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], temperature=knobs["temperature"],
        )  # fmt: skip
        ours = student.taps.astype(jnp.float32)
        if params:
            ours = jnp.einsum("kbld,kde->kble", ours, params["projectors"]["kernel"])
        distances = jnp.mean(measure(ours, signal.outputs.taps), axis=0)
        features = losses.masked_mean(distances, batch.mask)
        weight = knobs["feature_weight"] * knobs.get("feature_balance", 1.0)
        total = means["loss"].total + weight * features.total
        shown = Mean(jax.lax.stop_gradient(features.total), features.count)
        return means | {"loss": Mean(total, means["loss"].count), "loss/features": shown}

    knobs = ("alpha", "temperature", "feature_weight") + ("feature_balance",) * balanced
    return Objective(init, apply, knobs, student_taps=layers[0], teacher_taps=layers[1])


def ted(
    *,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    widths: tuple[int, int],
    **head: Unpack[Head],
) -> Objective:
    """TED: filters of both models learn the task, then the student matches the teacher's.

        stage 1: mean_k CE(head_T(f_k(h_k))), of each model's filters, f_k(h_k) of unit size
        stage 2: alpha * CE + (1 - alpha) * T^2 * KL + feature_weight * mean_k MSE(f_S,k, f_T,k)

    In stage 1 nothing flows to the student, in stage 2 nothing to the teacher's filters; that decay
    and momentum do not move them either is the optimizer's `trained`.
    Knobs: alpha, temperature, feature_weight, stage.

    Args:
      layers: of student and teacher, from `losses.layer_map`.
      widths: of the student's and the teacher's hidden states.
      head: see `Head`.

    Reference: Liang et al. 2023, arXiv 2210.01351, section 3; one head for all filters is ours.
    """
    pairs, (narrow, wide) = len(layers[0]), widths
    unit = lambda x: x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)

    def init(key):
        return {
            "student_filters": losses.init_filters(key, pairs, narrow, wide),
            "teacher_filters": losses.init_filters(key, pairs, wide),
        }

    def apply(params, student, signal, batch, knobs):
        ours, theirs = params["student_filters"], params["teacher_filters"]
        taps, wanted, mask = student.taps, signal.outputs.taps, batch.mask
        means = _from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], temperature=knobs["temperature"],
        )  # fmt: skip
        rows = signal.outputs.head[: head["vocab"]]
        fused = {"norm": unit, "chunk": head.get("chunk"), "mesh": current_mesh()}
        task = lambda own, taps: losses.ted_stage1(own, taps, rows, batch.targets, mask, **fused)
        first = lambda: task(ours, taps).total + task(theirs, wanted).total
        second = lambda: losses.ted_stage2(ours, theirs, taps, wanted, mask, normalise=True).total
        learning = knobs["stage"] < 2
        own = jax.lax.cond(learning, first, second)
        total = jnp.where(learning, own, means["loss"].total + knobs["feature_weight"] * own)
        count, shown = means["loss"].count, jax.lax.stop_gradient(own)
        on = {"loss/filters": learning, "loss/features": ~learning}
        means |= {name: Mean(shown * active, count) for name, active in on.items()}
        return means | {"loss": Mean(total, count)}

    knobs = ("alpha", "temperature", "feature_weight", "stage")
    return Objective(init, apply, knobs, student_taps=layers[0], teacher_taps=layers[1])


def step_by_step(
    *,
    explains: tuple[int, int],
    label_weight: float = 0.5,
    with_teacher: bool = False,
    **head: Unpack[Head],
) -> Objective:
    """Distilling Step-by-Step: a * L_label + (1 - a) * L_rationale, each the mean of its tokens.

    Own means, over the whole batch, keep long rationales from drowning short labels; the paper's
    L_label + lambda * L_rationale is a = 1 / (1 + lambda). Both tasks are documents of one batch,
    told apart by one token of their prompts. Each token's loss is cross-entropy, or with a teacher
    that of `kd`; knobs are then alpha and temperature.

    Args:
      explains: (place, token): a document with this token there is a rationale, any other a label.
      label_weight: a, 0 to 1.
      with_teacher: add KL(teacher || student) on the same tokens.
      head: see `Head`.

    Reference: Hsieh et al. 2023, arXiv 2305.02301, equation 3, and its code's alpha.
    """
    place, token = explains

    def is_rationale(batch: Batch) -> Array:
        index = jnp.arange(batch.tokens.shape[1])[None, :] - batch.positions + place
        index = jnp.clip(index, 0, batch.tokens.shape[1] - 1)
        return jnp.take_along_axis(batch.tokens, index, axis=1) == token

    def prepare(batch: Batch) -> dict[str, Array]:
        counted, rationale = batch.mask.astype(jnp.float32), is_rationale(batch)
        return {
            "label_tokens": jnp.sum(jnp.where(rationale, 0.0, counted)),
            "rationale_tokens": jnp.sum(jnp.where(rationale, counted, 0.0)),
        }

    def apply(params, student, signal, batch, knobs):
        told = knobs if "label_tokens" in knobs else {**knobs, **prepare(batch)}
        labels, rationales = told["label_tokens"], told["rationale_tokens"]
        each = lambda share, count: share * (labels + rationales) / jnp.maximum(count, 1.0)
        weight = jnp.where(
            is_rationale(batch), each(1 - label_weight, rationales), each(label_weight, labels)
        )
        counted = batch.mask.astype(jnp.float32)
        weighed = dataclasses.replace(batch, mask=counted * weight)
        soft = {name: knobs[name] for name in ("alpha", "temperature") if with_teacher}
        means = _from_heads(
            head, student, signal.outputs if with_teacher else None, weighed, knobs,
            **(soft or {"alpha": 1.0}),
        )  # fmt: skip
        return means | {"loss": Mean(means["loss"].total, jnp.sum(counted))}

    knobs = ("alpha", "temperature") * with_teacher
    return Objective(_no_parameters, apply, knobs, needs_teacher=with_teacher, prepare=prepare)


def _no_parameters(key: Array) -> dict:
    return {}


def _from_heads(
    head: Any,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    knobs: Mapping[str, Array],
    **options: Any,
) -> dict[str, Mean]:
    """The fused head loss over a batch of rows."""
    head = dict(head)
    vocab = head.pop("vocab")
    bias = lambda outputs: None if outputs.head_bias is None else outputs.head_bias[:vocab]
    if teacher is not None:
        options |= {
            "teacher_hidden": teacher.hidden,
            "teacher_head": teacher.head[:vocab],
            "teacher_bias": bias(teacher),
        }
    total, means = linear_divergence(
        student.hidden,
        student.head[:vocab],
        student_bias=bias(student),
        labels=batch.targets,
        mask=batch.mask,
        reduction="sum",
        monitor=knobs.get(MONITOR),
        mesh=current_mesh(),
        **head,
        **options,
    )
    count = jax.lax.stop_gradient(means["loss/ce"].count)
    return {"loss": Mean(total, count), **means}


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "kd": kd,
    "sft": sft,
    "taid": taid,
    "ctkd": ctkd,
    "hidden": hidden,
    "ted": ted,
    "step_by_step": step_by_step,
}
