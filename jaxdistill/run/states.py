"""The state of a run as its configuration wants it: new, or as shapes to restore into."""

import dataclasses

import jax
import optax
from jax.sharding import Mesh

from jaxdistill.config import Config
from jaxdistill.config.models import Student
from jaxdistill.config.quantize import QuantizedBase
from jaxdistill.errors import ConfigError
from jaxdistill.methods import Objective
from jaxdistill.models import DecoderConfig, Model, lora
from jaxdistill.run import sparse
from jaxdistill.sharding import HOST, shardings
from jaxdistill.train import state as states
from jaxdistill.train.state import TrainState


def adapters_of(student: Student) -> lora.Lora | None:
    """The student's adapters, or None where all of it is trained."""
    section = student.lora
    return None if section is None else _with_base(lora.Lora(**section.model_dump()), student.base)


def _with_base(adapters: lora.Lora, base: str | QuantizedBase | None) -> lora.Lora:
    """Adapters beside kernels that are held as `student.base` says."""
    if base is None:
        return adapters
    if isinstance(base, str):
        return dataclasses.replace(adapters, scheme=base)
    return dataclasses.replace(adapters, scheme=base.scheme, exceptions=base.exceptions)


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
    if config.optimizer.offload:
        check_host("optimizer.offload", mesh.devices.flat[0], "spread the state")


def check_host(option: str, device: jax.Device, instead: str) -> None:
    """The device addresses the memory of its host.

    Args:
      option: that asks for it.
      device: of the mesh.
      instead: what to do over more devices.

    Raises:
      ConfigError: if not.
    """
    kinds = {memory.kind for memory in device.addressable_memories()}
    if HOST not in kinds:
        known = ", ".join(sorted(kinds)) or "nothing that JAX lists, as described GPUs do,"
        raise ConfigError(
            f"{option} = true: {device.device_kind} addresses {known} and no {HOST}: leave it out, "
            f"and {instead} over more devices (mesh.fsdp)"
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
