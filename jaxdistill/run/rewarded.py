"""The feed of a run whose student's answers earn rewards, made from its configuration."""

import functools
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxdistill import methods
from jaxdistill.config import Config
from jaxdistill.config.reward import mixed
from jaxdistill.data.prompts import Prompts
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.reasoning import extract, judging, scorers, verifiers
from jaxdistill.reasoning.judging import Judges, WeightedVerifier
from jaxdistill.rollouts import old, siblings
from jaxdistill.rollouts.drawn import RewardPlan
from jaxdistill.rollouts.questions import Questions
from jaxdistill.rollouts.rewarded import RewardedFeed
from jaxdistill.rollouts.verdicts import Verdicts
from jaxdistill.run import on_policy, oneself, participants, served_teacher
from jaxdistill.run.teaching import Teaching, served
from jaxdistill.sharding import local_rows, row_parts
from jaxdistill.train.hooks import Hooks
from jaxdistill.train.step import place

_log = logging.getLogger(__name__)
_VOTING = {name: name for name in ("number", "choice", "yes_no", "expression")}
_VOTING["numeric"] = "number"


def check(
    config: Config, prompts: Prompts, functions: Mapping[str, Any], key: str = "data.prompts"
) -> None:
    """Refuses verifiers that do not exist, and prompts that they cannot judge.

    Args:
      config: of the run.
      prompts: what is judged.
      functions: verifiers that were handed in.
      key: of the configuration, that messages about prompts begin with.

    Raises:
      ConfigError: for a verifier, or one that was handed in and is not asked.
      DataError: for prompts without an answer, or whose answers a verifier reads nothing in.
    """
    if config.reward is None:
        if functions:
            raise ConfigError(f"verifiers = {', '.join(functions)}: there is no section reward")
        return
    for part in parts_of(config):
        judging.check(part, functions)
    if unused := set(functions) - {part.name for part in parts_of(config)}:
        raise ConfigError(
            f"verifiers = {', '.join(sorted(unused))}: not named in reward.verifiers: add "
            "{verifier: NAME} there, or leave it out"
        )
    free = {*scorers.NEED_NO_ANSWER, *functions}
    needing = [part.name for part in parts_of(config) if part.name not in free]
    judged = [prompt for prompt in prompts.prompts if prompt.judged]
    without = sum("answer" not in prompt.notes for prompt in judged)
    if needing and without:
        raise DataError(
            f"{key}: {without} of {len(judged)} prompts have no `answer`, which the "
            f"verifier {needing[0]} compares with: add it, or use format, length or a function"
        )
    for part in parts_of(config):
        if part.name in needing:
            _check_answers(part, [prompt.notes["answer"] for prompt in judged], key)


def _check_answers(part: WeightedVerifier, answers: Sequence[str], key: str) -> None:
    """Says which right answers nothing can equal.

    Raises:
      DataError: if that is so of all.
    """
    kind, letters = _kind(part), {k: v for k, v in part.options.items() if k == "choices"}
    if part.name == "numeric":
        readable = [verifiers.quantity(one)[0] is not None for one in answers]
    elif kind is not None:
        readable = [extract.is_answer(one, kind, **letters) for one in answers]
    else:
        return
    if all(readable):
        return
    example = answers[readable.index(False)][:60]
    told = f"{key}: in {readable.count(False)} of {len(answers)} answers, such as {example!r}, the "
    told += f"verifier {part.name} finds nothing, so that nobody is ever right"
    if not any(readable):
        raise DataError(f"{told}: use another verifier, or write the answers as it reads them")
    _log.warning("%s", told)


def parts_of(config: Config) -> list[WeightedVerifier]:
    """The verifiers of a run."""
    assert config.reward is not None, "only asked for where there are rewards"
    return [
        WeightedVerifier(one.verifier, one.weight, one.options) for one in config.reward.verifiers
    ]


def plan_of(config: Config) -> RewardPlan:
    """Which answers an update of a run learns from, and what they are worth."""
    reward, rollout = config.reward, config.rollout
    assert reward is not None and rollout is not None, "checked before"
    return RewardPlan(
        prompts=rollout.prompts_per_step,
        samples=rollout.samples,
        updates=reward.updates,
        advantage=reward.advantage,
        names=tuple(one.verifier for one in reward.verifiers),
        longest=rollout.max_new_tokens,
        mask_cut=reward.overlong == "mask",
        ramp=reward.ramp,
        resample=reward.resample,
        patience=reward.patience,
        wrong=methods.of(config.method).marks_wrong(config.method),
        mixed=mixed(config),
        seed=config.seed,
    )


def feed_of(
    config: Config,
    models: participants.Models,
    prompts: Prompts,
    mesh: Mesh,
    *,
    asked: Teaching,
    questions: Prompts | None,
    head: methods.Head,
    folder: pathlib.Path,
    params_of: Callable[[Any], Any],
    left_out: Callable[[], Sequence[tuple[int, int]]],
    stop: Callable[[], bool],
    hooks: Hooks,
) -> RewardedFeed:
    """The batches of a run whose student's answers earn rewards.

    Args:
      config: of the run.
      models: who takes part.
      prompts: what is answered.
      mesh: of all devices.
      asked: whom the method asks.
      questions: held-out ones, or None.
      head: how the method computes the student's head.
      folder: of the training, where verdicts, and what a server says, are written down.
      params_of: state -> the student's parameters, adapters in place.
      left_out: rows that no batch holds, as they are now.
      stop: whether this process was asked to stop.
      hooks: what the caller handed in, verifiers among it.
    """
    reward, rollout = config.reward, config.rollout
    assert reward is not None and rollout is not None, "checked before"
    told = None
    if models.context is not None and models.context.of_siblings:
        decode = functools.partial(models.tokenizer.decode, skip_special_tokens=True)
        told = functools.partial(siblings.told, samples=rollout.samples, decode=decode)
    judges = lambda: Judges(
        parts_of(config),
        workers=reward.workers,
        seconds=reward.seconds,
        functions=hooks.verifiers,
    )
    judge = Verdicts(judges, models.tokenizer.decode, folder, len(parts_of(config)), hooks)
    exam, servers = None, served(asked)
    if questions is not None and reward.held_out is not None:
        samples, decode = reward.held_out.samples, models.tokenizer.decode
        writer = on_policy.writer_of(config, models, questions, mesh, samples=samples)
        kind = _kind(parts_of(config)[0])
        exam = Questions(questions, writer, judge, decode, samples=samples, kind=kind)
    return RewardedFeed(
        plan_of(config),
        prompts,
        on_policy.writer_of(config, models, prompts, mesh, stop, hooks),
        judge,
        params_of=params_of,
        old_of=old.of_batches(
            on_policy.forward_pass_of(config, models), head, lambda tree: place(tree, mesh)
        ),
        shape=on_policy.row_shape(config, models, servers),
        unit=row_parts(mesh) * config.train.micro_batches,
        rows=lambda size: local_rows(mesh, size),
        left_out=left_out,
        recalled=config.guards.nonfinite.recalled,
        questions=exam,
        hooks=hooks,
        told=told,
        leaks=oneself.leaks_of(models.teaching, models.tokenizer),
        scores=served_teacher.scores_of(
            servers, models.vocab, folder, most=rollout.distilled_tokens, stop=stop, hooks=hooks
        ),
    )


def _kind(part: WeightedVerifier) -> str | None:
    """The kind of the final answers that vote; None: the verifier compares no such answers."""
    if part.name == "exact":
        return str(part.options.get("kind", "text"))
    return _VOTING.get(part.name)
