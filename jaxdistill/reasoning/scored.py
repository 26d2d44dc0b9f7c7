"""A teacher behind a server that says which tokens it held likely at each place of a given text."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxdistill.errors import ModelError
from jaxdistill.reasoning.asking import Job, SampledAnswer, SamplingParams
from jaxdistill.reasoning.served import (
    GARBLED_TRIES,
    LARGEST,
    ApiClient,
    Garbled,
    field,
    reason_of,
    told,
)

_NOTHING = SamplingParams(max_new_tokens=1, temperature=0.0)
_ABOVE = 1e-3  # a log-probability may be rounded above 0


@dataclasses.dataclass(frozen=True)
class Scored(SampledAnswer):
    """What a server said of one text, or why it said nothing; its `text` is empty.

    Attributes:
      ids: int32 [N - 1, K], the likeliest tokens behind each of the text's tokens but the last.
      logprobs: float32 [N - 1, K], log p of each.
      own: float32 [N - 1], log p of the token that the text has there.
    """

    ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    own: np.ndarray | None = None


class Scorer(ApiClient):
    """Asks for the K likeliest tokens at every position of given texts, as vLLM reports them.

    The server's `prompt_logprobs` is one entry per token of the prompt, by token id: its first is
    null, entry i + 1 says what follows token i. An answer that is shorter, shifted or not finite is
    asked for again, and is then an error.

    Args:
      k: how many tokens; a server has a limit of its own, vLLM's is --max-logprobs. 0 asks for the
        text's own alone.
      vocab: tokens of the vocabulary; rows behind them are padding and are left out.
      options: as `ApiClient` takes them.
    """

    # More tokens than the server allows, or a text that is too long: it would fail again.
    hopeless = (*ApiClient.hopeless, "BadRequestError", "UnprocessableEntityError")

    def __init__(self, *args: Any, k: int, vocab: int, **options: Any):
        super().__init__(*args, **options)
        self._k, self._vocab = k, vocab

    def score(self, texts: Sequence[tuple[Any, Sequence[int]]]) -> Iterator[Scored]:
        """What the server says of each (name, token ids), as the answers come; in any order.

        Raises:
          ModelError: if the server refuses for good, or too many requests in a row failed.
        """
        jobs = [Job("", "", _NOTHING, tag=(name, list(tokens))) for name, tokens in texts]
        for answer in self.ask(collections.deque(jobs)):
            yield answer if isinstance(answer, Scored) else _failed(answer.job, answer.reason)

    def _request(self, job: Job) -> list[SampledAnswer]:
        tokens = job.tag[1]
        for number in range(1, GARBLED_TRIES + 1):
            try:
                entries = self._said(tokens)
                return [
                    Scored(job, 0, "", 1, None, "stop", False, *self._read_rows(entries, tokens))
                ]
            except (Garbled, *self._no_answer) as error:
                if number == GARBLED_TRIES:
                    return [_failed(job, reason_of(error))]
        raise AssertionError("the last try returns")

    def spelled(self, text: str) -> list[set[int]]:
        """The tokens that the server names at each token of a text but its own first one.

        Where it is asked for no others, that is how its tokenizer spells the text.

        Raises:
          ModelError: if it does not answer, or does not report them.
        """
        try:
            return [set(self._told(entry)) for entry in self._said(text)[1:]]
        except (Garbled, self._errors, *self._no_answer) as error:
            raise ModelError(f"teacher {self._name}: {reason_of(error)}") from error

    def _said(self, prompt: str | Sequence[int]) -> list[Any]:
        """`prompt_logprobs` of a text, or of its tokens."""
        reply = told(
            self._client.completions.with_raw_response.create(
                model=self._model,
                prompt=prompt,
                max_tokens=1,
                temperature=0.0,
                extra_body={"prompt_logprobs": self._k},
            )
        )
        self._spend(reply)
        choices = field(reply, "choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        entries = field(first, "prompt_logprobs")
        if not isinstance(entries, list):
            raise Garbled("the answer holds no prompt_logprobs: the server does not report them")
        return entries

    def _read_rows(
        self, entries: Sequence[Any], tokens: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, logprobs, own) as `Scored` has them."""
        if len(entries) != len(tokens):
            raise Garbled(f"{len(entries)} prompt_logprobs came for {len(tokens)} tokens")
        if entries[0]:
            raise Garbled("prompt_logprobs are shifted: the first token has an entry")
        rows = [
            self._row(entry, token) for entry, token in zip(entries[1:], tokens[1:], strict=True)
        ]
        ids = np.array([row[0] for row in rows], np.int32).reshape(len(rows), self._k)
        logprobs = np.array([row[1] for row in rows], np.float32).reshape(len(rows), self._k)
        return ids, logprobs, np.array([row[2] for row in rows], np.float32)

    def _told(self, entry: Any) -> dict[int, float]:
        """One entry {token id: {"logprob": ...}} as {token id: log p}."""
        try:
            return {int(name): float(one["logprob"]) for name, one in entry.items()}
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise Garbled("an entry of prompt_logprobs is no table of tokens") from error

    def _row(self, entry: Any, token: int) -> tuple[list[int], list[float], float]:
        """The K likeliest of one entry, the likeliest first, and log p of the text's token."""
        told = self._told(entry)
        if token not in told:
            raise Garbled(f"prompt_logprobs are shifted: an entry lacks the text's token {token}")
        wrong = [value for value in told.values() if not -LARGEST < value <= _ABOVE]
        if wrong:
            raise Garbled(f"{wrong[0]} is no log-probability")
        known = sorted((-value, name) for name, value in told.items() if 0 <= name < self._vocab)
        if len(known) < self._k:
            raise Garbled(f"an entry of prompt_logprobs has {len(known)} tokens, not {self._k}")
        best = known[: self._k]
        likely = [name for _, name in best], [min(0.0, -value) for value, name in best]
        return *likely, min(0.0, told[token])


def _failed(job: Job, reason: str) -> Scored:
    return Scored(job, 0, "", 0, None, reason, failed=True)
