"""Makes the parts of a run from its configuration: models, data, objective, optimizer, step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxdistill import errors, methods, optim, rules, teachers
from jaxdistill.compress import quantize
from jaxdistill.config import Config, routing
from jaxdistill.config import oneself as selves
from jaxdistill.config.optimizer import Optimizer
from jaxdistill.config.reward import mixed
from jaxdistill.data import batching
from jaxdistill.data.dataset import empty_route, empty_row, empty_second
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice
from jaxdistill.kernels.self_check import self_check
from jaxdistill.methods import two_tokenizers
from jaxdistill.methods.routed import Routed
from jaxdistill.models import DecoderConfig
from jaxdistill.models.quantized import Quantization
from jaxdistill.run import ahead, oneself, participants, sparse, states
from jaxdistill.run.stages import Stage
from jaxdistill.run.stored import Stored
from jaxdistill.run.teaching import Nobody, Served, StudentStart, Teaching
from jaxdistill.sharding import make_mesh, row_parts
from jaxdistill.train import once
from jaxdistill.train import step as steps
from jaxdistill.train.state import TrainState
from jaxdistill.types import Batch


def mesh_of(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of the given ones, but for those that are the teacher's own.

    It is checked against the batch sizes.

    Raises:
      ConfigError: if the mesh does not fit the devices, or the batches do not divide over it.
    """
    devices, own = ahead.divided(config.teacher, devices)
    try:
        mesh = make_mesh(**config.mesh.model_dump(exclude={"processes"}), devices=devices)
    except ConfigError as error:
        if own is None:
            raise
        raise ConfigError(f"{error}; {own.size} devices are the teacher's ({ahead.KEY})") from None
    parts = row_parts(mesh)
    train = config.train
    wrong = rules.batches(train.batch_size, train.micro_batches, config.eval.batch_size, parts)
    there = f"there are {mesh.size} devices"
    errors.check(ConfigError(f"{'.'.join(key)}: {rule} ({there})") for key, rule in wrong)
    errors.check(rules.context_axis(config.data.seq_len, mesh.shape["context"]))
    return mesh


@dataclasses.dataclass(frozen=True)
class RunMethod:
    """The method of a run as functions.

    Attributes:
      objective: what is minimised.
      measuring: the knobs that models are measured at.
      asked: whom it asks.
      teacher: what says what they say of a batch.
      tx: the optimizer's chain, knobs included.
      learning_rate: update number -> learning rate.
      loss: student and objective parameters to named means, for training and evaluation alike.
      gather: brings the student's layers together before the micro-batches, or None.
    """

    objective: methods.Objective
    measuring: Mapping[str, float]
    asked: Teaching
    teacher: teachers.TeacherFunction | Routed
    tx: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    loss: steps.Loss
    gather: Callable[[Any], Any] | None = None


def method_of(config: Config, models: participants.Models) -> RunMethod:
    """Objective, teacher and optimizer as the configuration says."""
    facts = facts_of(config, models)
    built = methods.build(config.method, facts)
    objective = built.objective
    asked = asked_of(config, models, objective)
    o = config.optimizer
    rate = learning_rate_of(o, config.train.steps)
    tx = optim.optimizer(
        rate,
        name=o.name,
        moments=o.moments,
        knobs=built.knobs,
        clip_norm=o.clip_norm,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        objective_lr_ratio=(built.learning_rate or facts.learning_rate) / facts.learning_rate,
        trained=built.trained,
        scaled=built.scaled,
        last=sparse.transform(config.student.sparsity, config.train.steps, models.student.config),
        average=oneself.average_of(selves.of(config)),
    )
    loss = _loss_of(config, models, objective, quantize.of(config.student.quantize))
    measuring = {**dict.fromkeys(built.knobs, 1.0), **built.measuring}
    gather = _gather_of(config, models.student.config)
    return RunMethod(objective, measuring, asked, asked.signal(objective), tx, rate, loss, gather)


def _gather_of(config: Config, student: DecoderConfig) -> Callable[[Any], Any] | None:
    if config.train.gather_once != "both":
        return None
    dtype = jnp.dtype(config.student.compute_dtype)
    return lambda params: once.gathered(student, params, dtype)


def asked_of(config: Config, models: participants.Models, objective: methods.Objective) -> Teaching:
    """Whom an objective asks: the teacher, the student before the first step, or nobody."""
    if objective.needs_start:
        return StudentStart(
            config.student, models.student if models.start is None else models.start
        )
    return models.teaching if objective.needs_teacher else Nobody()


def _loss_of(
    config: Config,
    models: participants.Models,
    objective: methods.Objective,
    quantization: Quantization | None,
) -> steps.Loss:
    return steps.make_loss(
        models.student.config,
        objective,
        compute_dtype=jnp.dtype(config.student.compute_dtype),
        remat=config.student.remat,
        attention=config.student.attention,
        quantization=quantization,
        router_aux_loss_coef=config.student.router_aux_loss_coef,
    )


def in_stage(
    config: Config, models: participants.Models, method: RunMethod, stage: Stage
) -> RunMethod:
    """The method in the steps of a stage, with the same optimizer.

    Where they ask no teacher, it is cross-entropy alone.
    """
    objective, teacher = method.objective, method.teacher
    if not stage.taught:
        control = methods.control(config.method)
        objective = methods.build(control, facts_of(config, models)).objective
        teacher = teachers.none
    loss = _loss_of(config, models, objective, stage.rounded)
    return dataclasses.replace(method, objective=objective, teacher=teacher, loss=loss)


