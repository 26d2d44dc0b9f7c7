"""A teacher on devices of its own: it reads a batch before the step, its hidden states are sent.

To the step it is a stored teacher of hidden states. JAX returns before a program has run, and a run
waits for a step when the next one is under way: what is sent is of one step ahead.

Of several processes each has devices of both meshes, and the same rows on both: hidden states never
leave their process.
"""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill import agree, errors, methods, rules, teachers, xla_options
from jaxdistill.config.ahead import KEY, TeacherMesh
from jaxdistill.config.models import Teacher
from jaxdistill.data.teacher_cache import formats, taught
from jaxdistill.data.teacher_cache.formats import HIDDEN, Format
from jaxdistill.errors import ConfigError
from jaxdistill.models import DecoderConfig
from jaxdistill.models.vocabulary import BIAS
from jaxdistill.run.teaching import Online, Teaching
from jaxdistill.sharding import (
    EXPERT,
    TEACHER_RULES,
    batch_sharding,
    make_mesh,
    replicated,
    row_parts,
    rows_by_process,
    shardings,
)
from jaxdistill.train.step import TEACHER, PerShape, place
from jaxdistill.types import Batch

_NO_MESH = Mesh(np.empty((), object), ())


def divided(
    teacher: Teacher | None, devices: Sequence[Any] | None = None
) -> tuple[Sequence[Any] | None, Mesh | None]:
    """(the devices of the run's mesh, None being all of them; the mesh of the teacher's own).

    Args:
      teacher: its section.
      devices: of the run; None: all.

    Raises:
      ConfigError: if none would be left, they do not divide over processes, or no such grid exists.
    """
    given = None if teacher is None else teacher.mesh
    if given is None:
        return devices, None
    student, own = _last_of_each(list(jax.devices() if devices is None else devices), given.devices)
    return student, _mesh(given, own)


