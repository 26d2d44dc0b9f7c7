"""A stored teacher in a run: opened, compared with the configuration, its head on the mesh."""

import dataclasses
import hashlib
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdistill import methods, teachers
from jaxdistill.compress import quantize
from jaxdistill.config.models import Teacher
from jaxdistill.data import rendering
from jaxdistill.data.codec import prepare, tokenizer_fingerprint
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.teacher_cache import catalog, formats, taught
from jaxdistill.data.teacher_cache.formats import Format
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import ConfigError
from jaxdistill.evaluate import speed
from jaxdistill.methods import signals
from jaxdistill.models import DecoderConfig, Model, count_parameters, decoder
from jaxdistill.references import spec_any
from jaxdistill.run.folder import fingerprint
from jaxdistill.sharding import shardings


@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored teacher.

    Attributes:
      place: its folder or URL.
      config: the teacher's shape; None where a server was asked.
      dtype: that it computed in.
      format: what is stored.
      store: None while a run is only planned, and nobody was asked yet.
      temperature: T of the method's loss, which known tokens are given at.
      params: what the step takes in place of the teacher's parameters: of `hidden` the head.
    """

    place: str
    config: DecoderConfig | None
    dtype: Any
    format: Format
    store: Store | None
    temperature: float = 1.0
    params: Mapping[str, jax.Array] | None = None

    @property
    def compared(self) -> bool:
        """Held-out text can be compared with what it says."""
        return True

    @property
    def whole(self) -> bool:
        """Whether it gives whole rows of its probabilities: of a server's nobody knows the size."""
        return self.config is not None and not signals.sparse(self.format.name)

    def abstract_params(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and places of what the step takes in place of the teacher's parameters."""
        if signals.sparse(self.format.name):
            return {}
        shape = jax.ShapeDtypeStruct((self.format.vocab, self.format.embed), self.dtype)
        place = shardings(mesh, {"head": ("vocab", "embed")}, {"head": shape})["head"]
        return {"head": jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)}

    def loaded(self, mesh: Mesh) -> "Stored":
        """The same with `params` on the mesh.

        Raises:
          DamagedError: if the head is not as it was written.
        """
        abstract, params = self.abstract_params(mesh), {}
        if abstract:
            assert self.store is not None, "a run that trains has opened it"
            head, like = self.store.head(), abstract["head"]
            make = lambda index: np.asarray(head[index])
            params = {"head": jax.make_array_from_callback(like.shape, like.sharding, make)}
        return dataclasses.replace(self, params=params)

    def signal(self, objective: methods.Objective | None = None) -> teachers.TeacherFunction:
        """What the step asks; without an objective for measuring, at T = 1."""
        return teachers.cached(
            self.format,
            temperature=1.0 if objective is None else self.temperature,
            softcap=None if self.config is None else self.config.logits_softcap,
            compute_dtype=self.dtype,
        )

    def silent(self) -> teachers.TeacherFunction:
        """No teacher."""
        return teachers.none

    def empty(self, length: int, theirs: int) -> dict[str, Any]:
        """What a row of padding carries of it, in the tokens that the teacher reads."""
        return taught.empty(self.format, theirs)

    def flops_per_token(self, length: int, theirs: int) -> float:
        """FLOPs of its part of a step: of `hidden` the head's product."""
        sparse = signals.sparse(self.format.name)
        head = 0.0 if sparse else 2.0 * self.format.vocab * self.format.embed
        return head * theirs / length

    def described(self) -> dict[str, Any]:
        """Where it is; and the size of the teacher, where a model was asked."""
        known = {} if self.config is None else {"parameters": count_parameters(self.config)}
        return {"source": self.place, **known}

    def size(self) -> Mapping[str, int | float]:
        """Parameters and bytes of the teacher that was asked.

        Needs `whole`: of a server's nobody knows them.
        """
        assert self.config is not None, "whole rows are those of a model that was at hand"
        return speed.size(self.config, decoder.shapes(self.config, self.dtype))

    @property
    def opened(self) -> Store:
        """The store.

        Raises:
          ConfigError: if nobody was asked yet.
        """
        if self.store is None:
            catalog.read(Objects(self.place))
        assert self.store is not None, "what is there has been opened"
        return self.store

    def beside(self, data: Mapping[str, Dataset], tokenizer: Any) -> dict[str, Dataset]:
        """The data sets with what is stored for them.

        Raises:
          ConfigError: if nobody was asked yet.
          DataError: if segments are missing.
        """
        return {name: taught.beside(rows, self.opened, tokenizer) for name, rows in data.items()}


def spec(teacher: Teacher) -> Model | None:
    """The shape and the tokenizer that lie in a store, without weights; None of a server's answers.

    Raises:
      ConfigError, DamagedError: if there is no whole store.
    """
    assert teacher.cache is not None, "a teacher has weights, or its answers are stored"
    folder = Store(teacher.cache).teacher
    if not (folder / "config.json").is_file():  # a server does not show it
        return None
    arch, tokenizer = spec_any(str(folder), allow_network=False)
    return Model(arch, None, tokenizer, teacher.cache)


