"""The one compiled training step: teacher, student, loss, gradient and update in a single jit.

    step(state, teacher_params, batch) -> (state, {name: Mean})

The state is donated and comes back changed; the teacher's parameters go in and never come out.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxdistill import optim, xla_options
from jaxdistill.compress import quantize
from jaxdistill.kernels import choice
from jaxdistill.losses import load_balancing
from jaxdistill.methods import CONTROL, MONITOR, Objective, routed
from jaxdistill.methods.routed import Routed
from jaxdistill.models import DecoderConfig, decoder
from jaxdistill.models.lora import Lora
from jaxdistill.models.quantized import Quantization
from jaxdistill.sharding import (
    GATHERED,
    RULES,
    MeshAxes,
    batch_sharding,
    local_rows,
    row_parts,
)
from jaxdistill.teachers import TeacherFunction
from jaxdistill.train import once
from jaxdistill.train.state import TrainState, whole
from jaxdistill.types import Batch, Mean, Outputs

# Whose work an operation of the compiled step is: part of its name, for profiles and `plan`.
TEACHER, STUDENT, LOSS, OPTIMIZER = "teacher", "student", "loss", "optimizer"

StepFunction = Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Mean]]]
Loss = Callable[..., dict[str, Mean]]  # see `make_loss`


def make_loss(
    config: DecoderConfig,
    objective: Objective,
    *,
    compute_dtype: DTypeLike = jnp.bfloat16,
    remat: str = "none",
    attention: str | None = None,
    rules: Mapping[str, MeshAxes] = RULES,
    quantization: Quantization | None = None,
    router_aux_loss_coef: float = 0.0,
) -> Loss:
    """loss(params, signal, batch, knobs) -> named means, of the student `params["student"]`.

    It takes `rules` as well, in place of these. With `quantization` the student computes as it will
    once it is quantised so; with `router_aux_loss_coef` the load-balancing loss of its routed
    experts is added to the objective.
    """

    def loss(params, signal, batch, knobs, rules=rules):
        student = params["student"]
        with jax.named_scope(STUDENT):
            outputs = decoder.apply(
                config,
                student if quantization is None else quantize.aware(student, quantization),
                batch.tokens,
                batch.positions,
                batch.segment_ids,
                compute_dtype=compute_dtype,
                remat=remat,
                attention=attention,
                rules=rules,
                taps=objective.student_taps,
                relations=objective.student_relations,
                routing=router_aux_loss_coef > 0,
            )
        with jax.named_scope(LOSS):
            means = objective.apply(params["objective"], outputs, signal, batch, knobs)
            if router_aux_loss_coef:
                means |= _balanced(config, means["loss"], outputs, batch, router_aux_loss_coef)
            return means

    return loss


def _balanced(
    config: DecoderConfig, loss: Mean, outputs: Outputs, batch: Batch, weight: float
) -> dict[str, Mean]:
    """The loss with the load-balancing loss of this part of the batch, and that by itself.

    It is no mean over tokens but a product of two: of several micro-batches each has its own.
    """
    assert config.experts is not None and outputs.routing is not None, "checked before"
    value = load_balancing(outputs.routing, config.experts.chosen, batch.segment_ids > 0)
    count = jax.lax.stop_gradient(loss.count)
    routing = Mean(value * count, count)
    return {"loss": Mean(loss.total + weight * routing.total, loss.count), "loss/routing": routing}


def make(
    loss: Loss,
    teacher: TeacherFunction | Routed,
    tx: optax.GradientTransformationExtraArgs,
    *,
    micro_batches: int = 1,
    monitor: Callable[[Array], Array] | None = None,
    prepare: Callable[[Batch], Mapping[str, Array]] | None = None,
    adapters: Lora | None = None,
    offload: bool = False,
    ahead: bool = False,
    gather: Callable[[Any], Any] | None = None,
) -> StepFunction:
    """The step as a pure function; `compiled` makes it a program for a mesh.

    The loss of a batch is the sum over its counted tokens divided once by their number, so that it
    does not depend on how the batch is split. A step whose loss or gradient is not finite changes
    neither parameters nor optimizer state; it is counted, and its batch is spent.

    Args:
      loss: from `make_loss`.
      teacher: from `teachers`; or several, whose parameters come by name: every micro-batch is then
        of one of them, see `data.routes.MicroBatchLayout`.
      tx: the optimizer's chain; its extra argument `value` receives what the objective calls its
        control, else the loss, `metrics` all means, and `gradients` the gradients themselves.
      micro_batches: parts a batch is computed in, one after the other; must divide its rows.
      monitor: number of a step, from 1 -> whether its metrics at T = 1 are wanted, such as
        `recorded`; the others count no tokens. None makes them in every step.
      prepare: of the objective: whole batch -> more knobs; or None.
      adapters: of the student, which are all of it that is trained; None trains all of it.
      offload: the optimizer's moments come from host memory; the state's sharding takes them back.
      ahead: the teacher, which is one, reads the whole batch before the first micro-batch.
      gather: brings the student's layers together before the first micro-batch, see
        `once.gathered`.
    """
    if micro_batches == 1:
        ahead, gather = False, None  # once as it is
    if gather is not None:
        loss = functools.partial(loss, rules=GATHERED)

    def step(state: TrainState, teacher_params: Any, batch: Batch):
        knobs = optim.knobs(state.opt_state)
        inputs = knobs if monitor is None else knobs | {MONITOR: monitor(state.step + 1)}
        if prepare is not None:
            inputs = {**inputs, **prepare(batch)}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        given, frozen = _gathered(gather, state, adapters)

        def sums(one: TeacherFunction, its_params: Any, part: Batch, number: Any):
            # The teacher runs outside of value_and_grad: nothing of it is kept for a backward pass.
            with jax.named_scope(TEACHER):
                signal = one(its_params, state, part)
            dropout = jax.random.fold_in(key, number)

            def total(params):
                student = whole(params, frozen, adapters, dropout)
                means = loss(student, signal, part, inputs)
                return means["loss"].total, means

            (_, means), gradients = jax.value_and_grad(total, has_aux=True)(given)
            return means, gradients

        if ahead:
            with jax.named_scope(TEACHER):
                of_part, rows = once.told_before(teacher, teacher_params, state, batch, sums)
        else:
            of_part, rows = routed.asked(teacher, teacher_params, batch, sums), batch
        means, gradients = _over_micro_batches(of_part, rows, micro_batches)
        tokens = jnp.maximum(means["loss"].count, 1)
        gradients = jax.tree.map(lambda g: g / tokens.astype(g.dtype), gradients)
        # What adaptive knobs read: of the whole batch, all devices and micro-batches.
        control = means.pop(CONTROL, means["loss"]).value
        norm = optax.tree_utils.tree_norm(gradients)
        new = _updated(tx, state, gradients, means, control, norm, offload)
        means["loss/total"] = means.pop("loss")
        reported = {f"knobs/{name}": knob for name, knob in knobs.items()}
        reported |= {
            "optim/grad_norm": norm,
            "guard/in_a_row": new.skipped[0],
            "guard/skipped": new.skipped[1],
        }
        reported |= routed.numbers(teacher, batch)
        return new, means | {name: _single(value) for name, value in reported.items()}

    return step


def _gathered(
    gather: Callable[[Any], Any] | None, state: TrainState, adapters: Lora | None
) -> tuple[Any, Any]:
    """(what is trained, what is frozen), with the student's layers as `gather` brings them."""
    if gather is None:
        return state.params, state.frozen
    with jax.named_scope(STUDENT):
        if adapters is not None:
            return state.params, gather(state.frozen)
        return {**state.params, "student": gather(state.params["student"])}, state.frozen


