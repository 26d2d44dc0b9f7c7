"""What a run is: the facts that must stay the same, and what RUN.json says of its parts."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jaxdistill.models import count_parameters
from jaxdistill.run import changes, participants, teaching
from jaxdistill.run.folder import describe_machine, fingerprint
from jaxdistill.run.texts import RunData


def fingerprints(
    settings: Mapping[str, Any], models: participants.Models, texts: Mapping[str, RunData]
) -> dict[str, str]:
    """What a run is made of: `changes.RULES` says which of it must stay the same.

    Args:
      settings: of the configuration, section by section.
      models: who takes part.
      texts: all that it reads, by name.
    """
    prints = {f"data.{name}": one.fingerprint for name, one in texts.items()}
    prints["tokenizer"] = fingerprint(models.tokenizer.get_vocab())
    online = teaching.online(models.teaching)
    shaped = {key: one.model.config for key, one in online.items()}
    for name, model in {**shaped, "student": models.student.config}.items():
        prints[f"{name}.shape"] = fingerprint(dataclasses.asdict(model))
    for key, one in online.items():
        # Random weights are made anew from the seed, and on another mesh rounded otherwise.
        if one.given.random is None:
            prints[f"{key}.weights"] = changes.weights(one.model.params)
        elif key != "teacher":
            name = key.removeprefix("teachers.")
            prints[f"{key}.weights"] = fingerprint(settings["teachers"][name]["random"])
    drawn = settings["student"]["random"] or (settings["teacher"] or {}).get("random")
    if models.start is not None and not drawn:
        prints["student.start"] = changes.weights(models.start.params)
    for name, stored in teaching.stored(models.teaching).items():
        if stored.store is not None:
            prints[f"{name}.cache"] = fingerprint(dict(stored.store.identity))
    prints |= changes.facts_of(settings)
    if prune := settings["student"]["prune"]:
        file = pathlib.Path(prune["importance"])
        prints["student.prune.importance"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return prints


def describe(models: participants.Models, mesh: Mesh) -> dict[str, Any]:
    """What RUN.json says of the run's models and of the machine."""
    parts: dict[str, Any] = {}
    if described := models.teaching.described():
        parts["teachers" if teaching.names(models.teaching) else "teacher"] = described
    student = models.student
    parts["student"] = {"source": student.source, "parameters": count_parameters(student.config)}
    if vocabularies := models.pairing.lines():
        parts["vocabularies"] = vocabularies
    return parts | describe_machine(list(mesh.devices.flat), mesh.shape)