def _last_of_each(devices: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    """(the others, the last `count` devices: as many of each process)."""
    of_process: dict[int, list[Any]] = collections.defaultdict(list)
    for device in devices:
        of_process[device.process_index].append(device)
    each, rest = divmod(count, len(of_process))
    if rest:
        raise ConfigError(
            f"{KEY}: its {count} devices do not divide over {len(of_process)} processes, each of "
            f"which has as many of them: use a multiple of {len(of_process)}"
        )
    if each >= min(map(len, of_process.values())):
        raise ConfigError(
            f"{KEY}: takes {count} of {len(devices)} devices, and the student needs some: "
            "lower its sizes"
        )
    own = [device for there in of_process.values() for device in there[-each:]]
    return [device for device in devices if device not in own], own


def _mesh(given: TeacherMesh, devices: Sequence[Any]) -> Mesh:
    try:
        return make_mesh(**given.model_dump(), devices=devices)
    except ConfigError as error:
        raise ConfigError(f"{KEY}: {str(error).removeprefix('mesh: ')}") from None


@dataclasses.dataclass(frozen=True)
class Ahead(Online):
    """A model on devices of its own.

    Attributes:
      mesh: of these.
      head: {"head": [V, D], "bias": [V] or none} on the student's devices; None until it is loaded.
    """

    mesh: Mesh = dataclasses.field(kw_only=True)
    head: Mapping[str, Array] | None = None

    @property
    def params(self) -> Any:
        return self.head

    def abstract_params(self, mesh: Mesh) -> Any:
        theirs = self._head(self.held(self.mesh))
        rules = TEACHER_RULES[self.given.sharding]
        places = shardings(mesh, {"head": ("vocab", "embed")}, {"head": theirs["head"]}, rules)
        places["bias"] = replicated(mesh)
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
            for name, leaf in theirs.items()
        }

    def _head(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What of a model's parameters makes logits of hidden states."""
        head = params["embedding"] if self.model.config.tied_head else params["head"]
        return {"head": head} | ({"bias": params[BIAS]} if BIAS in params else {})

    def loaded(self, mesh: Mesh) -> "Ahead":
        loaded = dataclasses.replace(self, model=super().loaded(self.mesh).model)
        places = jax.tree.map(lambda leaf: leaf.sharding, loaded.abstract_params(mesh))
        head = jax.tree.map(self._brought, loaded._head(loaded.model.params), places)
        return dataclasses.replace(loaded, head=head)

    def _brought(self, array: Array, place: NamedSharding) -> Array:
        """One of its arrays on the student's devices, which take their parts of a whole copy."""
        if jax.process_count() == 1:
            return jax.device_put(array, place)
        with jax.set_mesh(self.mesh):
            gather = jax.jit(lambda array: array, out_shardings=replicated(self.mesh))
            whole = jax.block_until_ready(gather(array))  # Gloo mixes up two that run at once
        return jax.block_until_ready(sent(whole, place))

    @property
    def _form(self) -> Format:
        """The hidden states as they are computed."""
        config = self.model.config
        vocab, embed = config.vocab_size, config.embed
        return formats.choose(HIDDEN, vocab=vocab, embed=embed, dtype=self.given.dtype)

    def signal(self, objective: methods.Objective | None = None) -> teachers.TeacherFunction:
        softcap, dtype = self.model.config.logits_softcap, jnp.dtype(self.given.dtype)
        return teachers.cached(self._form, softcap=softcap, compute_dtype=dtype)

    def empty(self, length: int, theirs: int) -> dict[str, Any]:
        return taught.empty(self._form, theirs)

    def described(self) -> dict[str, Any]:
        return super().described() | {"mesh": dict(self.mesh.shape)}

    def padded(self, row: Batch) -> Batch:
        """A batch of padding with what it carries of the teacher."""
        read = row.second["tokens"] if self.second_view else row.tokens
        said = self.empty(row.tokens.shape[1], read.shape[1])
        return dataclasses.replace(row, **jax.tree.map(lambda leaf: leaf[None], said))

    def reads(self, parts: int) -> PerShape:
        """(None, parameters, `read` of a batch) -> hidden states [B, L, D] on its devices.

        Args:
          parts: that a batch is read in, one after the other.
        """
        tell = super().signal()

        def read(_: None, params: Any, batch: Batch) -> Array:
            def one(part: Batch) -> Array:
                with jax.named_scope(TEACHER):
                    outputs = tell(params, None, part).outputs
                assert outputs is not None, "a model gives whole rows"
                return outputs.hidden

            if parts == 1:
                return one(batch)
            # As the step divides it: part m has rows m, m + parts, ...
            split = lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)
            hidden = jax.lax.map(one, jax.tree.map(split, batch))
            return hidden.swapaxes(0, 1).reshape(-1, *hidden.shape[2:])

        def compile(_: None, params: Any, batch: Batch) -> Any:
            with jax.set_mesh(self.mesh):
                rows = PartitionSpec(batch_sharding(self.mesh).spec[0])
                jitted = jax.jit(read, out_shardings=NamedSharding(self.mesh, rows))
                lowered = jitted.lower(None, params, batch)
                platform, size = self.mesh.devices.flat[0].platform, self.mesh.size
                # Together, as the step: nobody waits long in a program for one that compiles.
                return agree.together(lambda: xla_options.compiled(lowered, platform, size))

        return PerShape(compile)

    def read(self, batch: Batch) -> Batch:
        """What it reads of a batch; the other leaves are None."""
        fields = ("second",) if self.second_view else ("tokens", "positions", "segment_ids")
        leaves: dict[str, Any] = dict.fromkeys(one.name for one in dataclasses.fields(Batch))
        leaves |= {name: getattr(batch, name) for name in fields}
        return Batch(**leaves)


def check_meshes(
    teaching: Teaching, mesh: Mesh, models: Mapping[str, DecoderConfig], length: int
) -> None:
    """Raises where an axis of its mesh does not divide a model; the vocabulary may be any size.

    Args:
      teaching: whose teacher may have a mesh of its own.
      mesh: of all others.
      models: of the step, by name.
      length: of its rows.

    Raises:
      ConfigError: with the numbers and the sizes that would do.
    """
    if isinstance(teaching, Ahead):
        own = teaching.mesh
        count = math.lcm(row_parts(own), row_parts(mesh))
        _check_rows(rows_by_process(own, count), rows_by_process(mesh, count))
        _check_mesh(own, {who: models[who] for who in models if who == "teacher"}, KEY)
        errors.check(rules.context_axis(length, own.shape["context"], where=KEY))
        models = {who: models[who] for who in models if who != "teacher"}
    _check_mesh(mesh, models, "mesh")


