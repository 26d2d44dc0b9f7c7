"""The teacher of a run, of whatever kind: what it says in the step, its parameters, its cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdistill import methods, teachers
from jaxdistill.compress import quantize
from jaxdistill.config.models import Student, Teacher
from jaxdistill.config.server import Api
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.records import teacher_key
from jaxdistill.data.teacher_cache import taught
from jaxdistill.evaluate import speed
from jaxdistill.methods.routed import Routed
from jaxdistill.models import Model, count_parameters, forward_flops_per_token, host, random
from jaxdistill.references import load_any
from jaxdistill.rollouts.rows import empty_scores
from jaxdistill.run import shapes
from jaxdistill.run.pairing import Pairing
from jaxdistill.run.stored import Stored
from jaxdistill.sharding import TEACHER_RULES
from jaxdistill.train.state import abstract_params

_SUMMED = ("parameters", "parameters_non_embedding", "bytes")  # over several teachers


@runtime_checkable
class Teaching(Protocol):
    """A teacher of a run: every kind answers the same questions.

    Attributes:
      compared: whether held-out text can be compared with what it says.
      whole: whether it gives whole rows of its probabilities, so that its own row can be measured.
    """

    @property
    def compared(self) -> bool: ...
    @property
    def whole(self) -> bool: ...

    @property
    def params(self) -> Any:
        """What the step takes for it."""

    def abstract_params(self, mesh: Mesh) -> Any:
        """The shapes and places of `params`."""

    def loaded(self, mesh: Mesh) -> "Teaching":
        """The same with `params` on the mesh.

        Raises:
          ModelError, ConfigError, DamagedError: if they cannot be read, or are others.
        """

    def signal(
        self, objective: methods.Objective | None = None
    ) -> teachers.TeacherFunction | Routed:
        """What says what it says of a batch: to an objective, or for measuring, at T = 1."""

    def silent(self) -> teachers.TeacherFunction | Routed:
        """The same of one that says nothing, for rows that it reads."""

    def beside(self, data: Mapping[str, Dataset], tokenizer: Any) -> Mapping[str, Dataset]:
        """The data sets with what is stored of it; as they are, where nothing is."""

    def empty(self, length: int, theirs: int) -> dict[str, Any]:
        """What a row of padding carries for it: of `length` tokens, which it reads as `theirs`."""

    def flops_per_token(self, length: int, theirs: int) -> float:
        """FLOPs for each token of the student's rows, which it reads as rows of `theirs` tokens."""

    def described(self) -> dict[str, Any]:
        """Where it comes from; and its size, where that is known."""

    def size(self) -> Mapping[str, int | float]:
        """Parameters and bytes, as `speed.size` has them; {} of one that computes elsewhere."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """What most kinds have in common: rows carry nothing for them, and the step takes nothing."""

    @property
    def compared(self) -> bool:
        return False

    @property
    def whole(self) -> bool:
        return False

    @property
    def params(self) -> Any:
        return None

    def abstract_params(self, mesh: Mesh) -> Any:
        return None

    def loaded(self, mesh: Mesh) -> Any:
        return self

    def silent(self) -> teachers.TeacherFunction:
        return teachers.none

    def beside(self, data: Mapping[str, Dataset], tokenizer: Any) -> Mapping[str, Dataset]:
        return data

    def empty(self, length: int, theirs: int) -> dict[str, Any]:
        return {}

    def flops_per_token(self, length: int, theirs: int) -> float:
        return 0.0

    def described(self) -> dict[str, Any]:
        return {}

    def size(self) -> Mapping[str, int | float]:
        return {}


class Nobody(Plain):
    """No teacher: the data alone."""

    def signal(self, objective: methods.Objective | None = None) -> teachers.TeacherFunction:
        return teachers.none


@dataclasses.dataclass(frozen=True)
class Served(Plain):
    """A server, which is asked before the step about what the student wrote."""

    api: Api

    @property
    def params(self) -> Any:
        return {}

    def abstract_params(self, mesh: Mesh) -> Any:
        return {}

    def signal(self, objective: methods.Objective | None = None) -> teachers.TeacherFunction:
        return teachers.served

    def empty(self, length: int, theirs: int) -> dict[str, Any]:
        return {taught.LEAF: empty_scores(length)}

    def described(self) -> dict[str, Any]:
        return {"source": self.api.model}


@dataclasses.dataclass(frozen=True)
class Online(Plain):
    """A model in the step.

    Attributes:
      given: its section.
      model: in the ids of the run; without parameters until it is loaded.
      seed: of its weights, where they are random.
      network: whether the Hub may be asked.
      pairing: how the run's ids are put into its own.
      second_view: whether it reads the documents in its own tokens.
    """

    given: Teacher
    model: Model
    seed: int
    network: bool
    pairing: Pairing = Pairing()
    second_view: bool = False

    @property
    def compared(self) -> bool:
        return True

    @property
    def whole(self) -> bool:
        return True

    @property
    def params(self) -> Any:
        return self.model.params

    def abstract_params(self, mesh: Mesh) -> Any:
        return self.held(mesh)

    def held(self, mesh: Mesh) -> Any:
        """The shapes and places of the model's parameters on a mesh."""
        dtype, rules = jnp.dtype(self.given.dtype), TEACHER_RULES[self.given.sharding]
        params = abstract_params(self.model.config, dtype, mesh, rules)
        params = self.pairing.abstract(params, mesh)
        rounded = shapes.teacher_rounded(self.given, self.network)
        params = params if rounded is None else quantize.abstract(params, rounded)
        return host.abstract(params) if self.given.offload else params

    def loaded(self, mesh: Mesh) -> "Online":
        given, rounded = self.given, quantize.of(self.given.quantize)
        if given.random:
            as_made = self.pairing.as_loaded(self.model)
            assert as_made is not None
            model = random(as_made.config, self.seed, given.dtype, mesh)
        else:
            model = load_any(
                shapes.source(given),
                dtype=given.dtype,
                mesh=mesh,
                tokenizer=False,
                allow_network=self.network,
                rounded=rounded,
                offload=given.offload,
            )
        if rounded is not None and given.random:
            model = quantize.quantized(model, rounded)
        elif rounded is not None:
            model = dataclasses.replace(model, source=f"{rounded} of {model.source}")
        if given.offload:
            model = dataclasses.replace(model, params=host.waiting(model.params))
        model = dataclasses.replace(model, tokenizer=self.model.tokenizer)
        loaded = dataclasses.replace(self, model=self.pairing.seated(model))
        if given.sharding == "fsdp":
            return loaded
        places = jax.tree.map(lambda leaf: leaf.sharding, loaded.held(mesh))
        params = jax.tree.map(_moved, loaded.model.params, places)
        return dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, params=params))

    def signal(self, objective: methods.Objective | None = None) -> teachers.TeacherFunction:
        return teachers.online(
            self.model.config,
            compute_dtype=jnp.dtype(self.given.dtype),
            attention=self.given.attention,
            rules=TEACHER_RULES[self.given.sharding],
            taps=() if objective is None else objective.teacher_taps,
            relations=() if objective is None else objective.teacher_relations,
            second_view=self.second_view,
        )

    def flops_per_token(self, length: int, theirs: int) -> float:
        return forward_flops_per_token(self.model.config, theirs) * theirs / length

    def described(self) -> dict[str, Any]:
        return {"source": self.model.source, "parameters": count_parameters(self.model.config)}

    def size(self) -> Mapping[str, int | float]:
        return speed.size(self.model.config, self.model.params)


