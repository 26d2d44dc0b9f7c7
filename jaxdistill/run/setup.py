"""Makes the parts of a run from its configuration: models, data, objective, optimizer, step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxdistill import errors, methods, optim, rules, teachers
from jaxdistill.compress import quantize
from jaxdistill.config import Config
from jaxdistill.config import oneself as selves
from jaxdistill.config.optimizer import Optimizer
from jaxdistill.config.server import Api
from jaxdistill.data import batching
from jaxdistill.data.dataset import empty_route, empty_row, empty_second
from jaxdistill.data.teacher_cache import taught
from jaxdistill.data.teacher_cache.formats import Format
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice
from jaxdistill.kernels.self_check import self_check
from jaxdistill.methods import two_tokenizers
from jaxdistill.methods.routed import Routed
from jaxdistill.models import Model
from jaxdistill.rollouts.rows import empty_scores
from jaxdistill.run import oneself, participants, routing, shapes, sparse, states
from jaxdistill.run.pairing import Pairing
from jaxdistill.run.stored import Stored
from jaxdistill.sharding import make_mesh
from jaxdistill.train import step as steps
from jaxdistill.train.state import TrainState, abstract_params
from jaxdistill.types import Batch


def mesh_of(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of the given ones, checked against the batch sizes.

    Raises:
      ConfigError: if the mesh does not fit the devices, or the batches do not divide over it.
    """
    mesh = make_mesh(**config.mesh.model_dump(exclude={"processes"}), devices=devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    train = config.train
    wrong = rules.batches(train.batch_size, train.micro_batches, config.eval.batch_size, parts)
    devices = f"there are {mesh.size} devices"
    errors.check(ConfigError(f"{'.'.join(key)}: {rule} ({devices})") for key, rule in wrong)
    errors.check(rules.context_axis(config.data.seq_len, mesh.shape["context"]))
    return mesh


@dataclasses.dataclass(frozen=True)
class RunMethod:
    """The method of a run as functions.

    Attributes:
      objective: what is minimised.
      measuring: the knobs that models are measured at.
      teacher: where its signal comes from: one, or several.
      tx: the optimizer's chain, knobs included.
      learning_rate: update number -> learning rate.
      loss: student and objective parameters to named means, for training and evaluation alike.
      stored: the format of the stored signal that its batches carry, of several teachers by their
        names; or None.
    """

    objective: methods.Objective
    measuring: Mapping[str, float]
    teacher: teachers.Teacher | Routed
    tx: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    loss: steps.Loss
    stored: Format | Mapping[str, Format] | None = None


def method_of(config: Config, models: participants.Models) -> RunMethod:
    """Objective, teacher and optimizer as the configuration says."""
    facts = facts_of(config, models)
    built = methods.build(config.method, facts)
    objective = built.objective
    teacher, itself = teachers.none, selves.of(config) is not None
    if objective.needs_start:
        teacher = start_of(config, models)
    elif objective.needs_teacher and itself:
        teacher = oneself.teacher_of(config, models.student.config)
    elif objective.needs_teacher:
        teacher = signal_of(config, models, objective)
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
        average=oneself.average_of(config),
    )
    loss = _loss_of(config, models, objective)
    measuring = {**dict.fromkeys(built.knobs, 1.0), **built.measuring}
    form = _format_of(models) if objective.needs_teacher else None
    return RunMethod(objective, measuring, teacher, tx, rate, loss, form)


def _format_of(models: participants.Models) -> Format | Mapping[str, Format] | None:
    """What batches carry of stored teachers."""
    several = {name: one.format for name, one in routing.answers(models.teachers).items()}
    return several or (models.stored.format if models.stored else None)


def _loss_of(
    config: Config, models: participants.Models, objective: methods.Objective
) -> steps.Loss:
    return steps.make_loss(
        models.student.config,
        objective,
        compute_dtype=jnp.dtype(config.student.compute_dtype),
        remat=config.student.remat,
        attention=config.student.attention,
        quantization=config.student.quantize,
        router_aux_loss_coef=config.student.router_aux_loss_coef,
    )


