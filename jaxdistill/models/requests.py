"""Requests to the generation engine and its completions, in token ids; what cannot be served."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.errors import ModelError
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.ranges import DRAWING

# stop(tokens of a row so far, how many of them it has seen) -> how many to keep, which ends the
# row, or None
StopFunction = Callable[[Sequence[int], int], int | None]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
      tokens: the prompt.
      max_new_tokens: at most so many, the end token included.
      samples: continuations; sample s draws from a random stream of its own.
      first: number of the first sample.
      temperature: 0 takes the most probable token; above 0 draws.
      top_k, top_p, min_p: as in `sampling.filter_logits`; None keeps all.
      seed, stream: name the random streams, with the number of the sample; nothing else does.
      stop_tokens: token ids that end a continuation, besides the model's own.
      bias: (token, what is added to its logit before anything else).
      repetition_penalty, frequency_penalty, presence_penalty: as in `sampling.adjust`.
      alternatives: log-probabilities that are told beside that of each token of the continuation.
      prompt_alternatives: the same of the prompt's own tokens; None tells none of the prompt.
      stop: may end a continuation at any token, as `text.StopStrings` does at a string.
      tag: the caller's own; the completion has it.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    samples: int = 1
    first: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    stream: int = 0
    stop_tokens: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    alternatives: int = 0
    prompt_alternatives: int | None = None
    stop: StopFunction | None = None
    tag: Any = None

    @property
    def penalised(self) -> bool:
        """Whether what was read and written changes what is drawn."""
        off = (1.0, 0.0, 0.0)
        return off != (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)


class PromptScores(NamedTuple):
    """How likely a prompt's tokens were, each after those before it; the first has no such number.

    Attributes:
      logprob: float32 [N - 1], of the tokens from the second on.
      rank: int32 [N - 1], 1 for the most probable.
      likely: int32 [N - 1, K], the most probable tokens in falling order.
      likely_logprob: float32 [N - 1, K], of those.
    """

    logprob: np.ndarray
    rank: np.ndarray
    likely: np.ndarray
    likely_logprob: np.ndarray


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished continuation.

    Attributes:
      request: the request.
      sample: which of its samples, from 0.
      tokens: token ids, the one that ended it included.
      logprobs: log-probability of each token under the model, before temperature and filters.
      drawn_logprobs: the same under the distribution that was sampled: after bias, penalties,
        temperature and filters, normalised over the tokens that these keep; 0 of a greedy token.
      reason: "stop" for an end token or the request's `stop`, "length".
      ended: whether the last token is an end token.
      alternatives: for each token the most probable ones, (id, log-probability), in falling order.
      prompt: scores of the prompt, where they were asked for.
    """

    request: Request
    sample: int
    tokens: list[int]
    logprobs: list[float]
    drawn_logprobs: list[float]
    reason: str
    ended: bool
    alternatives: Sequence[Sequence[tuple[int, float]]] = ()
    prompt: PromptScores | None = None

    @property
    def content(self) -> list[int]:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.ended else self.tokens


@dataclasses.dataclass(frozen=True)
class FieldNames:
    """What messages call things, where who asked knows the fields of a request by other names.

    Attributes:
      prompt: what is continued.
      prefix: what a message begins with.
      names: from a field to its other name.
    """

    prompt: str = "the prompt"
    prefix: str = "generate: "
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, field: str) -> str:
        """The name of a field."""
        return self.names.get(field, field)


PLAIN = FieldNames()


