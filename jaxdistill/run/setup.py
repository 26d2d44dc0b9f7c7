"""Makes the parts of a run from its configuration: models, data, objective, optimizer, step."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxdistill import methods, optim, teachers
from jaxdistill.compress import command, importance, prune, quantize
from jaxdistill.config import Config
from jaxdistill.data import pipeline
from jaxdistill.data.dataset import Dataset, empty_row
from jaxdistill.data.sources import open_source
from jaxdistill.errors import ConfigError, MismatchError
from jaxdistill.kernels import choice
from jaxdistill.kernels.self_check import self_check
from jaxdistill.models import DecoderConfig, Model, attention, random
from jaxdistill.models.vocabulary import check_rows, check_same
from jaxdistill.references import load_any
from jaxdistill.run import shapes, states
from jaxdistill.sharding import make_mesh
from jaxdistill.train import step as steps
from jaxdistill.train.state import TrainState, abstract_params
from jaxdistill.types import Batch


@dataclasses.dataclass(frozen=True)
class Models:
    """Who takes part.

    Attributes:
      teacher: None where the method needs none.
      student: float32 (or as configured) parameters on the mesh.
      tokenizer: of both.
      vocab: how many rows of the heads are tokens.
    """

    teacher: Model | None
    student: Model
    tokenizer: Any
    vocab: int


def mesh_of(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of the given ones, checked against the batch sizes.

    Raises:
      ConfigError: if the mesh does not fit the devices, or the batches do not divide over it.
    """
    mesh = make_mesh(**config.mesh.model_dump(exclude={"processes"}), devices=devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.train.batch_size // config.train.micro_batches
    for name, size in (
        ("train.batch_size / train.micro_batches", rows),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if size % parts:
            raise ConfigError(
                f"{name} = {size}: must be a multiple of mesh.data * mesh.fsdp = {parts} (there "
                f"are {mesh.size} devices): change it or the mesh"
            )
    if config.data.seq_len % mesh.shape["context"]:
        raise ConfigError(
            f"data.seq_len = {config.data.seq_len}: must be a multiple of mesh.context = "
            f"{mesh.shape['context']}: change one of them"
        )
    return mesh


def check_tensor(mesh: Mesh, named: Mapping[str, DecoderConfig]) -> None:
    """Raises where the tensor axis does not divide a model; the vocabulary may be any size.

    Raises:
      ConfigError: with the numbers and the sizes that would do.
    """
    parts = mesh.shape["tensor"]
    for who, config in named.items():
        sizes = {"heads": config.heads, "kv_heads": config.kv_heads}
        sizes |= {"experts": config.experts.count} if config.experts else {"mlp": config.mlp}
        wrong = [f"{name} = {size}" for name, size in sizes.items() if size % parts]
        if wrong:
            common = math.gcd(*sizes.values())
            fits = [n for n in range(1, common + 1) if common % n == 0]
            raise ConfigError(
                f"mesh.tensor = {parts} does not divide the {who}'s {', '.join(wrong)}: take one "
                f"of {', '.join(map(str, fits[-6:]))}"
            )


def shapes_of(config: Config, mesh: Mesh) -> Models:
    """The models without parameters, from their small files, once they can work together.

    Raises:
      ModelError, MismatchError, ConfigError: for what is missing or does not fit.
    """
    network = config.security.allow_network
    teacher, student = shapes.of(config, network)
    tokenizer = shapes.named_tokenizer(config, {"teacher": teacher, "student": student})
    vocab = shapes.vocabulary(config, tokenizer)
    teacher, student = shapes.ended(teacher, tokenizer), shapes.ended(student, tokenizer)
    named = {"teacher": teacher, "student": student}
    for name, shape in named.items():
        if shape is None:
            continue
        own, arch = shape.tokenizer, shape.config
        check_rows(name, arch.vocab_size, vocab)
        if config.data.seq_len > arch.max_positions:
            raise ConfigError(
                f"data.seq_len = {config.data.seq_len}: the {name} was made for "
                f"{arch.max_positions} positions: use at most that"
            )
        if own is not None and own is not tokenizer:
            try:
                check_same(tokenizer, own)
            except MismatchError as error:
                raise MismatchError(f"{name} ({shape.source}): {error}") from None
    states.check(config, student.config, mesh)
    check_tensor(mesh, {name: shape.config for name, shape in named.items() if shape})
    if config.teacher and config.teacher.quantize:
        quantize.check_backend(config.teacher.quantize)
    for section, shape in ((config.teacher, teacher), (config.student, student)):
        if section is not None and shape is not None:
            with jax.set_mesh(mesh):
                platform = choice.current_device().platform
            attention.check(section.attention, shape.config, config.data.seq_len, platform)
    return Models(teacher, student, tokenizer, vocab)


def load_models(config: Config, models: Models, mesh: Mesh) -> Models:
    """The models of `shapes_of` with parameters on the mesh, read from their files or made.

    Raises:
      ModelError, ConfigError: if weights cannot be read, or are not those of the shapes.
    """
    teacher = _load_teacher(config, models.teacher, mesh)
    student = student_of(config, models.student, teacher, mesh)
    student = dataclasses.replace(student, tokenizer=models.tokenizer)
    return dataclasses.replace(models, teacher=teacher, student=student)


def _load_teacher(config: Config, shape: Model | None, mesh: Mesh) -> Model | None:
    if shape is None or config.teacher is None:
        return None
    source, dtype = config.teacher, config.teacher.dtype
    if source.random:
        model = random(shape.config, config.seed + 1, dtype, mesh)
    else:
        model = load_any(
            shapes.source(source),
            dtype=dtype,
            mesh=mesh,
            tokenizer=False,
            allow_network=config.security.allow_network,
        )
    if source.quantize:
        model = quantize.quantized(model, source.quantize)
    return dataclasses.replace(model, tokenizer=shape.tokenizer)


def student_of(config: Config, shape: Model, teacher: Model | None, mesh: Mesh) -> Model:
    """A student before its first step, with arrays of its own."""
    student, dtype = config.student, config.student.param_dtype
    if student.from_ == "teacher":
        assert teacher is not None, "the configuration has a teacher to cut the student out of"
        if student.prune:
            found = importance.load(student.prune.importance)
            made, _ = command.cut(teacher, student.prune, found, dtype)
            return dataclasses.replace(made, tokenizer=shape.tokenizer)
        layers = shapes.kept_layers(config, teacher.config.layers)
        arch, params = prune.keep_layers(teacher.config, teacher.params, layers, dtype)
        return Model(arch, params, shape.tokenizer, shape.source)
    if student.random:
        return random(shape.config, config.seed, dtype, mesh)
    return load_any(
        shapes.source(student),
        dtype=dtype,
        mesh=mesh,
        tokenizer=False,
        allow_network=config.security.allow_network,
    )


def data_of(config: Config, tokenizer: Any) -> dict[str, Dataset]:
    """The training and the held-out rows, built or taken from the cache."""
    built = {}
    for name, sources in (("train", config.data.train), ("eval", config.data.eval)):
        built[name] = pipeline.build(
            [open_source(one.path, format=one.format, origin=one.origin) for one in sources],
            tokenizer,
            seq_len=config.data.seq_len,
            packing=config.data.packing,
            loss_on=config.data.loss_on,
            cache_dir=config.data.cache_dir,
            on_bad_record=config.data.on_bad_record,
            max_bad_fraction=config.data.max_bad_fraction,
            name=name,
        )
    return built


@dataclasses.dataclass(frozen=True)
class RunMethod:
    """The method of a run as functions.

    Attributes:
      objective: what is minimised.
      measuring: the knobs that models are measured at.
      teacher: where its signal comes from.
      tx: the optimizer's chain, knobs included.
      learning_rate: update number -> learning rate.
      loss: student and objective parameters to named means, for training and evaluation alike.
    """

    objective: methods.Objective
    measuring: Mapping[str, float]
    teacher: teachers.Teacher
    tx: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    loss: steps.Loss


def method_of(config: Config, models: Models) -> RunMethod:
    """Objective, teacher and optimizer as the configuration says."""
    facts = methods.Facts(
        student=models.student.config,
        teacher=None if models.teacher is None else models.teacher.config,
        student_tokenizer=models.tokenizer,
        teacher_tokenizer=models.tokenizer,
        vocab=models.vocab,
        steps=config.train.steps,
        learning_rate=config.optimizer.lr,
    )
    built = methods.build(config.method, facts)
    objective = built.objective
    teacher = teachers.none
    if objective.needs_teacher:
        assert models.teacher is not None, "the configuration has a teacher where one is needed"
        assert config.teacher is not None, "it was loaded from there"
        teacher = teachers.online(
            models.teacher.config,
            compute_dtype=teacher_dtype(config),
            attention=config.teacher.attention,
            taps=objective.teacher_taps,
            relations=objective.teacher_relations,
        )
    o = config.optimizer
    rate = learning_rate_of(config)
    tx = optim.optimizer(
        rate,
        knobs=built.knobs,
        clip_norm=o.clip_norm,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        objective_lr_ratio=(built.learning_rate or facts.learning_rate) / facts.learning_rate,
        trained=built.trained,
    )
    loss = steps.make_loss(
        models.student.config,
        objective,
        compute_dtype=jnp.dtype(config.student.compute_dtype),
        remat=config.student.remat,
        attention=config.student.attention,
        quantization=config.student.quantize,
        router_aux_loss_coef=config.student.router_aux_loss_coef,
    )
    measuring = {**dict.fromkeys(built.knobs, 1.0), **built.measuring}
    return RunMethod(objective, measuring, teacher, tx, rate, loss)


def learning_rate_of(config: Config) -> optax.Schedule:
    """Step index -> learning rate."""
    o, steps = config.optimizer, config.train.steps
    warmup = o.warmup if isinstance(o.warmup, int) else round(o.warmup * steps)
    return optim.learning_rate(o.schedule, o.lr, steps, warmup=warmup, end_ratio=o.end_lr_ratio)


def teacher_dtype(config: Config) -> jnp.dtype:
    """The type that the teacher computes in."""
    assert config.teacher is not None, "only asked for where there is a teacher"
    return jnp.dtype(config.teacher.dtype)


def abstract_teacher_of(config: Config, models: Models, method: RunMethod, mesh: Mesh) -> Any:
    """The shapes and places of the teacher's parameters, None where the method has no teacher."""
    if models.teacher is None or not method.objective.needs_teacher:
        return None
    assert config.teacher is not None, "it was loaded from there"
    params = abstract_params(models.teacher.config, teacher_dtype(config), mesh)
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
    return steps.compiled(step, state, teacher_params, abstract_batch_of(config, mesh), mesh)


def make_step(
    config: Config, method: RunMethod, monitor: Callable[[Any], Any] | None = None
) -> steps.Step:
    """The training step of a run as a pure function; `monitor` as in `steps.make`."""
    return steps.make(
        method.loss,
        method.teacher,
        method.tx,
        micro_batches=config.train.micro_batches,
        monitor=monitor,
        prepare=method.objective.prepare,
        adapters=states.adapters_of(config),
        offload=config.optimizer.offload,
    )


def abstract_batch_of(config: Config, mesh: Mesh) -> Batch:
    """The shapes and places of a step's batch."""
    origins = any(source.origin != "data" for source in config.data.train)
    row = pipeline.stack([empty_row(config.data.seq_len, 0, origins)])
    return steps.abstract_batch(row, config.train.batch_size, mesh)


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
    `sharding.batch_sharding(mesh)`; `state` is donated.

    Raises:
      UserError: whatever is wrong with the configuration, the models or the mesh.
    """
    mesh = mesh_of(config) if mesh is None else mesh
    models = load_models(config, shapes_of(config, mesh), mesh)
    method = method_of(config, models)
    state = states.create(config, models.student, method.objective, method.tx, mesh)
    teacher_params = teacher_params_of(models, method)
    return compile_step(config, method, state, teacher_params, mesh), state, teacher_params


def teacher_params_of(models: Models, method: RunMethod) -> Any:
    """The teacher's parameters as the step takes them: None where the method has no teacher."""
    if models.teacher is None or not method.objective.needs_teacher:
        return None
    return models.teacher.params
