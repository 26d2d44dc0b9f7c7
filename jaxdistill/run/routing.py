"""Several teachers of a run: their shapes, signals and memory, and that each has records."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdistill import errors, teachers
from jaxdistill.config import Config
from jaxdistill.config.server import Api
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.prompts import Prompts
from jaxdistill.data.routes import Layout, Routing
from jaxdistill.data.teacher_cache import taught
from jaxdistill.errors import ConfigError, MismatchError
from jaxdistill.methods import signals
from jaxdistill.methods.routed import Routed
from jaxdistill.models import Model, forward_flops_per_token
from jaxdistill.run import pairing, shapes, stored
from jaxdistill.run.stored import Stored

log = logging.getLogger(__name__)

Teaching = Model | Stored | Api  # in the step, before it, or while the student writes


def of(config: Config) -> Routing | None:
    """Who the records of a run may be for; None where there are not several teachers."""
    if config.teachers is None:
        return None
    default = None if config.routing is None else config.routing.default
    return Routing(tuple(config.teachers), default)


def layout(config: Config) -> Layout | None:
    """How the batches of a run lie, where it has several teachers."""
    if config.teachers is None:
        return None
    return Layout(len(config.teachers), config.train.micro_batches)


def rows(config: Config) -> int:
    """Rows of the batch that the step takes, padding between teachers among them."""
    lies = layout(config)
    return config.train.batch_size if lies is None else lies.size(config.train.batch_size)


def each(config: Config) -> dict[str, Config]:
    """The configuration as it would be with each of several teachers alone; random ones differ."""
    alone = {"teachers": None, "routing": None}
    return {
        name: config.model_copy(update={**alone, "teacher": teacher, "seed": config.seed + place})
        for place, (name, teacher) in enumerate((config.teachers or {}).items())
    }


def shapes_of(config: Config, tokenizer: Any, vocab: int, student: Model) -> dict[str, Teaching]:
    """Each of several teachers without weights, once it reads the tokens of the run.

    Raises:
      ModelError, ConfigError: as `shapes.of`, and as `stored.of`.
      MismatchError: for one with other tokens.
    """
    found: dict[str, Teaching] = {}
    for name, one in each(config).items():
        assert one.teacher is not None
        if one.teacher.served:
            assert one.teacher.api is not None, "that is what served says"
            found[name] = one.teacher.api
            continue
        shape = shapes.teacher_of(one, config.security.allow_network)
        shape = shapes.ended(shape, tokenizer)
        answers = stored.of(one, shape, tokenizer, vocab, f"teachers.{name}")
        if answers is not None:
            found[name] = answers
            continue
        assert shape is not None, "the configuration gives every teacher a source"
        pairs, seated = pairing.of(
            tokenizer,
            shape,
            student,
            born=config.student,
            named=config.tokenizer.from_,
            needs_teacher=True,
            best_metric=config.checkpoint.best_metric,
        )
        if pairs.teacher is not None or seated is None or _reads_less(pairs):
            raise MismatchError(
                f"teachers.{name} ({shape.source}): its tokens are not those of the run "
                f"({pairs.pairs['teacher']}), and several teachers share one vocabulary: take one "
                "with the tokenizer of the run"
            )
        found[name] = shape
    return found


def _reads_less(pairs: pairing.Pairing) -> bool:
    """Whether a model lacks a row for a token of the run."""
    return "teacher" in pairs.pairs and bool(pairs.pairs["teacher"].unreadable)


def check(config: Config, data: Mapping[str, Any], prompts: Prompts | None) -> None:
    """Every teacher has something to teach; held-out records that some lack are told.

    Raises:
      ConfigError: naming those that no record is for, and how many the others have.
    """
    routing = of(config)
    if routing is None:
        return
    taught = dict.fromkeys(routing.names, 0)
    told, rollout = [], config.rollout
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


def online(several: Mapping[str, Teaching]) -> dict[str, Model]:
    """Those of several teachers that are asked in the step."""
    return {name: one for name, one in several.items() if isinstance(one, Model)}


def answers(several: Mapping[str, Teaching]) -> dict[str, Stored]:
    """Those of several teachers whose answers are stored."""
    return {name: one for name, one in several.items() if isinstance(one, Stored)}


def whole(several: Mapping[str, Teaching]) -> bool:
    """Whether each of several teachers gives whole rows of its probabilities."""
    sparse = any(signals.sparse(one.format.name) for one in answers(several).values())
    return compared(several) and not sparse


def compared(several: Mapping[str, Teaching]) -> bool:
    """Whether held-out text can be compared with what each of several teachers says of it."""
    return bool(several) and not any(isinstance(one, Api) for one in several.values())


def silent(several: Mapping[str, Teaching]) -> teachers.Teacher | Routed:
    """No teacher, which still tells the rows of several apart."""
    return Routed(dict.fromkeys(several, teachers.none)) if several else teachers.none


def beside(
    several: Mapping[str, Teaching], data: Mapping[str, Dataset], tokenizer: Any
) -> Mapping[str, Dataset]:
    """The data sets with what is stored of several teachers; as they are, where nothing is.

    Raises:
      ConfigError: if somebody was not asked yet.
      DataError: if segments are missing.
    """
    stores = {name: one.opened for name, one in answers(several).items()}
    if not stores:
        return data
    return {name: taught.beside(rows, stores, tokenizer) for name, rows in data.items()}


def flops_per_token(several: Mapping[str, Teaching], length: int) -> float:
    """FLOPs of one of several teachers for a token, on an average; a server's are elsewhere."""
    flops = [forward_flops_per_token(one.config, length) for one in online(several).values()]
    flops += [one.flops_per_token() for one in answers(several).values()]
    return sum(flops) / len(several)


def keyed(named: Mapping[str, Any]) -> dict[str, Any]:
    """What is by the names of several teachers, by their keys in the configuration."""
    return {f"teachers.{name}": value for name, value in named.items()}
