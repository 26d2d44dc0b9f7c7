"""What a run is: the facts that must stay the same, and what RUN.json says of its parts."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jaxdistill.config.server import Api
from jaxdistill.models import count_parameters
from jaxdistill.run import changes, participants, routing
from jaxdistill.run.folder import describe_machine, fingerprint
from jaxdistill.run.stored import Stored
from jaxdistill.run.texts import Text


def fingerprints(
    settings: Mapping[str, Any], models: participants.Models, texts: Mapping[str, Text]
) -> dict[str, str]:
    """What a run is made of: `changes.RULES` says which of it must stay the same.

    Args:
      settings: of the configuration, section by section.
      models: who takes part.
      texts: all that it reads, by name.
    """
    prints = {f"data.{name}": one.fingerprint for name, one in texts.items()}
    prints["tokenizer"] = fingerprint(models.tokenizer.get_vocab())
    several = routing.keyed(routing.online(models.teachers))
    for name, model in {"teacher": models.teacher, "student": models.student, **several}.items():
        if model is not None:
            prints[f"{name}.shape"] = fingerprint(dataclasses.asdict(model.config))
    # Random weights are made anew from the seed, and on another mesh rounded otherwise.
    if models.teacher is not None and not settings["teacher"]["random"]:
        prints["teacher.weights"] = changes.weights(models.teacher.params)
    for name, teacher in routing.online(models.teachers).items():
        shape = settings["teachers"][name]["random"]
        found = changes.weights(teacher.params) if shape is None else fingerprint(shape)
        prints[f"teachers.{name}.weights"] = found
    drawn = settings["student"]["random"] or (settings["teacher"] or {}).get("random")
    if models.start is not None and not drawn:
        prints["student.start"] = changes.weights(models.start.params)
    stores = {"teacher": models.stored, **routing.keyed(routing.answers(models.teachers))}
    for name, stored in stores.items():
        if stored is not None and stored.store is not None:
            prints[f"{name}.cache"] = fingerprint(dict(stored.store.identity))
    prints |= changes.facts_of(settings)
    if prune := settings["student"]["prune"]:
        file = pathlib.Path(prune["importance"])
        prints["student.prune.importance"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return prints


def describe(models: participants.Models, mesh: Mesh) -> dict[str, Any]:
    """What RUN.json says of the run's models and of the machine."""
    parts: dict[str, Any] = {}
    for name, model in (("teacher", models.teacher), ("student", models.student)):
        if model is not None:
            parts[name] = _described(model)
    if models.teachers:
        parts["teachers"] = {name: _described(one) for name, one in models.teachers.items()}
    if models.stored is not None:
        parts["teacher"] = _described(models.stored)
    if vocabularies := models.pairing.lines():
        parts["vocabularies"] = vocabularies
    return parts | describe_machine(list(mesh.devices.flat), mesh.shape)


def _described(one: routing.Teaching) -> dict[str, Any]:
    """Where a model, or what it says, comes from; and its size, where that is known."""
    if isinstance(one, Api):
        return {"source": one.model}
    known = {} if one.config is None else {"parameters": count_parameters(one.config)}
    return {"source": one.place if isinstance(one, Stored) else one.source, **known}