def of(
    teacher: Teacher | None,
    method: Any,
    shape: Any,
    tokenizer: Any,
    vocab: int,
    *,
    best_metric: str,
    key: str = "teacher",
) -> Stored | None:
    """The stored teacher of a section, once it can serve this run; None where it has none.

    Args:
      teacher: its section.
      method: the options of the run's method.
      shape: the teacher without weights: of `teacher.source`, or out of the store.
      tokenizer: of what the teacher reads.
      vocab: how many tokens it has.
      best_metric: what checkpoints are ranked by.
      key: of the teacher in the file, for messages.

    Raises:
      ConfigError: if the method needs more than the format holds, naming one that would do.
      MismatchError: if it was captured of another teacher, tokenizer or template.
      DamagedError: if it is not as it was written.
    """
    if teacher is None or teacher.cache is None:
        return None
    arch = None if shape is None else shape.config
    named = bool(teacher.source or teacher.random)
    temperature = signals.temperature(method) or 1.0
    if arch is not None and named and Objects(teacher.cache).get(catalog.IDENTITY) is None:
        planned = formats.choose(formats.HIDDEN, vocab=vocab, embed=arch.embed)
        found = Stored(teacher.cache, arch, jnp.dtype(teacher.dtype), planned, None, temperature)
    else:
        store = Store(teacher.cache)
        given = words(tokenizer, vocab)
        if arch is not None and named:
            given |= whose(teacher, arch)
        catalog.differing(store.place, store.identity, given)
        dtype = jnp.dtype(store.identity.get("teacher.dtype", teacher.dtype))
        found = Stored(teacher.cache, arch, dtype, store.format, store, temperature)
    _check_method(method, best_metric, found, key)
    return found


def check_weights(place: str, weights: str) -> None:
    """Compares the weights that a student is cut out of with those that were asked.

    Raises:
      MismatchError: if they differ.
    """
    known = catalog.read_identity(Objects(place))["identity"]
    catalog.differing(place, known, {"teacher.weights": weights})


def _check_method(method: Any, best: str, stored: Stored, key: str) -> None:
    """What goes with what.

    Raises:
      ConfigError: for everything that the format cannot give.
    """
    row, form = methods.of(method), stored.format
    told = []
    if row.needs_teacher(method):
        for path, rule in signals.problems(method, row.reads(method), form.name, form.temperatures):
            told.append(f"{'.'.join(['method', *map(str, path)])}: {rule}")
    if signals.sparse(form.name) and best in ("eval/kl_t1", "eval/agree_top1"):
        told.append(
            f"checkpoint.best_metric: {best} reads whole rows, which the format {form.name} does "
            "not hold: use eval/loss, or capture with --format hidden"
        )
    if told:
        raise ConfigError("\n".join(f"{line} ({key}.cache = {stored.place})" for line in told))


def sizes(
    tokens: int, stored: Stored | None, vocab: int, embed: int | None
) -> dict[str, Any] | None:
    """How large the teacher's answers are, as they are stored or in the usual formats.

    Args:
      tokens: that the run reads, in the tokens of the teacher.
      stored: the stored teacher.
      vocab: tokens of the vocabulary that the teacher reads.
      embed: width of the teacher's hidden states; None without a teacher.

    Returns:
      tokens: that the run reads, which is at most what is asked; bytes_per_token by format. None
      without a teacher.
    """
    if stored is not None:
        forms = [stored.format]
    elif embed is not None:
        forms = [formats.choose(name, vocab=vocab, embed=embed) for name in formats.NAMES]
    else:
        return None
    named = {f"{one.name} {one.k or ''}".strip(): one.bytes_per_token() for one in forms}
    return {"tokens": tokens, "bytes_per_token": named}


def put_tokenizer(objects: Objects, tokenizer: Any) -> None:
    """Writes a tokenizer's files into a store, so that a run needs nothing else of the teacher."""
    with tempfile.TemporaryDirectory(prefix="jaxdistill-teacher-") as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(pathlib.Path(folder).iterdir()):
            objects.put(catalog.TEACHER + file.name, file.read_bytes())


def words(tokenizer: Any, vocab: int) -> dict[str, Any]:
    """The fields of an identity that decide which tokens a text is."""
    codec = prepare(tokenizer)
    template = rendering.template_of(tokenizer)
    return {
        "version": formats.VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "tokenizer.tokens": vocab,
        "template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "text": {"begins": list(codec.prefix), "ends": codec.end},
    }


def whose(teacher: Teacher, arch: DecoderConfig) -> dict[str, Any]:
    """The fields of an identity that say which teacher it is, but for its weights."""
    return {
        "teacher.config": fingerprint(dataclasses.asdict(arch)),
        "teacher.dtype": teacher.dtype,
        "teacher.quantize": quantize.written(teacher.quantize),
    }
