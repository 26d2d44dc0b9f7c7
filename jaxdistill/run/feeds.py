"""The feed of a training, chosen by its configuration: the one place that knows which there are."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxdistill.config import Config, routing
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.feed import CorpusFeed, Feed
from jaxdistill.data.prompts import Prompts
from jaxdistill.run import on_policy, participants, rewarded, setup
from jaxdistill.run.teaching import Teaching
from jaxdistill.sharding import local_rows
from jaxdistill.train.hooks import Hooks


def feed_of(
    config: Config,
    models: participants.Models,
    mesh: Mesh,
    *,
    asked: Teaching,
    dataset: Dataset | None,
    prompts: Prompts | None,
    questions: Prompts | None,
    folder: pathlib.Path,
    params_of: Callable[[Any], Any],
    left_out: Callable[[], Sequence[tuple[int, int]]],
    stop: Callable[[], bool],
    hooks: Hooks,
) -> Feed:
    """What a training learns from.

    Args:
      config: of the training.
      models: who takes part.
      mesh: of all devices.
      asked: whom the method asks.
      dataset: the rows of data.train, or None.
      prompts: what the student answers, or None.
      questions: held-out ones, or None.
      folder: of the training.
      params_of: state -> the student's parameters, adapters in place.
      left_out: rows that no batch holds, as they are now.
      stop: whether this process was asked to stop.
      hooks: what the caller handed in.
    """
    corpus = None
    if dataset is not None:
        corpus = CorpusFeed(
            dataset,
            batch_size=config.train.batch_size,
            seed=config.seed,
            left_out=left_out,
            rows=local_rows(mesh, routing.rows(config)),
            layout=routing.layout(config),
        )
    if config.rollout is None:
        assert corpus is not None, "checked before: who does not write has data to learn from"
        return corpus
    assert prompts is not None, "checked before"
    if config.reward is not None:
        return rewarded.feed_of(
            config,
            models,
            prompts,
            mesh,
            asked=asked,
            questions=questions,
            head=config.method.head(setup.facts_of(config, models)),
            folder=folder,
            params_of=params_of,
            left_out=left_out,
            stop=stop,
            hooks=hooks,
        )
    return on_policy.feed_of(
        config,
        models,
        prompts,
        mesh,
        asked=asked,
        corpus=corpus,
        folder=folder,
        params_of=params_of,
        left_out=left_out,
        stop=stop,
        hooks=hooks,
    )