def check(config: DecoderConfig, request: Request, length: int, words: FieldNames = PLAIN) -> None:
    """Refuses a request that cannot be served.

    Args:
      config: of the model.
      request: what is asked.
      length: tokens of a prompt and its answer together.
      words: what the message calls things.

    Raises:
      ModelError: with field, value, rule and remedy.
    """
    ids = np.asarray(request.tokens, np.int64)
    if not ids.size or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ModelError(
            f"{words.prefix}{words.prompt} must have tokens, each from 0 to "
            f"{config.vocab_size - 1}; for an empty text give the beginning-of-text token"
        )
    check_settings(request, words)
    _check_tokens(config, request, words)
    together = ids.size + request.max_new_tokens
    for where, most in (("model's context", config.max_positions), ("generator's rows", length)):
        if together > most:
            raise ModelError(
                f"{words.prefix}{words.prompt} has {ids.size} tokens, which with "
                f"{words.of('max_new_tokens')} = {request.max_new_tokens} do not fit the "
                f"{where} of {most}: shorten either"
            )
    _check_border(config, ids.size, request.max_new_tokens, words)


def _check_tokens(config: DecoderConfig, request: Request, words: FieldNames) -> None:
    """Refuses settings that name tokens which the model does not have, or more than it has."""
    named = {"stop_tokens": request.stop_tokens, "bias": tuple(token for token, _ in request.bias)}
    for name, ids in named.items():
        if ids and not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise ModelError(
                f"{words.prefix}{words.of(name)}: {list(ids)[:8]} must be tokens from 0 to "
                f"{config.vocab_size - 1}"
            )
    counts = {
        "alternatives": request.alternatives,
        "prompt_alternatives": request.prompt_alternatives or 0,
    }
    for name, count in counts.items():
        if not 0 <= count <= config.vocab_size:
            raise ModelError(
                f"{words.prefix}{words.of(name)}: {count} must be from 0 to {config.vocab_size}"
            )


def _check_border(config: DecoderConfig, size: int, new: int, words: FieldNames) -> None:
    """A row stays on its side of the original context of longrope, the last token read included.

    The other side has other frequencies: every key of the row would have to be made anew, as
    transformers does, which stops one row in mid-text and slows all others.

    Raises:
      ModelError: for a row that would cross it.
    """
    rope = config.rope
    if rope is None or rope.kind != "longrope":
        return
    border = rope.original_max_positions
    assert border is not None, "longrope has an original context"
    if size <= border < size + new - 1:
        raise ModelError(
            f"{words.prefix}{words.prompt} has {size} tokens, and with "
            f"{words.of('max_new_tokens')} = {new} it would grow past the {border} after "
            "which this model turns all keys otherwise, which is not built: ask for at most "
            f"{border + 1 - size}, or give a prompt longer than {border}"
        )


def check_settings(request: Request, words: FieldNames = PLAIN) -> None:
    """Refuses settings out of range.

    Raises:
      ModelError: with field, value and rule.
    """
    wrong = {
        "max_new_tokens": (request.max_new_tokens < 1, "at least 1"),
        "samples": (request.samples < 1, "at least 1"),
        "first": (not 0 <= request.first < 2**31, "0 or more"),
        **{
            name: ((value := getattr(request, name)) is not None and value not in span, str(span))
            for name, span in DRAWING.items()
        },
        "repetition_penalty": (not 0 < request.repetition_penalty < np.inf, "above 0"),
        "frequency_penalty": (not np.isfinite(request.frequency_penalty), "finite"),
        "presence_penalty": (not np.isfinite(request.presence_penalty), "finite"),
        "bias": (not all(np.isfinite(added) for _, added in request.bias), "finite"),
        "seed": (not 0 <= request.seed < 2**32, "from 0 to 2**32 - 1"),
        "stream": (not 0 <= request.stream < 2**32, "from 0 to 2**32 - 1"),
    }
    for name, (bad, rule) in wrong.items():
        if bad:
            given = getattr(request, name)
            raise ModelError(f"{words.prefix}{words.of(name)}: {given} must be {rule}")
    filters = (request.top_k, request.top_p, request.min_p)
    if request.temperature == 0 and any(value is not None for value in filters):
        raise ModelError(
            f"{words.prefix}top_k, top_p and min_p have no effect at temperature 0: set it "
            "above 0 to draw, or leave them out"
        )
