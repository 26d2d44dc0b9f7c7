"""Asks a teacher once about all texts of a configuration, and stores it: `teacher cache`."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import Mesh

import jaxdistill
from jaxdistill import agree, commands, compilation_cache, errors, methods, processes
from jaxdistill.config import Config, preflight, routing
from jaxdistill.data import batching
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.second_view import second_rows
from jaxdistill.data.teacher_cache import catalog, formats, parts, work
from jaxdistill.data.teacher_cache.formats import HIDDEN, Format
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import ConfigError, DataError, ModelError
from jaxdistill.evaluate import answers_to_store
from jaxdistill.evaluate.answers_to_store import KEYS
from jaxdistill.formats.config_json import write_config
from jaxdistill.methods import signals
from jaxdistill.models import Model
from jaxdistill.run import (
    alike,
    changes,
    participants,
    setup,
    stored,
    teacher_cache_served,
    texts,
)
from jaxdistill.run.capture_progress import CaptureProgress
from jaxdistill.run.teaching import Online
from jaxdistill.sharding import batch_sharding, local_rows, replicated
from jaxdistill.train.step import place

log = logging.getLogger(__name__)


def capture(config: Config, options: commands.TeacherCache) -> dict[str, Any]:
    """Stores what the teacher says of the training and held-out texts, as far as it is not there.

    A part is there when it is whole: a capture that was killed goes on at the part it was in, to
    the same bytes. Several captures of shards may run at the same time.

    Args:
      config: of the run that will learn from it; its teacher is asked.
      options: what is stored, and where.

    Returns:
      place, format, bytes_per_token, and of what is asked: segments, positions, bytes; whole:
      whether nothing is lacking any more.

    Raises:
      UserError: whatever is wrong with configuration, data, teacher or store.
    """
    routes, name = routing.of(config), options.teacher
    config, output = _asking(config, options)
    compilation_cache.start(config.run.compilation_cache)
    processes.start(config.mesh.processes)
    alike.check(config.settings())
    with config.written.told():
        agree.together(lambda: errors.check(preflight.check(config, run_dir=False)))
        mesh = setup.mesh_of(config)
        models = agree.together(lambda: participants.shapes_of(config, mesh))
        data = agree.leader_first(
            lambda: texts.data_of(
                config.data,
                models.tokenizer,
                models.second,
                routing=routes,
                network=config.security.allow_network,
            )
        )
        if name is not None:
            data = {of: rows.of_teacher(name) for of, rows in data.items()}
        agree.together(lambda: _check_vocabularies(models, data))
        if models.second is not None:
            _check_rows(config, options)
            data = {of: second_rows(rows) for of, rows in data.items()}
    server = config.teacher.api if config.teacher else None
    if server is not None:
        _check_server(options)
    assert server is not None or models.teacher is not None, "the configuration has one"
    form = formats.choose(
        options.format,
        vocab=models.read[1],
        embed=models.teacher.config.embed if models.teacher else 0,
        dtype=options.dtype,
        k=options.k,
        temperatures=options.temperatures,
        draws=options.draws,
        seed=options.seed,
    )
    objects = Objects(output)
    base = Store(output) if objects.get(catalog.MANIFEST) is not None else None
    rows = work.lacking(data, base)
    found = _described(output, form, rows)
    if base is None and not rows:
        raise DataError(f"data: no position counts in the loss (loss_on: {config.data.loss_on})")
    if options.dry_run:
        return found | {"whole": not rows}
    share = options.share()
    with contextlib.ExitStack() as stack:
        agree.by_leader(lambda: stack.enter_context(catalog.alone(objects, share)))
        if server is not None:
            more = lambda: teacher_cache_served.store(
                config, server, models, form, objects, rows, share
            )
            return found | agree.by_leader(more)
        assert isinstance(models.teaching, Online), "neither stored nor served is in the step"
        teacher = agree.together(lambda: models.teaching.loaded(mesh))
        asked = _Asked(config, teacher, models, mesh, form, objects)
        agree.by_leader(asked.begin)
        return found | {"whole": asked.store(rows, data, share)}


def _asking(config: Config, options: commands.TeacherCache) -> tuple[Config, str]:
    """The configuration with the teacher that is asked, alone and online; and where it is stored.

    Raises:
      ConfigError: if it names none, or not which, or no place.
    """
    name, key = options.teacher, "teacher"
    if config.teachers is not None:
        known = ", ".join(config.teachers)
        if name not in config.teachers:
            said = "" if name is None else f"--teacher {name}: no such teacher: "
            raise ConfigError(f"{said}there are several ({known}): say which, as --teacher NAME")
        config, key = routing.each(config)[name], f"teachers.{name}"
    elif name is not None:
        raise ConfigError(f"--teacher {name}: there is no section teachers: leave it out")
    teacher = config.teacher
    if teacher is None or not (teacher.source or teacher.random or teacher.api):
        raise ConfigError(f"{key}: nobody to ask: give {key}.source, or {key}.api")
    if not (output := options.output or teacher.cache):
        raise ConfigError(f"teacher cache: give a folder with -o, or {key}.cache")
    online = teacher.model_copy(update={"cache": None})
    return config.model_copy(update={"teacher": online}), output


def _check_vocabularies(models: participants.Models, data: Mapping[str, Dataset]) -> None:
    """What is stored is in the teacher's own ids, of which the data hold no others.

    Raises:
      ConfigError, MismatchError: with what is not shared.
    """
    if models.pairing.teacher is not None:
        raise ConfigError(
            f"tokenizer.from: the teacher has another vocabulary "
            f"({models.pairing.pairs['teacher']}): a stored teacher is asked in its own ids: use "
            "tokenizer.from: teacher, or the teacher online"
        )
    models.pairing.check(data)


def _check_rows(config: Config, options: commands.TeacherCache) -> None:
    """A method that reads the teacher in its own tokens can learn from what is stored.

    Raises:
      ConfigError: naming the format that would do.
    """
    reads = methods.of(config.method).reads(config.method)
    if told := signals.problem(config.method.name, reads, options.format):
        raise ConfigError(f"method.name: {told}")


def _check_server(options: commands.TeacherCache) -> None:
    """What a server cannot say.

    Raises:
      ConfigError: for another format than topk, or for temperatures.
    """
    if options.format != formats.TOPK:
        raise ConfigError(
            f"format = {options.format}: a server says the likeliest tokens only: use topk"
        )
    if set(options.temperatures) - {1.0}:
        raise ConfigError(
            "temperatures: a server does not say log Z(T), which another T than 1 needs: leave "
            "them out"
        )


def _described(output: str, form: Format, rows: Sequence[work.CapturedRow]) -> dict[str, Any]:
    """What is to be asked, and how large it is before compression."""
    positions, tokens = sum(row.positions for row in rows), sum(row.tokens for row in rows)
    head = form.vocab * form.embed * 4 if form.name == HIDDEN else 0
    return {
        "place": output,
        "format": form.name,
        "dtype": form.dtype,
        "bytes_per_token": form.bytes_per_token(),
        "segments": sum(len(row.pieces) for row in rows),
        "positions": positions,
        "bytes": positions * form.bytes_per_token() + tokens * form.id_bytes + head,
    }


class _Asked:
    """One capture: a teacher on the mesh, and the store that its answers go to."""

    def __init__(
        self,
        config: Config,
        asked: Online,
        models: participants.Models,
        mesh: Mesh,
        form: Format,
        objects: Objects,
    ):
        teacher, section = asked.model, asked.given
        self._config, self._teacher, self._models = config, teacher, models
        self._mesh, self._form, self._objects = mesh, form, objects
        self._batch = config.train.batch_size // config.train.micro_batches
        self._identity = stored.words(*models.read) | {
            **stored.whose(section, teacher.config),
            "teacher.weights": changes.weights(teacher.params),
            "format": form.facts(),
        }
        self._step = answers_to_store.step(
            teacher.config,
            form,
            mesh,
            compute_dtype=jnp.dtype(section.dtype),
            attention=section.attention,
        )
        self._head = _whole_head(teacher, form.vocab, mesh) if form.name == HIDDEN else None

    def begin(self) -> None:
        """Makes the store, or refuses another one; the teacher's small files and head lie in it."""
        section, c, second = self._config.teacher, self._config, self._models.second
        assert section is not None
        notes = {
            "source": section.source or "random",
            "seq_len": c.data.seq_len if second is None else second.seq_len,
            "loss_on": c.data.loss_on,
            "attention": section.attention,
            "code": changes.code(),
            "jaxdistill": jaxdistill.__version__,
            "jaxlib": jaxlib.__version__,
        }
        catalog.begin(self._objects, self._identity, notes)
        small = catalog.TEACHER + "config.json"
        last = f"{catalog.TEACHER}{catalog.HEAD}/c/0/0" if self._head is not None else small
        if last in self._objects.names():
            return  # all of them are there, and another shard's capture may read them
        described = write_config(self._teacher.config, section.dtype)
        stored.put_tokenizer(self._objects, self._models.read[0])
        self._objects.put(small, json.dumps(described).encode())
        if self._head is not None:
            self._objects.put_array(catalog.TEACHER + catalog.HEAD, self._head)

    def store(
        self, rows: Sequence[work.CapturedRow], data: Mapping[str, Dataset], shard: tuple[int, int]
    ) -> bool:
        """Asks for all parts of a shard that are not whole; True once every shard's are."""
        owners = _owners(self._mesh, self._batch)
        every = list(work.in_parts(rows, self._batch, parts.rows_per_part(self._form)))
        there = set(agree.by_leader(lambda: sorted(parts.whole(self._objects))))
        own = [p for p in every[shard[0] - 1 :: shard[1]] if not work.names(p, owners) <= there]
        progress = CaptureProgress(sum(row.positions for part in own for b in part for row in b))
        for part in own:
            self._store_part(part, data, owners, progress)
        return agree.by_leader(lambda: self._end(every, owners))

    def _end(self, every: Sequence[Any], owners: Sequence[int]) -> bool:
        """Seals the store if all of it is there."""
        there = parts.whole(self._objects)
        lacking = sum(not work.names(part, owners) <= there for part in every)
        if lacking:
            log.info("%d of %d parts are other shards', and not there yet", lacking, len(every))
            return False
        catalog.seal(self._objects)
        return True

    def _store_part(
        self,
        part: Sequence[Sequence[work.CapturedRow]],
        data: Mapping[str, Dataset],
        owners: Sequence[int],
        progress: CaptureProgress,
    ) -> None:
        """Asks about the batches of a part, and writes this process's share of the answers."""
        own = [row for row, owner in enumerate(owners) if owner == jax.process_index()]
        pending = [self._ask(part[0], data)]
        kept: list[dict[str, np.ndarray]] = []
        failure: ModelError | None = None  # told to all: no other may wait for this one's batches
        for number, batch in enumerate(part):
            answers = pending.pop()
            if number + 1 < len(part):  # the next is on its way while this one is taken in
                pending.append(self._ask(part[number + 1], data))
            try:
                kept += self._taken_of(batch, own, _local(answers))
            except ModelError as error:
                failure = failure or error
            progress.add(sum(row.positions for row in batch))
        wanted = work.wanted_of(part, owners, jax.process_index())

        def write() -> None:
            if failure is not None:
                raise failure
            if wanted:
                arrays = {name: np.concatenate([one[name] for one in kept]) for name in kept[0]}
                note = parts.write(self._objects, self._form, wanted, arrays)
                progress.wrote(sum(size for size, _ in note["objects"].values()))

        agree.together(write)

    def _ask(self, batch: Sequence[work.CapturedRow], data: Mapping[str, Dataset]) -> Any:
        """The answers to a batch, not waited for."""
        like = next(iter(data.values()))
        padding = _plain(like.empty_row())
        rows, keys = [], []
        for number in local_rows(self._mesh, self._batch):
            row, key = padding, np.zeros(like.seq_len, np.uint32)
            if number < len(batch):
                one = batch[number]
                row = _plain(data[one.dataset][one.index])
                for first, wanted in one.pieces:
                    of_segment = np.frombuffer(wanted.key[:4], "<u4")[0]
                    key[first : first + len(wanted.mask)] = of_segment
            rows.append(row)
            keys.append(key)
        batch_here = dataclasses.replace(batching.stack(rows), teacher={KEYS: np.stack(keys)})
        with jax.set_mesh(self._mesh):
            return self._step(self._teacher.params, place(batch_here, self._mesh))

    def _taken_of(
        self,
        batch: Sequence[work.CapturedRow],
        own: Sequence[int],
        answers: Mapping[str, Mapping[int, np.ndarray]],
    ) -> list[dict[str, np.ndarray]]:
        """`_taken` of every row of a batch that this process stores."""
        here = [number for number in own if number < len(batch)]
        return [one for number in here for one in self._taken(batch[number], answers, number)]

    def _taken(
        self, row: work.CapturedRow, answers: Mapping[str, Mapping[int, np.ndarray]], number: int
    ) -> list[dict[str, np.ndarray]]:
        """The stored fields of the segments of a row that are wanted.

        Raises:
          ModelError: if an answer is not a number.
        """
        taken = []
        for first, wanted in row.pieces:
            places = first + np.flatnonzero(wanted.mask)
            picked = {name: rows[number][places] for name, rows in answers.items()}
            fields = answers_to_store.finish(self._form, picked)
            wrong = [name for name, values in fields.items() if self._form.unsound(name, values)]
            if wrong:
                raise ModelError(
                    f"teacher: its {wrong[0]} for data.{row.dataset} row {row.index} is not "
                    "finite, and not stored: check its weights, or give it another dtype"
                )
            taken.append(fields)
        return taken


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a teacher does not read: who wrote it, and whom it is for."""
    return {name: leaf for name, leaf in row.items() if name not in ("origin", "route")}


def _owners(mesh: Mesh, rows: int) -> list[int]:
    """Of each row of a batch the process that stores it: the first that has it."""
    shape = (rows, mesh.shape["context"])
    owner = [jax.process_count()] * rows
    for device, index in batch_sharding(mesh).devices_indices_map(shape).items():
        for row in range(rows)[index[0]]:
            owner[row] = min(owner[row], device.process_index)
    return owner


def _local(answers: Mapping[str, jax.Array]) -> dict[str, dict[int, np.ndarray]]:
    """Field -> row of the batch -> [L, ...], of the rows on this process's devices."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, array in answers.items():
        rows = found.setdefault(name, {})
        for shard in array.addressable_shards:
            first = shard.index[0].start or 0
            if first not in rows:
                values = np.asarray(shard.data)
                rows |= {first + place: row for place, row in enumerate(values)}
    return found


def _whole_head(teacher: Model, vocab: int, mesh: Mesh) -> np.ndarray:
    """The rows of the teacher's head that are tokens, in every process."""
    head = teacher.params["embedding" if teacher.config.tied_head else "head"]
    take = jax.jit(lambda array: array[:vocab], out_shardings=replicated(mesh))
    return np.asarray(take(head).addressable_data(0))
