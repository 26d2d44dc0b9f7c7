"""An answer of the student with all that a loss may ask of it, and answers as JSON."""

import base64
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.prompts import Prompt

_ARRAYS = {"tokens": np.int32, "logprobs": np.float32, "drawn_logprobs": np.float32}


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """One continuation of a prompt.

    `place` and `sample` name the random stream that it was drawn from, beside the run's seed.

    Attributes:
      prompt: what was answered.
      place: where the prompt stands in the stream of all epochs.
      sample: which of the answers to it, from 0.
      version: the step whose parameters wrote it.
      tokens: int32 [N], the token that ended it included; N at least 1.
      ended: whether the last token is an end token; if not, it was cut at the longest length.
      logprobs: float32 [N], log q of each token under the student, at temperature 1.
      drawn_logprobs: float32 [N], log mu of each under the distribution that was sampled.
    """

    prompt: Prompt
    place: int
    sample: int
    version: int
    tokens: np.ndarray
    ended: bool
    logprobs: np.ndarray
    drawn_logprobs: np.ndarray

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt.tokens) + len(self.tokens)


def packed(answers: Sequence[Answer]) -> dict[str, Any]:
    """Answers as JSON can hold them, without their prompts."""
    whole = {
        name: np.concatenate([getattr(one, name) for one in answers]).astype(dtype)
        for name, dtype in _ARRAYS.items()
    }
    return {
        "places": [one.place for one in answers],
        "samples": [one.sample for one in answers],
        "versions": [one.version for one in answers],
        "ended": [one.ended for one in answers],
        "sizes": [len(one.tokens) for one in answers],
        **{name: base64.b64encode(array.tobytes()).decode() for name, array in whole.items()},
    }


def unpacked(stored: Mapping[str, Any], prompt_at: Callable[[int], Prompt]) -> list[Answer]:
    """The answers that `packed` was given.

    Args:
      stored: its result.
      prompt_at: place -> prompt.
    """
    ends = np.cumsum(stored["sizes"])
    arrays = {
        name: np.split(np.frombuffer(base64.b64decode(stored[name]), dtype), ends[:-1])
        for name, dtype in _ARRAYS.items()
    }
    facts = zip(
        stored["places"], stored["samples"], stored["versions"], stored["ended"], strict=True
    )
    return [
        Answer(
            prompt_at(place),
            place,
            sample,
            version,
            ended=ended,
            **{name: parts[number] for name, parts in arrays.items()},
        )
        for number, (place, sample, version, ended) in enumerate(facts)
    ]


def numbers(answers: Sequence[Answer], step: int) -> Iterator[tuple[str, float]]:
    """What the record of a step says of the answers it learned from: (name, value).

    Args:
      answers: at least one.
      step: the updates before the one that learns from them.
    """
    sizes = np.asarray([len(one.tokens) for one in answers])
    drawn = np.concatenate([one.drawn_logprobs for one in answers])
    yield "rollout/answers", float(len(answers))
    yield "rollout/tokens", float(sizes.sum())
    yield "rollout/length_mean", float(sizes.mean())
    yield "rollout/length_max", float(sizes.max())
    yield "rollout/truncated", float(np.mean([not one.ended for one in answers]))
    yield "rollout/empty", float(np.mean([one.ended and len(one.tokens) == 1 for one in answers]))
    # The mean of -log mu of what mu drew is an estimate of its entropy without bias.
    yield "rollout/entropy", float(-drawn.mean(dtype=np.float64)) + 0.0
    yield "rollout/age", float(np.mean([step - one.version for one in answers]))