def _check_rows(theirs: Mapping[int, list[int]], ours: Mapping[int, list[int]]) -> None:
    """Raises where a process has other rows of a batch on the teacher's devices."""
    for process, rows in ours.items():
        for row in sorted(set(rows) ^ set(theirs[process])):
            where = "student's" if row in rows else "teacher's"
            raise ConfigError(
                f"{KEY}: process {process} has row {row} of a batch on the {where} devices alone, "
                "and hidden states do not leave their process: let data, fsdp or expert of both "
                f"meshes span all {len(ours)} processes"
            )


def _check_mesh(mesh: Mesh, models: Mapping[str, DecoderConfig], where: str) -> None:
    tensor = mesh.shape["tensor"]
    for who, config in models.items():
        sizes = {"heads": config.heads, "kv_heads": config.kv_heads}
        sizes |= {"experts": config.experts.count} if config.experts else {"mlp": config.mlp}
        errors.check(rules.tensor_axis(tensor, who, sizes, where=where))
    experts = {who: config.experts.count for who, config in models.items() if config.experts}
    errors.check(rules.expert_axis(mesh.shape.get(EXPERT, 1), tensor, experts, where=where))


def on_own_mesh(teaching: Teaching, who: str) -> contextlib.AbstractContextManager:
    """The context of the mesh of a teacher's own devices; for other models nothing."""
    apart = isinstance(teaching, Ahead) and who == "teacher"
    return jax.set_mesh(teaching.mesh) if apart else contextlib.nullcontext()


def placing(asked: Teaching, mesh: Mesh, parts: int = 1) -> Callable[[Batch], Batch]:
    """batch of host arrays -> the batch on a mesh, with what a teacher ahead says of it.

    Nothing is waited for: its program and what it sends are under way.

    Args:
      asked: whom the program asks that reads the batch.
      mesh: of that program.
      parts: that such a teacher reads a batch in.
    """
    if not isinstance(asked, Ahead):
        return functools.partial(place, mesh=mesh)
    reads, there = asked.reads(parts), batch_sharding(mesh)

    def placed(batch: Batch) -> Batch:
        given = None, asked.model.params, place(asked.read(batch), asked.mesh)
        hidden = reads.prepare(*given)(*given)
        if asked.mesh.devices.flat[0].platform == "cpu" and jax.process_count() > 1:
            jax.block_until_ready(hidden)  # Gloo mixes up two programs that run at once
        return dataclasses.replace(place(batch, mesh), teacher={HIDDEN: sent(hidden, there)})

    return placed


def sent(array: Array, place: NamedSharding) -> Array:
    """An array whose rows alone are divided, on other devices: each gets its part from another.

    `jax.device_put` takes what is divided otherwise there through the host, and waits for it.
    """
    rows = lambda index: index[0].indices(array.shape[0])[:2]
    held = {rows(shard.index): shard.data for shard in array.addressable_shards}

    def part(device: Any, index: tuple[slice, ...]) -> Array:
        first, last = rows(index)
        sent = [
            jax.device_put(data[max(begin, first) - begin : last - begin, *index[1:]], device)
            for (begin, end), data in sorted(held.items(), key=lambda item: item[0])
            if begin < last and first < end
        ]
        return sent[0] if len(sent) == 1 else jnp.concatenate(sent)

    there = place.addressable_devices_indices_map(array.shape)
    with jax.set_mesh(_NO_MESH):  # evaluation sets that of the step, where these devices are not
        parts = [part(device, index) for device, index in there.items() if index is not None]
    return jax.make_array_from_single_device_arrays(array.shape, place, parts)


def devices(asked: Teaching, mesh: Mesh) -> list[Any]:
    """All devices that compute for a step of the mesh."""
    own = asked.mesh.devices.flat if isinstance(asked, Ahead) else ()
    return [*mesh.devices.flat, *own]