def _moved(array: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
    """The array where it shall lie; where it lay before it is given up."""
    if array.sharding.is_equivalent_to(place, array.ndim):
        return array
    moved = jax.block_until_ready(jax.jit(lambda array: array, out_shardings=place)(array))
    array.delete()
    return moved


@dataclasses.dataclass(frozen=True)
class StudentStart(Plain):
    """The student before the first step, which stays as it was.

    Attributes:
      section: the student's options.
      model: its copy; without parameters until it is made.
    """

    section: Student
    model: Model

    @property
    def params(self) -> Any:
        return self.model.params

    def abstract_params(self, mesh: Mesh) -> Any:
        dtype, base = jnp.dtype(self.section.compute_dtype), quantize.of(self.section.base)
        params = abstract_params(self.model.config, dtype, mesh)
        return params if base is None else quantize.abstract(params, base)

    def signal(self, objective: methods.Objective | None = None) -> teachers.TeacherFunction:
        return teachers.online(
            self.model.config,
            compute_dtype=jnp.dtype(self.section.compute_dtype),
            attention=self.section.attention,
        )

    def flops_per_token(self, length: int, theirs: int) -> float:
        return forward_flops_per_token(self.model.config, length)


@dataclasses.dataclass(frozen=True)
class Several:
    """Several teachers by name, of which each record has one.

    Attributes:
      each: by name.
      normalise: `token` or `teacher`, as `methods.routed.Routed` has it.
    """

    each: Mapping[str, Online | Stored | Served]
    normalise: str = "token"

    @property
    def compared(self) -> bool:
        return all(one.compared for one in self.each.values())

    @property
    def whole(self) -> bool:
        return all(one.whole for one in self.each.values())

    @property
    def params(self) -> dict[str, Any]:
        return {name: one.params for name, one in self.each.items()}

    def abstract_params(self, mesh: Mesh) -> dict[str, Any]:
        return {name: one.abstract_params(mesh) for name, one in self.each.items()}

    def loaded(self, mesh: Mesh) -> "Several":
        loaded = {name: one.loaded(mesh) for name, one in self.each.items()}
        return dataclasses.replace(self, each=loaded)

    def signal(self, objective: methods.Objective | None = None) -> Routed:
        signals = {name: one.signal(objective) for name, one in self.each.items()}
        return Routed(signals, "token" if objective is None else self.normalise)

    def silent(self) -> Routed:
        return Routed(dict.fromkeys(self.each, teachers.none))

    def beside(self, data: Mapping[str, Dataset], tokenizer: Any) -> Mapping[str, Dataset]:
        stores = {name: one.opened for name, one in self.each.items() if isinstance(one, Stored)}
        if not stores:
            return data
        return {name: taught.beside(rows, stores, tokenizer) for name, rows in data.items()}

    def empty(self, length: int, theirs: int) -> dict[str, Any]:
        carried = {name: one.empty(length, theirs) for name, one in self.each.items()}
        carried = {name: one[taught.LEAF] for name, one in carried.items() if one}
        return {taught.LEAF: carried} if carried else {}

    def flops_per_token(self, length: int, theirs: int) -> float:
        """On an average of their tokens."""
        flops = [one.flops_per_token(length, theirs) for one in self.each.values()]
        return sum(flops) / len(flops)

    def described(self) -> dict[str, Any]:
        return {name: one.described() for name, one in self.each.items()}

    def size(self) -> Mapping[str, int | float]:
        sizes = [size for one in self.each.values() if (size := one.size())]
        return {name: sum(one[name] for one in sizes) for name in _SUMMED}


def by_key(teaching: Teaching) -> dict[str, Teaching]:
    """The teachers of a run by their keys in the configuration."""
    if isinstance(teaching, Several):
        return {teacher_key(name): one for name, one in teaching.each.items()}
    return {"teacher": teaching}


def names(teaching: Teaching) -> tuple[str, ...]:
    """The names of several teachers; () of one."""
    return tuple(teaching.each) if isinstance(teaching, Several) else ()


def online(teaching: Teaching) -> dict[str, Online]:
    """Those in the step, by their keys."""
    return {key: one for key, one in by_key(teaching).items() if isinstance(one, Online)}


def stored(teaching: Teaching) -> dict[str, Stored]:
    """Those whose answers are stored, by their keys."""
    return {key: one for key, one in by_key(teaching).items() if isinstance(one, Stored)}


def served(teaching: Teaching) -> dict[str | None, Api]:
    """The servers that are asked, by the names of several teachers; None is the one teacher's."""
    if isinstance(teaching, Several):
        return {name: one.api for name, one in teaching.each.items() if isinstance(one, Served)}
    return {None: teaching.api} if isinstance(teaching, Served) else {}
