"""Makes the parts of a run from its configuration: models, data, objective, optimizer, step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxdistill import errors, methods, optim, rules, teachers
from jaxdistill.compress import command, importance, prune, quantize
from jaxdistill.config import Config
from jaxdistill.data import held_out, pipeline, prompts, spelling
from jaxdistill.data.dataset import Dataset, empty_row
from jaxdistill.data.rendering import read_template
from jaxdistill.data.sources import open_source
from jaxdistill.data.teacher_cache import taught
from jaxdistill.data.teacher_cache.formats import Format
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice
from jaxdistill.kernels.self_check import self_check
from jaxdistill.methods import signals
from jaxdistill.models import DecoderConfig, Model, attention, random, reseat
from jaxdistill.models.vocabulary import check_rows
from jaxdistill.references import load_any
from jaxdistill.run import changes, pairing, shapes, states, stored
from jaxdistill.run.pairing import Pairing
from jaxdistill.run.stored import Stored
from jaxdistill.sharding import make_mesh
from jaxdistill.train import step as steps
from jaxdistill.train.state import TrainState, abstract_params
from jaxdistill.types import Batch


@dataclasses.dataclass(frozen=True)
class Models:
    """Who takes part.

    Attributes:
      teacher: None where there is none, or its answers are stored.
      student: float32 (or as configured) parameters on the mesh.
      tokenizer: of both.
      vocab: how many rows of the heads are tokens.
      stored: the teacher whose answers are stored, or None.
      pairing: how the tokenizer fits those that the models come with.
    """

    teacher: Model | None
    student: Model
    tokenizer: Any
    vocab: int
    stored: Stored | None = None
    pairing: Pairing = Pairing()


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


def check_tensor(mesh: Mesh, named: Mapping[str, DecoderConfig]) -> None:
    """Raises where the tensor axis does not divide a model; the vocabulary may be any size.

    Raises:
      ConfigError: with the numbers and the sizes that would do.
    """
    for who, config in named.items():
        sizes = {"heads": config.heads, "kv_heads": config.kv_heads}
        sizes |= {"experts": config.experts.count} if config.experts else {"mlp": config.mlp}
        errors.check(rules.tensor_axis(mesh.shape["tensor"], who, sizes))


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
    asked_before = stored.of(config, teacher, tokenizer, vocab)
    teacher = teacher if asked_before is None else None
    pairs, teacher = pairing.of(config, tokenizer, teacher, student)
    named = {"teacher": teacher, "student": student}
    for name, shape in named.items():
        if shape is None:
            continue
        check_rows(name, shape.config.vocab_size, vocab)
        errors.check(rules.row_length(config.data.seq_len, name, shape.config.max_positions))
    states.check(config, student.config, mesh)
    check_tensor(mesh, {name: shape.config for name, shape in named.items() if shape})
    if config.teacher and config.teacher.quantize:
        quantize.check_backend(config.teacher.quantize)
    for section, shape in ((config.teacher, teacher), (config.student, student)):
        if section is not None and shape is not None:
            with jax.set_mesh(mesh):
                platform = choice.current_device().platform
            attention.check(section.attention, shape.config, config.data.seq_len, platform)
    return Models(teacher, student, tokenizer, vocab, asked_before, pairs)


def load_models(config: Config, models: Models, mesh: Mesh) -> Models:
    """The models of `shapes_of` with parameters on the mesh, read from their files or made.

    Raises:
      ModelError, ConfigError: if weights cannot be read, or are not those of the shapes.
    """
    teacher = load_teacher(config, models.pairing.as_loaded(models.teacher), mesh)
    teacher = models.pairing.seated(teacher)
    student = student_of(config, models.student, teacher, mesh)
    student = dataclasses.replace(student, tokenizer=models.tokenizer)
    answers = None if models.stored is None else models.stored.loaded(mesh)
    return dataclasses.replace(models, teacher=teacher, student=student, stored=answers)


def load_teacher(config: Config, shape: Model | None, mesh: Mesh) -> Model | None:
    """The teacher of a shape with its parameters on the mesh; None where there is no shape.

    Raises:
      ModelError, ConfigError: if weights cannot be read, or are not those of the shape.
    """
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


def _uncut_teacher(config: Config, mesh: Mesh) -> Model:
    """The weights that the student is cut out of, read for this alone, as their files have them.

    Raises:
      MismatchError: if they are not those that were asked.
    """
    assert config.teacher is not None
    teacher = load_teacher(config, shapes.of(config, config.security.allow_network)[0], mesh)
    assert teacher is not None, "the configuration names the weights to cut the student out of"
    # A random one is made anew, on another mesh rounded otherwise.
    if config.teacher.cache and not config.teacher.random:
        stored.check_weights(config.teacher.cache, changes.weights(teacher.params))
    return teacher


def _cut_out(config: Config, shape: Model, teacher: Model) -> Model:
    """The layers, or the units, of a teacher that make a student."""
    student, dtype = config.student, config.student.param_dtype
    if student.prune:
        found = importance.load(student.prune.importance)
        made, _ = command.cut(teacher, student.prune, found, dtype)
        return dataclasses.replace(made, tokenizer=shape.tokenizer)
    layers = shapes.kept_layers(config, teacher.config.layers)
    arch, params = prune.keep_layers(teacher.config, teacher.params, layers, dtype)
    return dataclasses.replace(shape, config=arch, params=params)


def _respelled(config: Config, made: Model, shape: Model, teacher: Model) -> Model:
    """A student with rows for the tokens of its own tokenizer.

    Raises:
      ConfigError: for rows of a teacher whose tokens nobody knows.
    """
    if config.student.embeddings == "random":
        none: list[list[int]] = [[]] * shape.config.vocab_size
        return reseat.respelled(made, none, shape.config, jax.random.key(config.seed))
    if teacher.tokenizer is None:
        raise ConfigError(
            "student.embeddings = mean: the teacher has no tokenizer that says what its rows "
            "spell: use random"
        )
    rows = spelling.spelled(shape.tokenizer, teacher.tokenizer, teacher.config.vocab_size)
    rows += [[]] * (shape.config.vocab_size - len(rows))
    return reseat.respelled(made, rows, shape.config)


def student_of(config: Config, shape: Model, teacher: Model | None, mesh: Mesh) -> Model:
    """A student before its first step, with arrays of its own."""
    student, dtype = config.student, config.student.param_dtype
    if student.from_ == "teacher":
        if teacher is None or student.tokenizer:  # stored, aside, or in other ids
            teacher = _uncut_teacher(config, mesh)
        made = _cut_out(config, shape, teacher)
        return made if student.tokenizer is None else _respelled(config, made, shape, teacher)
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
    """The training rows, where there are any, and the held-out ones, built or from the cache.

    Raises:
      DataError: as `pipeline.build`, or if held-out records are trained on.
    """
    data, network = config.data, config.security.allow_network
    train, held = (
        [
            open_source(
                one.path,
                format=one.format,
                origin=one.origin,
                weight=one.weight,
                allow_network=network,
            )
            for one in sources
        ]
        for sources in (data.train, data.eval_files)
    )
    share = data.held_out_share
    if share is not None:
        train, held = held_out.split(train, share)
    options = data.model_dump(
        include={"seq_len", "packing", "loss_on", "cache_dir", "on_bad_record", "max_bad_fraction",
                 "turns", "long_documents", "special_tokens", "template_kwargs"}
    )  # fmt: skip
    if data.chat_template is not None:
        options["chat_template"] = read_template(data.chat_template)
    built = {
        name: pipeline.build(sources, tokenizer, name=name, **options)
        for name, sources in (("train", train), ("eval", held))
        if sources
    }
    if "train" in built:
        held_out.check(built["train"], built["eval"])
    return built


def prompts_of(config: Config, tokenizer: Any) -> prompts.Prompts | None:
    """What the student answers, where it writes its own text.

    Raises:
      DataError, ModelError: as `prompts.read`.
    """
    rollout, data = config.rollout, config.data
    if rollout is None:
        return None
    network = config.security.allow_network
    options = data.model_dump(
        include={"on_bad_record", "max_bad_fraction", "special_tokens", "template_kwargs"}
    )
    if data.chat_template is not None:
        options["chat_template"] = read_template(data.chat_template)
    return prompts.read(
        [open_source(one.path, "prompts", allow_network=network) for one in data.prompts],
        tokenizer,
        longest=data.seq_len - rollout.max_new_tokens,
        **options,
    )


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
      stored: the format of the stored signal that its batches carry, or None.
    """

    objective: methods.Objective
    measuring: Mapping[str, float]
    teacher: teachers.Teacher
    tx: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    loss: steps.Loss
    stored: Format | None = None


