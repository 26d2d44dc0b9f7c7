"""Several teachers of a run: their shapes, signals and memory, and that each has records."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdistill import errors
from jaxdistill.config import routing as config_routing
from jaxdistill.config.models import Teacher
from jaxdistill.config.rollout import Rollout
from jaxdistill.data.prompts import Prompts
from jaxdistill.data.records import teacher_key
from jaxdistill.data.routes import TeacherRoutes
from jaxdistill.errors import ConfigError, MismatchError
from jaxdistill.models import Model
from jaxdistill.run import pairing, shapes, stored
from jaxdistill.run.stored import Stored
from jaxdistill.run.teaching import Online, Served, Several

log = logging.getLogger(__name__)


def several_of(
    teachers: Mapping[str, Teacher] | None,
    routing: config_routing.Routing | None,
    given: shapes.Given,
    tokenizer: Any,
    vocab: int,
    student: Model,
    *,
    method: Any,
    best_metric: str,
    seed: int,
) -> Several | None:
    """Several teachers without weights, once each reads the tokens of the run; None of one.

    Args:
      teachers: their sections by name, or None.
      routing: its section, or None.
      given: what the configuration says of the models.
      tokenizer: of the run.
      vocab: how many tokens it has.
      student: without weights.
      method: the options of the run's method.
      best_metric: what checkpoints are ranked by.
      seed: of the run; random teachers differ.

    Raises:
      ModelError, ConfigError: as `shapes.of`, and as `stored.of`.
      MismatchError: for one with other tokens.
    """
    if teachers is None:
        return None

    def one(name: str, teacher: Teacher, place: int) -> Online | Stored | Served:
        key = teacher_key(name)
        if teacher.served:
            assert teacher.api is not None, "that is what served says"
            return Served(teacher.api)
        its_shape = shapes.teacher_of(dataclasses.replace(given, teacher=teacher))
        shape, best = shapes.ended(its_shape, tokenizer), best_metric
        answers = stored.of(teacher, method, shape, tokenizer, vocab, best_metric=best, key=key)
        if answers is not None:
            return answers
        assert shape is not None, "the configuration gives every teacher a source"
        _check_tokens(key, shape, given, tokenizer, student, best)
        return Online(teacher, shape, seed + place + 1, given.network)

    found = {name: one(name, its, place) for place, (name, its) in enumerate(teachers.items())}
    return Several(found, "token" if routing is None else routing.normalise)


def _check_tokens(
    key: str, shape: Model, given: shapes.Given, tokenizer: Any, student: Model, best_metric: str
) -> None:
    """One of several teachers reads what the run writes.

    Raises:
      MismatchError: if it has other tokens.
    """
    pairs, seated = pairing.of(
        tokenizer,
        shape,
        student,
        born=given.student,
        named=given.tokenizer.from_,
        needs_teacher=True,
        best_metric=best_metric,
    )
    if pairs.teacher is not None or seated is None or _reads_less(pairs):
        raise MismatchError(
            f"{key} ({shape.source}): its tokens are not those of the run "
            f"({pairs.pairs['teacher']}), and several teachers share one vocabulary: take one "
            "with the tokenizer of the run"
        )


def _reads_less(pairs: pairing.Pairing) -> bool:
    """Whether a model lacks a row for a token of the run."""
    return "teacher" in pairs.pairs and bool(pairs.pairs["teacher"].unreadable)


def check(
    routing: TeacherRoutes | None,
    rollout: Rollout | None,
    data: Mapping[str, Any],
    prompts: Prompts | None,
) -> None:
    """Every teacher has something to teach; held-out records that some lack are told.

    Args:
      routing: who the records may be for, or None.
      rollout: its section, or None.
      data: rows by name.
      prompts: what the student answers, or None.

    Raises:
      ConfigError: naming those that no record is for, and how many the others have.
    """
    if routing is None:
        return
    taught, told = dict.fromkeys(routing.names, 0), []
    if "train" in data:
        read = rollout is None or rollout.reads
        unread = "" if read else ", which rollout.share = 1 leaves unread"
        for name, count, tokens in data["train"].teachers:
            taught[name] += count * read
            told.append(f"{name}: {count} rows, {tokens} tokens{unread}")
    if rollout is not None and prompts is not None:
        asked = [routing.names.index(one.notes["teacher"]) + 1 for one in prompts.prompts]
        unread = "" if rollout.writes else ", which rollout.share = 0 leaves unanswered"
        for name, count in routing.counted(asked).items():
            taught[name] += count * rollout.writes
            told.append(f"{name}: {count} prompts{unread}")
    errors.check(_unused(taught, "; ".join(told)))
    log.info("teachers: %s", "; ".join(told))
    for name, count, _ in data["eval"].teachers:
        if not count:
            log.warning("teachers.%s: no held-out record is for it: it is not measured", name)


def _unused(taught: Mapping[str, int], told: str) -> Iterator[ConfigError]:
    for name, count in taught.items():
        if not count:
            yield ConfigError(
                f"teachers.{name}: no record is for it ({told}): remove it, or name it in the "
                "field `teacher` of records, or as data.train.N.teacher"
            )
