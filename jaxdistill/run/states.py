"""The state of a run as its configuration wants it: new, or as shapes to restore into."""

import jax
import optax
from jax.sharding import Mesh

from jaxdistill.config import Config
from jaxdistill.config.models import Student
from jaxdistill.errors import ConfigError
from jaxdistill.methods import Objective
from jaxdistill.models import DecoderConfig, Model, lora
from jaxdistill.run import sparse
from jaxdistill.sharding import shardings
from jaxdistill.train import state as states
from jaxdistill.train.state import TrainState

HOST = states.HOST


def adapters_of(student: Student) -> lora.Lora | None:
    """The student's adapters, or None where all of it is trained."""
    section = student.lora
    return None if section is None else lora.Lora(**section.model_dump(), scheme=student.base)


def check(config: Config, student: DecoderConfig, mesh: Mesh) -> None:
    """What is to be trained is there, and so is the memory that moments shall wait in.

    Raises:
      ConfigError: if not.
    """
    adapters = adapters_of(config.student)
    if adapters is not None:
        lora.rows(student, adapters)
    if config.student.sparsity is not None:
        sparse.check(config.student.sparsity, student)
    coefficient = config.student.router_aux_loss_coef
    if coefficient and student.experts is None:
        raise ConfigError(
            f"student.router_aux_loss_coef = {coefficient}: the student has no routed experts: "
            "leave it out"
        )
    if not config.optimizer.offload:
        return
    device = mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if HOST not in kinds:
        raise ConfigError(
            f"optimizer.offload = true: {device.device_kind} addresses {', '.join(sorted(kinds))} "
            f"and no {HOST}: leave it out, and spread the state over more devices (mesh.fsdp)"
        )


def create(
    config: Config,
    student: Model,
    objective: Objective,
    tx: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step; takes the student's arrays over."""
    own = objective.init(jax.random.key(config.seed))
    adapters, trained, frozen = adapters_of(config.student), student.params, None
    if adapters is not None:
        frozen, axes = student.params, lora.logical_axes(student.config, adapters)
        places = shardings(mesh, axes, lora.shapes(student.config, adapters))
        make = jax.jit(lora.init, static_argnums=(0, 1), out_shardings=places)
        trained = make(student.config, adapters, jax.random.key(config.seed))
    offload = config.optimizer.offload
    return states.create(trained, own, tx, config.seed, mesh, frozen, offload=offload)


def abstract(
    config: Config,
    student: DecoderConfig,
    objective: Objective,
    tx: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The shapes and places of the state, to restore a checkpoint into."""
    return states.abstract(
        student,
        config.student.param_dtype,
        jax.eval_shape(objective.init, jax.random.key(config.seed)),
        tx,
        mesh,
        adapters=adapters_of(config.student),
        offload=config.optimizer.offload,
    )