def _updated(
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    gradients: Any,
    means: Mapping[str, Mean],
    control: Array,
    norm: Array,
    offload: bool,
) -> TrainState:
    """The state after an update, or the same but for its counters where a number is not finite."""
    # Each is a sum over all devices and micro-batches: all of them decide alike.
    finite = jnp.isfinite(means["loss"].value) & jnp.isfinite(norm) & jnp.isfinite(control)
    values = {name: mean.value for name, mean in means.items()}
    with jax.named_scope(OPTIMIZER):
        # Moments are fetched where they are used, behind the backward pass: XLA places the copies.
        before = state.opt_state
        before = jax.device_put(before, jax.memory.Space.Device) if offload else before
        updates, opt_state = tx.update(
            gradients, before, state.params, value=control, metrics=values, gradients=gradients
        )
        params = optax.apply_updates(state.params, updates)
    in_a_row, altogether = state.skipped
    bad = jnp.where(finite, 0, 1)
    return TrainState(
        step=state.step + 1,
        params=_chosen(finite, params, state.params),
        opt_state=_chosen(finite, opt_state, before),
        key=state.key,
        skipped=jnp.stack([(in_a_row + 1) * bad, altogether + bad]),
        frozen=state.frozen,
    )


def recorded(every: int, last: int) -> Callable[[Any], Any]:
    """Which steps a run records: the first, every `every`-th and the last; for ints and arrays."""
    return lambda number: (number % every == 0) | (number == 1) | (number == last)


