"""Asks a teacher once about all texts of a configuration, and stores it: `teacher cache`."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill import agree, commands, compilation_cache, errors, methods, processes
from jaxdistill.config import Config, preflight, routing
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.records import teacher_key
from jaxdistill.data.second_view import second_rows
from jaxdistill.data.teacher_cache import catalog, formats, work
from jaxdistill.data.teacher_cache.formats import HIDDEN, Format
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.methods import signals
from jaxdistill.run import (
    alike,
    participants,
    setup,
    teacher_cache_served,
    texts,
)
from jaxdistill.run.teacher_cache_online import Capture
from jaxdistill.run.teaching import Online


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
        online = Capture(config, teacher, models, mesh, form, objects)
        agree.by_leader(online.begin)
        return found | {"whole": online.store(rows, data, share)}


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
        config, key = routing.each(config)[name], teacher_key(name)
    elif name is not None:
        raise ConfigError(f"--teacher {name}: there is no section teachers: leave it out")
    teacher = config.teacher
    if teacher is None or not (teacher.source or teacher.random or teacher.api):
        raise ConfigError(f"{key}: nobody to ask: give {key}.source, or {key}.api")
    if not (output := options.output or teacher.cache):
        raise ConfigError(f"teacher cache: give a folder with -o, or {key}.cache")
    online = teacher.model_copy(update={"cache": None, "mesh": None})
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
