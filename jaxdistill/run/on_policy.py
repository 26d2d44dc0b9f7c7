"""The feed of a run whose student learns from its own answers, made from its configuration."""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdistill import errors, methods
from jaxdistill.compress import quantize
from jaxdistill.config import Config, routing
from jaxdistill.data.codec import prepare
from jaxdistill.data.feed import Feed
from jaxdistill.data.prompts import Prompts
from jaxdistill.errors import ConfigError
from jaxdistill.models import DecoderConfig, count_parameters
from jaxdistill.models.generator import cache_length
from jaxdistill.rollouts import difference
from jaxdistill.rollouts.feed import RolloutFeed, RolloutPlan
from jaxdistill.rollouts.replay import ReplayBuffer, ReplaySettings
from jaxdistill.rollouts.views import Aligner
from jaxdistill.rollouts.writing import RolloutSampling, Writer, one_call
from jaxdistill.run import oneself, participants, served_teacher, states
from jaxdistill.run.teaching import Online, Teaching, served
from jaxdistill.sharding import local_rows, row_parts
from jaxdistill.teachers import TeacherFunction
from jaxdistill.train.hooks import NO_HOOKS, Hooks
from jaxdistill.train.state import TrainState, whole
from jaxdistill.train.step import place, recorded


def plan_of(config: Config) -> RolloutPlan:
    """Which update of a run learns from whose text."""
    rollout = config.rollout
    assert rollout is not None, "only asked for where there are rollouts"
    return RolloutPlan(
        rollout.share, rollout.prompts_per_step, rollout.samples, rollout.max_age, config.seed
    )


def check(config: Config, models: participants.Models, prompts: Prompts | None, mesh: Mesh) -> None:
    """Refuses slots that the mesh does not divide, and what student or teacher cannot read.

    Raises:
      ConfigError, ModelError: with the numbers.
    """
    if config.rollout is None or prompts is None:
        return
    wrong = config.rollout.slots_problems(row_parts(mesh))
    told = [f"rollout.{key[0]} = {config.rollout.slots}: {rule}" for key, rule in wrong]
    errors.check(map(ConfigError, [*told, *unread(models.pairing.pairs)]))
    writer_of(config, models, prompts, mesh).check(prompts.prompts)


def unread(pairs: Mapping[str, Any]) -> Iterator[str]:
    """Why a student may write what a model takes for something else; nothing where it cannot.

    Given text is searched for such tokens before a run; what the student will write nobody knows.

    Args:
      pairs: of the run's vocabulary and a model's own, as `Pairing.pairs`.
    """
    for name, ids in (("teacher", "unreadable"), ("student", "misplaced")):
        unknown = getattr(pairs[name], ids) if name in pairs else ()
        if unknown:
            yield (
                f"rollout: the student may write {len(unknown)} tokens that the {name} has no row "
                f"for, such as {unknown[0]}: take a {name} with the tokenizer of the run, or leave "
                "rollout out"
            )


def writer_of(
    config: Config,
    models: participants.Models,
    prompts: Prompts,
    mesh: Mesh,
    stop: Callable[[], bool] = lambda: False,
    hooks: Hooks = NO_HOOKS,
    samples: int | None = None,
) -> Writer:
    """Who answers the prompts of a run; `samples` to each, or as many as it trains on."""
    rollout, student = config.rollout, config.student
    assert rollout is not None, "only asked for where there are rollouts"
    return Writer(
        models.student.config,
        vocab=models.vocab,
        tokenizer=models.tokenizer,
        sampling=_sampling_of(config, samples),
        slots=rollout.slots_on(row_parts(mesh)),
        longest=max(len(prompt.tokens) for prompt in prompts.prompts),
        compute_dtype=jnp.dtype(student.compute_dtype),
        cache_dtype=None if rollout.cache_dtype == "auto" else rollout.cache_dtype,
        quantization=quantize.of(student.quantize),
        stop=stop,
        hooks=hooks,
    )


def _sampling_of(config: Config, samples: int | None = None) -> RolloutSampling:
    rollout = config.rollout
    assert rollout is not None, "only asked for where there are rollouts"
    return RolloutSampling(
        samples=rollout.samples if samples is None else samples,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        seed=config.seed,
    )


def program_of(
    config: Config, models: participants.Models, state: TrainState, mesh: Mesh
) -> Callable[[], Any]:
    """Compiles the program that writes, without arrays: what it is given is held beside the state.

    A student that is trained for a scheme is compiled as it is held, before it is rounded.

    Args:
      config: of a run with rollouts.
      models: shapes.
      state: shapes and places.
      mesh: of the devices.
    """
    rollout, student = config.rollout, config.student
    assert rollout is not None, "only asked for where there are rollouts"
    prepare, write, inputs = one_call(
        models.student.config,
        vocab=models.vocab,
        sampling=_sampling_of(config),
        slots=rollout.slots_on(row_parts(mesh)),
        length=config.data.seq_len,
        compute_dtype=student.compute_dtype,
        cache_dtype=None if rollout.cache_dtype == "auto" else rollout.cache_dtype,
    )
    adapters = states.adapters_of(student)

    def begin(params: Any, frozen: Any) -> Any:
        return prepare(whole(params, frozen, adapters)["student"])

    def compile() -> Any:
        with jax.set_mesh(mesh):
            begun = jax.jit(begin).lower(state.params, state.frozen).compile()
            held = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                jax.eval_shape(begin, state.params, state.frozen),
                begun.output_shardings,
            )
            return jax.jit(write, donate_argnums=1).lower(*held, inputs).compile()

    return compile