def compiled(step: StepFunction, state: Any, teacher_params: Any, batch: Any, mesh: Mesh) -> Any:
    """The step as a compiled program for these shapes: `jax.stages.Compiled`.

    The state comes back exactly where it lay, which lets every buffer of it be reused. It
    is compiled with the options of its platform (`xla_options`).
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        lowered = jitted.lower(state, teacher_params, batch)
        return xla_options.compiled(lowered, choice.current_device().platform, mesh.size)


class PerShape:
    """The step for batches of any shape: one compiled program for each, made when it first comes.

        step = PerShape(lambda *arguments: compiled(pure, *arguments, mesh))
        step.prepare(state, teacher_params, abstract_batch(row, 32, mesh))   # ahead of training
        state, means = step(state, teacher_params, batch)

    Args:
      compile: (state, teacher_params, batch), as arrays or shapes -> a program for them.
    """

    def __init__(self, compile: Callable[[Any, Any, Any], Any]):
        self._compile = compile
        self._programs: dict[Any, Any] = {}

    @property
    def compiled(self) -> int:
        """How many programs there are."""
        return len(self._programs)

    def prepare(self, state: Any, teacher_params: Any, batch: Any) -> Any:
        """The program for batches of this one's shape, compiled at the first call."""
        leaves, structure = jax.tree.flatten(batch)
        shape = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if shape not in self._programs:
            self._programs[shape] = self._compile(state, teacher_params, batch)
        return self._programs[shape]

    def __call__(
        self, state: TrainState, teacher_params: Any, batch: Batch
    ) -> tuple[TrainState, dict[str, Mean]]:
        """Runs the step by the program for the batch's shape."""
        return self.prepare(state, teacher_params, batch)(state, teacher_params, batch)


def abstract_batch(like: Batch, rows: int, mesh: Mesh) -> Batch:
    """The shapes and places of a global batch of so many rows, each with the leaves of `like`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (rows, *leaf.shape[1:]), leaf.dtype, sharding=_leaf_sharding(mesh, leaf.ndim)
        ),
        like,
    )


def place(batch: Any, mesh: Mesh) -> Any:
    """The rows of a batch that this process has (`local_rows`), as global arrays on the mesh.

    The batch is a `Batch` or any other tree of arrays whose first dim is its rows.
    """
    blocks = row_parts(mesh)
    here = len(local_rows(mesh, blocks))

    def make(rows):
        rows = np.asarray(rows)
        shape = (len(rows) * blocks // here, *rows.shape[1:])
        sharding = _leaf_sharding(mesh, rows.ndim)
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(make, batch)


def _leaf_sharding(mesh: Mesh, dims: int) -> NamedSharding:
    """How a leaf of a batch lies on the mesh: as [B, L] does, or [B] where that is all it has."""
    whole_rows = batch_sharding(mesh)
    return whole_rows if dims > 1 else NamedSharding(mesh, PartitionSpec(whole_rows.spec[0]))


def _over_micro_batches(one: Callable, batch: Any, parts: int) -> tuple[dict[str, Mean], Any]:
    """Adds sums, counts and gradients over the parts of a batch: of `one(part, its number)`.

    A batch is any tree whose leaves have its rows first.

    `optax.microbatching` adds up the same bits, but its loop needs other memory on some meshes.
    """
    if parts == 1:
        return one(batch, 0)

    # Part m takes rows m, m + parts, ...: each device's rows stay on it, in every part.
    def split(array):
        return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)

    # In bfloat16 the later parts would be lost beside the sum of the earlier ones.
    wide = lambda leaf: jnp.promote_types(leaf.dtype, jnp.float32)

    def body(carry, part):
        return jax.tree.map(lambda sum, new: sum + new.astype(sum.dtype), carry, one(*part)), None

    numbered = jax.tree.map(split, batch), jnp.arange(parts)
    shapes = jax.eval_shape(one, *jax.tree.map(lambda array: array[0], numbered))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf)), shapes)
    return jax.lax.scan(body, zeros, numbered)[0]


def _chosen(finite: Array, new: Any, old: Any) -> Any:
    """The new tree, or the old one to the last bit; XLA makes it part of the update's own loop."""
    return jax.tree.map(lambda one, other: jnp.where(finite, one, other), new, old)


def _single(value: Array) -> Mean:
    return Mean(jnp.asarray(value, jnp.float32), jnp.float32(1))