def facts_of(config: Config, models: participants.Models) -> methods.Facts:
    """What the method of a run may know of it."""
    return methods.Facts(
        student=models.student.config,
        teacher=None if models.teacher is None else models.teacher.config,
        student_tokenizer=models.tokenizer,
        teacher_tokenizer=models.second.tokenizer if models.second else models.tokenizer,
        vocab=models.vocab,
        columns=models.pairing.columns,
        steps=config.train.steps,
        learning_rate=config.optimizer.lr,
        longest=None if config.rollout is None else config.rollout.max_new_tokens,
    )


def learning_rate_of(o: Optimizer, steps: int) -> optax.Schedule:
    """Step index -> learning rate, over a run of `steps` steps; one program, where it is called."""
    warmup = rules.moment(o.warmup, steps)
    return jax.jit(
        optim.learning_rate(o.schedule, o.lr, steps, warmup=warmup, end_ratio=o.end_lr_ratio)
    )


def compile_step(
    config: Config,
    method: RunMethod,
    state: Any,
    teacher_params: Any,
    mesh: Mesh,
    monitor: Callable[[Any], Any] | None = None,
    check_kernels: bool = True,
):
    """The compiled training step of a run; `monitor` as in `steps.make`.

    Without `check_kernels` nothing runs: for devices that are only described.

    Raises:
      ConfigError: if a kernel of the loss computes something else than its reference here.
    """
    if check_kernels:
        check_kernels_of(config)
    step = make_step(config, method, monitor)
    batch = abstract_batch_of(config, mesh, method.asked)
    return steps.compiled(step, state, teacher_params, batch, mesh)


def make_step(
    config: Config, method: RunMethod, monitor: Callable[[Any], Any] | None = None
) -> steps.StepFunction:
    """The training step of a run as a pure function; `monitor` as in `steps.make`."""
    lies = routing.layout(config)
    computes = not isinstance(method.asked, Nobody | Served | Stored | ahead.Ahead)
    return steps.make(
        method.loss,
        method.teacher,
        method.tx,
        micro_batches=config.train.micro_batches if lies is None else lies.parts,
        monitor=monitor,
        prepare=method.objective.prepare,
        adapters=states.adapters_of(config.student),
        offload=config.optimizer.offload,
        ahead=config.train.gather_once != "none" and computes,
        gather=method.gather,
    )


def abstract_batch_of(config: Config, mesh: Mesh, asked: Teaching) -> Batch:
    """The shapes and places of a step's batch, with what it carries for whom the method asks."""
    origins = any(source.origin != "data" for source in config.data.train)
    length = theirs = config.data.seq_len
    method, beside = methods.of(config.method), {}
    if method.second_view:
        theirs = two_tokenizers.length(config.method, length)
        beside |= empty_second(length, theirs, 0)
    beside |= asked.empty(length, theirs)
    if method.reads_sampler:
        beside["sampler_logprobs"] = np.zeros(length, np.float32)
    if config.reward is not None:
        numbers = ["advantages", *(["old"] if config.reward.updates > 1 else [])]
        sampled = {name: np.zeros(length, np.float32) for name in numbers}
        if method.marks_wrong(config.method):
            sampled["wrong"] = np.zeros(length, bool)
        if mixed(config):
            sampled |= {name: np.zeros(length, bool) for name in ("rewarded", "taught")}
        beside |= {"sampled": sampled}
    if config.teachers is not None:
        beside |= empty_route()
    row = batching.stack([empty_row(length, 0, origins) | beside])
    return steps.abstract_batch(row, routing.rows(config), mesh)


def check_kernels_of(config: Config) -> None:
    """Runs the self-check where a kernel of our own makes the loss; XLA is its reference."""
    wanted = config.method.implementation
    dtype = config.method.logits_dtype
    dtype = config.student.compute_dtype if dtype == "auto" else dtype
    implementation = None if wanted == "auto" else wanted
    if choice.choose(implementation, 512, dtype) != "xla":
        self_check(dtype, implementation)


def build(config: Config, mesh: Mesh | None = None) -> tuple[Any, TrainState, Any]:
    """(compiled step, state, teacher parameters) of a configuration, for a loop of one's own.

        state, means = step(state, teacher_params, batch)

    `batch` is a `types.Batch` of arrays [train.batch_size, data.seq_len], placed by
    `sharding.batch_sharding(mesh)`; `state` is donated. Of several teachers the parameters come by
    name, and the batch lies as `data.routes.MicroBatchLayout` has it.

    Raises:
      UserError: whatever is wrong with the configuration, the models or the mesh.
    """
    if config.teacher is not None and config.teacher.mesh is not None:
        raise ConfigError(
            "teacher.mesh: a loop of one's own would have to ask the teacher before every step: "
            "remove it, so that the teacher computes in the step"
        )
    mesh = mesh_of(config) if mesh is None else mesh
    models = participants.load_models(config, participants.shapes_of(config, mesh), mesh)
    method = method_of(config, models)
    state = states.create(config, models.student, method.objective, method.tx, mesh)
    teacher_params = method.asked.params
    return compile_step(config, method, state, teacher_params, mesh), state, teacher_params
