"""The student writes: prompts in slots that are refilled, all processes in lockstep."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import agree
from jaxdistill.compress import quantize
from jaxdistill.data.prompts import Prompt
from jaxdistill.models import DecoderConfig, Model, decoding, per_layer, slot_settings
from jaxdistill.models.generator import STEPS, Generator, cache_length
from jaxdistill.models.quantized import Quantization
from jaxdistill.models.requests import FieldNames, Request, check
from jaxdistill.models.vocabulary import BIAS, only_tokens
from jaxdistill.rollouts.answers import Answer
from jaxdistill.sharding import on_mesh
from jaxdistill.train.hooks import NO_HOOKS, Hooks


@dataclasses.dataclass(frozen=True)
class RolloutSampling:
    """How answers are drawn; the fields mean what they mean in `requests.Request`."""

    samples: int
    max_new_tokens: int
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0


class Writer:
    """Answers prompts with given parameters.

    Weights in the decoder's form and the cache of keys and values live while `write` runs, and are
    gone when it returns.

    Args:
      config: the student's.
      vocab: rows of its head at most that are tokens; the others are never drawn.
      tokenizer: ids below `vocab` that it does not have are never drawn; None: it has all.
      sampling: how answers are drawn.
      slots: answers that are written at the same time.
      longest: tokens of the longest prompt.
      compute_dtype: that the student computes in.
      cache_dtype: of keys and values; None: compute_dtype.
      quantization: how the student will be quantised, or None.
      stop: whether this process was asked to stop.
      hooks: what the caller handed in.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        vocab: int,
        tokenizer: Any = None,
        sampling: RolloutSampling,
        slots: int,
        longest: int,
        compute_dtype: Any,
        cache_dtype: str | None = None,
        quantization: Quantization | None = None,
        stop: Callable[[], bool] = lambda: False,
        hooks: Hooks = NO_HOOKS,
    ):
        self._tokenizer = tokenizer
        self._whole, self._config = config, dataclasses.replace(config, vocab_size=vocab)
        self._sampling, self._slots = sampling, slots
        self._length = longest + sampling.max_new_tokens
        self._dtype, self._cache_dtype = compute_dtype, cache_dtype
        self._quantization, self._stop = quantization, stop
        self._vote, self._hooks = agree.Vote(), hooks
        self.seconds = 0.0  # of the last `write`

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuses prompts that the student cannot answer.

        Raises:
          ModelError: naming the first of them by its number.
        """
        for number, prompt in enumerate(prompts):
            check(
                self._config, self._request(0, prompt), self._length, FieldNames(f"prompt {number}")
            )

    def _request(self, place: int, prompt: Prompt) -> Request:
        return Request(
            prompt.tokens.tolist(), stream=place, tag=place, **dataclasses.asdict(self._sampling)
        )

    def write(
        self, params: Any, version: int, prompts: Mapping[int, Prompt]
    ) -> list[Answer] | None:
        """Answers in the order of places and samples; None: a process was asked to stop.

        What is written depends on the parameters, the seed and the places alone. What was under way
        when the stop came is dropped.

        Args:
          params: the student's, stacked, its adapters in place.
          version: the step that made them.
          prompts: by their places, which name the random streams.
        """
        hooks, began = self._hooks, time.perf_counter()
        hooks.at("rollout.before")
        generator = self._generator(params)
        for place in sorted(prompts):
            generator.submit(self._request(place, prompts[place]))
        answers: dict[tuple[int, int], Answer] = {}
        while generator.busy:
            for done in generator.step():
                place = done.request.tag
                answers[place, done.sample] = Answer(
                    prompts[place],
                    place,
                    done.sample,
                    version,
                    np.asarray(done.tokens, np.int32),
                    done.ended,
                    np.asarray(done.logprobs, np.float32),
                    np.asarray(done.drawn_logprobs, np.float32),
                )
            hooks.at("rollout.call")
            if self._vote(int(self._stop())):
                return None
        hooks.at("rollout.after")
        self.seconds = time.perf_counter() - began
        return [answers[name] for name in sorted(answers)]

    def _generator(self, params: Any) -> Generator:
        if self._quantization is not None:
            model = Model(self._whole, params, None, "the student")
            params = quantize.quantized(model, self._quantization).params
        params = only_tokens(params, self._tokenizer)
        with on_mesh(params):
            params = per_layer.split(self._whole, params, self._dtype)
            if self._config != self._whole:
                params = _tokens_alone(params, self._config.vocab_size)
        return Generator(
            self._config,
            params,
            slots=self._slots,
            length=self._length,
            compute_dtype=self._dtype,
            cache_dtype=self._cache_dtype,
        )


def one_call(
    config: DecoderConfig,
    *,
    vocab: int,
    sampling: RolloutSampling,
    slots: int,
    length: int,
    compute_dtype: Any,
    cache_dtype: str | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """What a plan compiles of the writing, and the shapes of its inputs.

        prepare(params) -> (weights in the decoder's form, cache)
        write(weights, cache, inputs) -> (cache, tokens of one call of the decoder)

    The second is the program that takes the most memory while answers are written.

    Args:
      config: the student's.
      vocab: as there.
      sampling: as there.
      slots: as there.
      length: tokens of the longest prompt and its answer.
      compute_dtype: as there.
      cache_dtype: as there.
    """
    dtype, own = jnp.dtype(compute_dtype), dataclasses.replace(config, vocab_size=vocab)
    request = Request([0], **dataclasses.asdict(sampling))
    numbers = ("token", "length", "count", "limit")
    rows: dict[str, np.ndarray] = {name: np.zeros(slots, np.int32) for name in numbers}
    inputs = {
        "rows": rows | {"live": np.zeros(slots, bool)},
        "ends_BK": np.zeros((slots, max(1, len(config.eos_ids))), np.int32),
        "keys_B2": np.zeros((slots, 2), np.uint32),
        "enough": np.int32(0),
        "settings": slot_settings.settings(dict.fromkeys(range(slots), request), slots),
    }

    def prepare(params: Any) -> Any:
        weights = per_layer.split(config, params, dtype)
        weights = weights if own == config else _tokens_alone(weights, vocab)
        return weights, decoding.empty(own, slots, cache_length(length), cache_dtype or dtype.name)

    def write(weights: Any, cache: Any, inputs: dict[str, Any]) -> Any:
        cache, chosen = decoding.advance(own, STEPS, 0, weights, cache, history={}, **inputs)
        return cache, chosen.token

    return prepare, write, jax.eval_shape(lambda: inputs)


def _tokens_alone(params: dict, vocab: int) -> dict:
    """The parameters without rows of padding in embedding and head, which nobody may draw."""
    cut = {name: params[name] for name in ("embedding", "head", BIAS) if name in params}
    return params | jax.jit(lambda tables: jax.tree.map(lambda one: one[:vocab], tables))(cut)