def method_of(config: Config, models: Models) -> RunMethod:
    """Objective, teacher and optimizer as the configuration says."""
    facts = methods.Facts(
        student=models.student.config,
        teacher=None if models.teacher is None else models.teacher.config,
        student_tokenizer=models.tokenizer,
        teacher_tokenizer=models.tokenizer,
        vocab=models.vocab,
        columns=models.pairing.columns,
        steps=config.train.steps,
        learning_rate=config.optimizer.lr,
        stored=format_of(models),
    )
    built = methods.build(config.method, facts)
    objective = built.objective
    teacher = signal_of(config, models, objective) if objective.needs_teacher else teachers.none
    o = config.optimizer
    rate = learning_rate_of(config)
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
    form = models.stored.format if models.stored and objective.needs_teacher else None
    return RunMethod(objective, measuring, teacher, tx, rate, loss, form)


def format_of(models: Models) -> str:
    """How the teacher's answers are stored, or `signals.ONLINE`."""
    return signals.ONLINE if models.stored is None else models.stored.format.name


def signal_of(
    config: Config, models: Models, objective: methods.Objective | None = None
) -> teachers.Teacher:
    """What says what the teacher says of a batch.

    Args:
      config: of the run.
      models: with a teacher, or a stored one.
      objective: that asks; None: for measuring, at T = 1.
    """
    if models.stored is not None:
        return models.stored.signal(None if objective is None else config.method)
    assert models.teacher is not None, "the configuration has a teacher where one is needed"
    assert config.teacher is not None, "it was loaded from there"
    return teachers.online(
        models.teacher.config,
        compute_dtype=teacher_dtype(config),
        attention=config.teacher.attention,
        taps=() if objective is None else objective.teacher_taps,
        relations=() if objective is None else objective.teacher_relations,
    )


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
    if not method.objective.needs_teacher:
        return None
    if models.stored is not None:
        return models.stored.abstract_params(mesh)
    assert models.teacher is not None, "the configuration has a teacher where one is needed"
    assert config.teacher is not None, "it was loaded from there"
    params = abstract_params(models.teacher.config, teacher_dtype(config), mesh)
    params = models.pairing.abstract(params, mesh)
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


def abstract_batch_of(config: Config, mesh: Mesh, form: Format | None = None) -> Batch:
    """The shapes and places of a step's batch, with what it carries of a stored teacher."""
    origins = any(source.origin != "data" for source in config.data.train)
    beside = {} if form is None else taught.empty(form, config.data.seq_len)
    row = pipeline.stack([empty_row(config.data.seq_len, 0, origins) | beside])
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
    return signal_params(models) if method.objective.needs_teacher else None


def signal_params(models: Models) -> Any:
    """The parameters of what `signal_of` gives; None without a teacher."""
    if models.stored is not None:
        return models.stored.params
    return None if models.teacher is None else models.teacher.params
