"""A teacher behind a server: its client, and whether it reads the tokens that a run writes."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxdistill.config.server import Api
from jaxdistill.data.records import teacher_key
from jaxdistill.errors import MismatchError, ModelError
from jaxdistill.reasoning import served
from jaxdistill.reasoning.scored import Scorer
from jaxdistill.rollouts.scores import RoutedScores, Scores
from jaxdistill.train.hooks import Hooks

# Words, numbers, code, spaces and scripts that tokenizers cut in ways of their own.
TEXT = "The fox's 1,234.50 naïve über-jumps:\n\tdef f(x): return x**2  # 漢字 かな, привет 🦊\n"


def scorer(server: Api, *, k: int, vocab: int) -> Scorer:
    """The client of a server that says the k likeliest tokens of given text."""
    return Scorer(**client_options(server), k=k, vocab=vocab)


def client_options(server: Api) -> dict[str, Any]:
    """What every client of a server takes of its section."""
    return {
        "base_url": server.base_url,
        "model": server.model,
        "key": served.key_from(server.key_env),
        "concurrency": server.concurrency,
        "timeout": server.timeout_s,
        "retries": server.retries,
        "max_failures": server.max_failures,
        "prices": (server.price_in, server.price_out),
    }


def check(servers: Mapping[str | None, Api], tokenizer: Any, vocab: int, named: str) -> None:
    """Asks the servers two short questions that a run will ask about the student's text.

    Args:
      servers: as `teaching.served` has them.
      tokenizer: of the run.
      vocab: how many tokens it has.
      named: `tokenizer.from`, for messages.

    Raises:
      MismatchError: if it has another tokenizer than the run.
      ModelError: if it does not answer, or reports no log-probabilities of given text.
    """
    for name, server in servers.items():
        _check(server, teacher_key(name), tokenizer, vocab, named)


def _check(server: Api, key: str, tokenizer: Any, vocab: int, named: str) -> None:
    asked = scorer(server, k=0, vocab=vocab)
    ours = list(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    theirs = asked.spelled(TEXT)
    # It may put tokens before a text, and does not say its first one.
    behind = theirs[len(theirs) - len(ours) + 1 :] if len(theirs) >= len(ours) - 1 else []
    wrong = not behind or any(id not in one for id, one in zip(ours[1:], behind, strict=True))
    if wrong:
        raise MismatchError(
            f"{key}.api.model = {server.model!r}: the server cuts a text into other tokens "
            f"({1 + len(theirs)}, not {len(ours)}) than tokenizer.from = "
            f"{named!r}, so its log-probabilities would be of other words: name "
            "the model's own tokenizer there, or ask another server"
        )
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    (said,) = asked.score([("", [*ours, *ends, vocab - 1])])
    if said.failed:
        raise ModelError(f"{key}.api: {said.reason}: a run that asks it needs prompt_logprobs")


def scores_of(
    servers: Mapping[str | None, Api],
    vocab: int,
    folder: pathlib.Path,
    *,
    most: int | None,
    stop: Callable[[], bool],
    hooks: Hooks,
) -> Scores | RoutedScores | None:
    """Who says log p of the student's tokens; None where no teacher is a server.

    Args:
      servers: as `teaching.served` has them.
      vocab: tokens of the tokenizer.
      folder: of the training, where it is written down.
      most: tokens of an answer that are asked about, or None: all.
      stop: whether this process was asked to stop.
      hooks: what the caller handed in.
    """
    scores = {
        name: Scores(
            functools.partial(scorer, server, k=0, vocab=vocab),
            folder,
            model=server.model,
            teacher=name,
            most=most,
            stop=stop,
            hooks=hooks,
        )
        for name, server in servers.items()
    }
    several = {name: one for name, one in scores.items() if name is not None}
    return RoutedScores(several) if several else scores.get(None)
