"""Asks a teacher on this mesh about all texts of a configuration, and stores its answers."""

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
from jaxdistill import agree
from jaxdistill.config import Config
from jaxdistill.data import batching
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.teacher_cache import catalog, parts, work
from jaxdistill.data.teacher_cache.formats import HIDDEN, Format
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.errors import ModelError
from jaxdistill.evaluate import answers_to_store
from jaxdistill.evaluate.answers_to_store import KEYS
from jaxdistill.formats.config_json import write_config
from jaxdistill.models import Model
from jaxdistill.run import changes, participants, stored
from jaxdistill.run.capture_progress import CaptureProgress
from jaxdistill.run.teaching import Online
from jaxdistill.sharding import batch_sharding, local_rows, replicated
from jaxdistill.train.step import place

log = logging.getLogger(__name__)


class Capture:
    """A teacher on the mesh, and the store that its answers go to."""

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
        own = [number for number, owner in enumerate(owners) if owner == jax.process_index()]
        pending = [self._ask(part[0], data)]
        kept: list[dict[str, np.ndarray]] = []
        failure: ModelError | None = None  # told to all: no other may wait for this one's batches
        for number, batch in enumerate(part):
            answers = pending.pop()
            if number + 1 < len(part):  # the next is on its way while this one is taken in
                pending.append(self._ask(part[number + 1], data))
            try:
                here = _local(answers)
                for place in own:
                    kept += self._taken(batch[place], here, place) if place < len(batch) else []
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
    numbers: dict[str, dict[int, np.ndarray]] = {}
    for name, array in answers.items():
        rows = numbers.setdefault(name, {})
        for shard in array.addressable_shards:
            first = shard.index[0].start or 0
            if first not in rows:
                values = np.asarray(shard.data)
                rows |= {first + place: row for place, row in enumerate(values)}
    return numbers


def _whole_head(teacher: Model, vocab: int, mesh: Mesh) -> np.ndarray:
    """The rows of the teacher's head that are tokens, in every process."""
    head = teacher.params["embedding" if teacher.config.tied_head else "head"]
    take = jax.jit(lambda array: array[:vocab], out_shardings=replicated(mesh))
    return np.asarray(take(head).addressable_data(0))