def memory(config: Config, student: DecoderConfig, mesh: Mesh) -> dict[str, int] | None:
    """Bytes of a device that writing takes beside state and teacher; None where nobody writes.

        cache    2 * layers * kv_heads * head_dim * bytes * slots * data.seq_len
        weights  parameters * bytes of student.compute_dtype

    Both shared out over the mesh. The cache is for prompts that leave just enough room.

    Args:
      config: of the run.
      student: its shape.
      mesh: of the devices.
    """
    rollout = config.rollout
    if rollout is None:
        return None
    kept = config.student.compute_dtype if rollout.cache_dtype == "auto" else rollout.cache_dtype
    number = jnp.dtype(kept).itemsize
    a_token = 2 * student.layers * student.kv_heads * (student.head_dim * number)
    a_token += 2 * student.layers * student.kv_heads * 4 * (kept == "int8")  # scales
    slots, tensor = rollout.slots_on(row_parts(mesh)), mesh.shape["tensor"]
    copy = count_parameters(student) * jnp.dtype(config.student.compute_dtype).itemsize
    return {
        "slots": slots,
        "cache": a_token * slots * cache_length(config.data.seq_len) // (row_parts(mesh) * tensor),
        "weights": copy // (row_parts(mesh) // mesh.shape["data"] * tensor),
    }


def feed_of(
    config: Config,
    models: participants.Models,
    prompts: Prompts,
    mesh: Mesh,
    *,
    asked: Teaching,
    corpus: Feed | None,
    folder: pathlib.Path,
    params_of: Callable[[Any], Any],
    left_out: Callable[[], Sequence[tuple[int, int]]],
    stop: Callable[[], bool],
    hooks: Hooks,
) -> RolloutFeed:
    """The batches of a run whose student writes.

    Args:
      config: of the run.
      models: who takes part.
      prompts: what is answered.
      mesh: of all devices.
      asked: whom the method asks.
      corpus: the batches of data.train, or None.
      folder: of the training, where is written down what a server says.
      params_of: state -> the student's parameters, adapters in place.
      left_out: rows that no batch holds, as they are now.
      stop: whether this process was asked to stop.
      hooks: what the caller handed in.
    """
    rollout = config.rollout
    assert rollout is not None, "only asked for where there are rollouts"
    # Of other vocabularies the likely tokens cannot be compared.
    signal, second, teaching = None, models.second, models.teaching
    if isinstance(teaching, Online) and models.pairing.columns is None and second is None:
        signal = teaching.signal()
    servers = served(asked)
    return RolloutFeed(
        plan_of(config),
        prompts,
        writer_of(config, models, prompts, mesh, stop, hooks),
        corpus=corpus,
        params_of=params_of,
        shape=row_shape(config, models, servers)
        | {"sampler": methods.of(config.method).reads_sampler}
        | ({} if second is None else {"second": (second.seq_len, second.codec.pad)}),
        unit=row_parts(mesh) * config.train.micro_batches,
        rows=lambda size: local_rows(mesh, size),
        left_out=left_out,
        replay=_replay_of(config),
        recalled=config.guards.nonfinite.recalled,
        difference=difference.of_batches(
            forward_pass_of(config, models, signal),
            None if signal is None else teaching.params,
            models.tokenizer,
            lambda tree: place(tree, mesh),
        ),
        recorded=recorded(config.train.log_every, config.train.steps),
        scores=served_teacher.scores_of(
            servers, models.vocab, folder, most=rollout.distilled_tokens, stop=stop, hooks=hooks
        ),
        leaks=oneself.leaks_of(models.teaching, models.tokenizer),
        aligner=None if second is None else Aligner(rollout.distilled_tokens),
    )


def forward_pass_of(
    config: Config, models: participants.Models, teacher: TeacherFunction | None = None
) -> difference.ForwardPass:
    """How a step of the run computes the student, and the teacher where it is given."""
    student = config.student
    return difference.ForwardPass(
        models.student.config,
        models.vocab,
        jnp.dtype(student.compute_dtype),
        student.attention,
        quantize.of(student.quantize),
        teacher,
    )


def row_shape(
    config: Config, models: participants.Models, servers: Iterable[str | None]
) -> dict[str, Any]:
    """What rows of answers are made with, by the names of `rollouts.rows.rows_of`."""
    rollout = config.rollout
    assert rollout is not None, "only asked for where there are rollouts"
    return {
        "seq_len": config.data.seq_len,
        "pad": prepare(models.tokenizer).pad,
        "packing_by": config.data.packing,
        "distilled": rollout.distilled_tokens,
        "routing": routing.of(config),
        "layout": routing.layout(config),
        "servers": [name for name in servers if name],
        **oneself.rows(models.context),
    }


def _replay_of(config: Config) -> ReplayBuffer | None:
    """The buffer and the share that adapts; None where the share stays as it is."""
    rollout, recalled = config.rollout, config.guards.nonfinite.recalled
    assert rollout is not None, "only asked for where there are rollouts"
    if rollout.replay is None:
        return None
    adapts = rollout.replay.model_dump()
    settings = ReplaySettings(start=rollout.share, updates=config.train.steps, **adapts)
    return ReplayBuffer(settings, config.seed, recalled * rollout.answers)
