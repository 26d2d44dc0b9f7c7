"""What a start reads, once, and checks before anything is written."""

import dataclasses
import sys
import types
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jaxdistill import agree, methods
from jaxdistill.config import Config
from jaxdistill.config import routing as routed
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.prompts import Prompts
from jaxdistill.errors import ConfigError
from jaxdistill.run import (
    on_policy,
    participants,
    rewarded,
    routing,
    served_teacher,
    setup,
    stages,
    teaching,
    terminal,
    texts,
)
from jaxdistill.run.texts import RunData


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a start reads, once, before anything is written.

    Attributes:
      mesh: of all devices.
      models: shapes and tokenizer, without weights.
      data: the training and the held-out rows.
      taught: the same with what stored teachers said of them, where there are some.
      prompts: what the student answers, where it writes.
      questions: held-out ones, of which its rewards are measured.
    """

    mesh: Mesh
    models: participants.Models
    data: Mapping[str, Dataset]
    taught: Mapping[str, Dataset]
    prompts: Prompts | None = None
    questions: Prompts | None = None

    @property
    def texts(self) -> dict[str, RunData]:
        """All that the run reads, by its name in the section `data`."""
        asked = {"prompts": self.prompts, "questions": self.questions}
        return {**self.data, **{name: one for name, one in asked.items() if one is not None}}


def read(
    config: Config, mesh: Mesh, verifiers: Mapping[str, Any] = types.MappingProxyType({})
) -> Inputs:
    """Reads small files and data, and checks all that they can tell.

    Args:
      config: of the run.
      mesh: of all devices.
      verifiers: functions that were handed in.
    """
    network, routes = config.security.allow_network, routed.of(config)
    models = agree.together(lambda: participants.shapes_of(config, mesh))
    parts = stages.of(config.teacher, config.student, config.method, config.train.steps)
    facts = setup.facts_of(config, models)
    agree.together(lambda: stages.check(parts, config.method, facts))
    data = agree.leader_first(
        lambda: texts.data_of(
            config.data,
            models.tokenizer,
            models.second,
            routing=routes,
            context=models.context,
            network=network,
        )
    )
    agree.together(lambda: texts.check_kinds(config.method, data))
    agree.together(lambda: models.pairing.check(data))
    if agree.leads():
        for name, line in models.pairing.lines().items():
            terminal.say(f"{name}: vocabulary: {line}", sys.stderr)
    taught = agree.together(lambda: models.teaching.beside(data, models.read[0]))
    prompts, questions = agree.together(lambda: _prompts(config, models, mesh, verifiers))
    agree.together(lambda: routing.check(routes, config.rollout, data, prompts))
    if methods.of(config.method).needs_teacher(config.method):
        servers, named = teaching.served(models.teaching), config.tokenizer.from_
        check = lambda: served_teacher.check(servers, models.tokenizer, models.vocab, named)
        agree.by_leader(check)
    return Inputs(mesh, models, data, taught, prompts, questions)


def _prompts(
    config: Config, models: participants.Models, mesh: Mesh, verifiers: Mapping[str, Any]
) -> tuple[Prompts | None, Prompts | None]:
    """What the student answers, once it can, and held-out questions; None where there are none."""
    if config.rollout is None:
        if verifiers:
            raise ConfigError(f"verifiers = {', '.join(verifiers)}: there is no section reward")
        return None, None
    room = config.data.seq_len - config.rollout.max_new_tokens
    network = config.security.allow_network
    prompts = texts.prompts_of(
        config.data,
        room,
        models.tokenizer,
        models.second,
        context=models.context,
        routing=routed.of(config),
        network=network,
    )
    on_policy.check(config, models, prompts, mesh)
    rewarded.check(config, prompts, verifiers)
    if config.reward is None or (held_out := config.reward.held_out) is None:
        return prompts, None
    questions = texts.prompts_of(
        config.data, room, models.tokenizer, network=network, questions=held_out.prompts
    )
    questions = questions.first(held_out.limit)
    on_policy.check(config, models, questions, mesh)
    rewarded.check(config, questions, verifiers, "reward.held_out.prompts")
    return prompts, questions