def without_teacher(config: Config, models: participants.Models, method: RunMethod) -> RunMethod:
    """The method in steps that ask no teacher: cross-entropy alone, with the same optimizer."""
    objective = methods.build(methods.control(config.method), facts_of(config, models)).objective
    loss = _loss_of(config, models, objective)
    return dataclasses.replace(method, objective=objective, teacher=teachers.none, loss=loss)


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


def servers(config: Config) -> dict[str | None, Api]:
    """The servers that are asked about the student's text while it writes.

    By the names of several teachers; None is the one teacher's.
    """
    if config.rollout is None or not methods.of(config.method).needs_teacher(config.method):
        return {}
    given = {None: config.teacher} | dict(config.teachers or {})
    return {name: one.api for name, one in given.items() if one and one.served and one.api}


def signal_of(
    config: Config, models: participants.Models, objective: methods.Objective | None = None
) -> teachers.Teacher | Routed:
    """What says what the teacher says of a batch.

    Args:
      config: of the run.
      models: with a teacher, a stored one, or several; none where a server is asked.
      objective: that asks; None: for measuring, at T = 1.
    """
    if models.teachers:
        normalise = config.routing.normalise if config.routing and objective else "token"
        signals = {
            name: _of_several(one, models.teachers[name], objective)
            for name, one in routing.each(config).items()
        }
        return Routed(signals, normalise)
    if None in servers(config):
        return teachers.served
    if models.stored is not None:
        return models.stored.signal(None if objective is None else config.method)
    assert models.teacher is not None, "the configuration has a teacher where one is needed"
    return _online(
        config,
        models.teacher,
        taps=() if objective is None else objective.teacher_taps,
        relations=() if objective is None else objective.teacher_relations,
        second_view=models.second is not None,
    )


def _of_several(
    config: Config, teacher: routing.Teaching, objective: methods.Objective | None
) -> teachers.Teacher:
    """One of several teachers, by the configuration as it would be with it alone."""
    if isinstance(teacher, Api):
        return teachers.served
    if isinstance(teacher, Stored):
        return teacher.signal(None if objective is None else config.method)
    return _online(config, teacher)


def _online(config: Config, teacher: Model, **read: Any) -> teachers.Teacher:
    """The teacher of a configuration, in the step."""
    assert config.teacher is not None, "it was loaded from there"
    return teachers.online(
        teacher.config,
        compute_dtype=teacher_dtype(config),
        attention=config.teacher.attention,
        **read,
    )


def start_of(config: Config, models: participants.Models) -> teachers.Teacher:
    """The student before the first step in the teacher's place."""
    student = config.student
    return teachers.online(
        models.student.config,
        compute_dtype=jnp.dtype(student.compute_dtype),
        attention=student.attention,
    )


def learning_rate_of(o: Optimizer, steps: int) -> optax.Schedule:
    """Step index -> learning rate, over a run of `steps` steps."""
    warmup = rules.moment(o.warmup, steps)
    return optim.learning_rate(o.schedule, o.lr, steps, warmup=warmup, end_ratio=o.end_lr_ratio)


def teacher_dtype(config: Config) -> jnp.dtype:
    """The type that the teacher computes in."""
    assert config.teacher is not None, "only asked for where there is a teacher"
    return jnp.dtype(config.teacher.dtype)


def abstract_teacher_of(
    config: Config, models: participants.Models, method: RunMethod, mesh: Mesh
) -> Any:
    """The shapes and places of what `teacher_params_of` gives."""
    if method.objective.needs_start or oneself.copies(config):
        dtype = jnp.dtype(config.student.compute_dtype)
        return abstract_params(models.student.config, dtype, mesh)
    asked = method.objective.needs_teacher and None not in servers(config)
    if not asked or selves.of(config) is not None:
        return None
    if models.stored is not None:
        return models.stored.abstract_params(mesh)
    if models.teachers:
        several = routing.each(config).items()
        return {
            name: _abstract_of_several(one, models.teachers[name], mesh) for name, one in several
        }
    assert models.teacher is not None, "the configuration has a teacher where one is needed"
    return _abstract_teacher(config, models.teacher, models.pairing, mesh)


