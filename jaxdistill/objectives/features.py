"""Methods that compare what goes on inside: hidden states, TED's filters, MiniLM's relations."""

from typing import Unpack

import jax
import jax.numpy as jnp

from jaxdistill import losses
from jaxdistill.objectives.base import Head, Objective, from_heads, no_parameters
from jaxdistill.sharding import current_mesh
from jaxdistill.types import Mean


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
        means = from_heads(
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
        means = from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], temperature=knobs["temperature"],
        )  # fmt: skip
        rows = signal.outputs.head[: head["vocab"]]
        fused = {"norm": unit, "chunk": head.get("chunk"), "mesh": current_mesh()}
        fused["student_softcap"] = signal.outputs.softcap
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


def minilm(
    *,
    layers: tuple[int, int],
    heads: int,
    **head: Unpack[Head],
) -> Objective:
    """MiniLMv2: how tokens relate in one layer, whatever the models' widths and heads.

        alpha * CE + (1 - alpha) * T^2 * KL + feature_weight * (R_Q + R_K + R_V) / 3
        R_X = mean over heads and tokens of KL(softmax(X_T X_T^T / sqrt d) || the student's)

    X: queries, keys or values of the layer, before rotation, split into `heads` relation heads of
    width d. A token relates to those it sees: those before it in its own document (ours; the paper
    is about encoders). Knobs: alpha, temperature, feature_weight.

    Args:
      layers: of student and teacher, from 0.
      heads: relation heads; must divide the widths of queries, keys and values of both models.
      head: see `Head`.

    Reference: Wang et al. 2021, arXiv 2012.15828, section 3.
    """

    def apply(params, student, signal, batch, knobs):
        means = from_heads(
            head, student, signal.outputs, batch, knobs,
            alpha=knobs["alpha"], temperature=knobs["temperature"],
        )  # fmt: skip
        pairs = zip(student.relations[0], signal.outputs.relations[0], strict=True)
        each = [losses.relation_kl(s, t, batch.segment_ids, heads=heads) for s, t in pairs]
        features = losses.masked_mean(sum(each) / len(each), batch.mask)
        total = means["loss"].total + knobs["feature_weight"] * features.total
        shown = Mean(jax.lax.stop_gradient(features.total), features.count)
        return means | {"loss": Mean(total, means["loss"].count), "loss/features": shown}

    return Objective(
        no_parameters,
        apply,
        ("alpha", "temperature", "feature_weight"),
        student_relations=layers[:1],
        teacher_relations=layers[1:],
    )
