"""A teacher behind a server: its client, and whether it reads the tokens that a run writes."""

import pathlib
from collections.abc import Callable
from typing import Any

from jaxdistill.config import Config
from jaxdistill.config.server import Api
from jaxdistill.errors import MismatchError, ModelError
from jaxdistill.reasoning import served
from jaxdistill.reasoning.scored import Scorer
from jaxdistill.rollouts.scores import Scores
from jaxdistill.run import setup
from jaxdistill.train.hooks import Hooks

# Words, numbers, code, spaces and scripts that tokenizers cut in ways of their own.
TEXT = "The fox's 1,234.50 naïve über-jumps:\n\tdef f(x): return x**2  # 漢字 かな, привет 🦊\n"


def scorer(server: Api, *, k: int, vocab: int) -> Scorer:
    """The client of a server that says the k likeliest tokens of given text."""
    return Scorer(
        server.base_url,
        server.model,
        key=served.key_from(server.key_env),
        concurrency=server.concurrency,
        timeout=server.timeout_s,
        retries=server.retries,
        max_failures=server.max_failures,
        prices=(server.price_in, server.price_out),
        k=k,
        vocab=vocab,
    )


def check(config: Config, tokenizer: Any, vocab: int) -> None:
    """Asks the server two short questions, where a run will ask it about the student's text.

    Args:
      config: of the run.
      tokenizer: of the run.
      vocab: how many tokens it has.

    Raises:
      MismatchError: if it has another tokenizer than the run.
      ModelError: if it does not answer, or reports no log-probabilities of given text.
    """
    if not setup.is_served(config):
        return
    assert config.teacher is not None and config.teacher.api is not None
    server = config.teacher.api
    asked = scorer(server, k=0, vocab=vocab)
    ours = list(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    theirs = asked.spelled(TEXT)
    # It may put tokens before a text, and does not say its first one.
    behind = theirs[len(theirs) - len(ours) + 1 :] if len(theirs) >= len(ours) - 1 else []
    wrong = not behind or any(id not in one for id, one in zip(ours[1:], behind, strict=True))
    if wrong:
        raise MismatchError(
            f"teacher.api.model = {server.model!r}: the server cuts a text into other tokens "
            f"({1 + len(theirs)}, not {len(ours)}) than tokenizer.from = "
            f"{config.tokenizer.from_!r}, so its log-probabilities would be of other words: name "
            "the model's own tokenizer there, or ask another server"
        )
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    (said,) = asked.score([("", [*ours, *ends, vocab - 1])])
    if said.failed:
        raise ModelError(f"teacher.api: {said.reason}: a run that asks it needs prompt_logprobs")


def scores_of(
    config: Config, vocab: int, folder: pathlib.Path, stop: Callable[[], bool], hooks: Hooks
) -> Scores | None:
    """Who says log p of the student's tokens; None where the teacher is no server.

    Args:
      config: of the run.
      vocab: tokens of the tokenizer.
      folder: of the training, where it is written down.
      stop: whether this process was asked to stop.
      hooks: what the caller handed in.
    """
    if not setup.is_served(config):
        return None
    assert config.teacher is not None and config.rollout is not None
    server = config.teacher.api
    assert server is not None, "it is asked"
    return Scores(
        lambda: scorer(server, k=0, vocab=vocab),
        folder,
        model=server.model,
        most=config.rollout.distilled_tokens,
        stop=stop,
        hooks=hooks,
    )