def _abstract_of_several(config: Config, teacher: routing.Teaching, mesh: Mesh) -> Any:
    if isinstance(teacher, Api):
        return {}
    if isinstance(teacher, Stored):
        return teacher.abstract_params(mesh)
    return _abstract_teacher(config, teacher, Pairing(), mesh)


def _abstract_teacher(config: Config, teacher: Model, pairing: Pairing, mesh: Mesh) -> Any:
    assert config.teacher is not None, "it was loaded from there"
    params = abstract_params(teacher.config, teacher_dtype(config), mesh)
    params = pairing.abstract(params, mesh)
    scheme = shapes.teacher_scheme(config.teacher, config.security.allow_network)
    return params if scheme is None else quantize.abstract(params, scheme)


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
    batch = abstract_batch_of(config, mesh, method.stored)
    return steps.compiled(step, state, teacher_params, batch, mesh)


def make_step(
    config: Config, method: RunMethod, monitor: Callable[[Any], Any] | None = None
) -> steps.Step:
    """The training step of a run as a pure function; `monitor` as in `steps.make`."""
    lies = routing.layout(config)
    return steps.make(
        method.loss,
        method.teacher,
        method.tx,
        micro_batches=config.train.micro_batches if lies is None else lies.parts,
        monitor=monitor,
        prepare=method.objective.prepare,
        adapters=states.adapters_of(config.student),
        offload=config.optimizer.offload,
    )


def abstract_batch_of(
    config: Config, mesh: Mesh, form: Format | Mapping[str, Format] | None = None
) -> Batch:
    """The shapes and places of a step's batch, with what it carries of stored teachers."""
    origins = any(source.origin != "data" for source in config.data.train)
    length = theirs = config.data.seq_len
    method, beside = methods.of(config.method), {}
    if method.second_view:
        theirs = two_tokenizers.length(config.method, length)
        beside |= empty_second(length, theirs, 0)
    if form is not None:
        beside |= taught.empty(form, theirs)
    if asked := servers(config):
        beside |= {taught.LEAF: empty_scores(length, [name for name in asked if name])}
    itself = selves.of(config)
    if itself is not None and itself.context is not None:
        beside |= empty_second(length, selves.length(itself, length), 0)
    if method.reads_sampler:
        beside["sampler_logprobs"] = np.zeros(length, np.float32)
    if config.reward is not None:
        numbers = ["advantages", *(["old"] if config.reward.updates > 1 else [])]
        sampled = {name: np.zeros(length, np.float32) for name in numbers}
        if method.marks_wrong(config.method):
            sampled["wrong"] = np.zeros(length, bool)
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
    name, and the batch lies as `data.routes.Layout` has it.

    Raises:
      UserError: whatever is wrong with the configuration, the models or the mesh.
    """
    mesh = mesh_of(config) if mesh is None else mesh
    models = participants.load_models(config, participants.shapes_of(config, mesh), mesh)
    method = method_of(config, models)
    state = states.create(config, models.student, method.objective, method.tx, mesh)
    teacher_params = teacher_params_of(models, method)
    return compile_step(config, method, state, teacher_params, mesh), state, teacher_params


def teacher_params_of(models: participants.Models, method: RunMethod) -> Any:
    """The parameters of the teacher, or of the start, as the step takes them; None for neither."""
    if method.objective.needs_start:
        assert models.start is not None, "loaded for a method that needs it"
        return models.start.params
    return signal_params(models) if method.objective.needs_teacher else None


def signal_params(models: participants.Models) -> Any:
    """The parameters of what `signal_of` gives, several by name; None without a teacher.

    Of one that is the student itself those before the first step, where they are a copy.
    """
    if models.teachers:
        return {
            name: {} if isinstance(one, Api) else one.params
            for name, one in models.teachers.items()
        }
    if models.stored is not None:
        return models.stored.params
    teacher = models.start if models.teacher is None else models.teacher
    return None if teacher is None else teacher.params
