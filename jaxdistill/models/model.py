"""A loaded model: configuration, parameters and tokenizer in one hand, to score and generate."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxdistill.models import decoder, per_layer, text, vocabulary
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.generator import SLOTS, complete
from jaxdistill.models.requests import Completion, Request, check_settings
from jaxdistill.sharding import on_mesh


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to run.

    Attributes:
      config: its shape.
      params: the parameter tree (see `decoder.shapes`).
      tokenizer: transformers tokenizer with its chat template, or None where there is none.
      source: where it came from, for messages and run records.
      generation: how its publisher draws from it (temperature, top_p, ...): what the files say, for
        the files that are written of it; nothing here draws by it unasked.
    """

    config: DecoderConfig
    params: Any
    tokenizer: Any = None
    source: str = ""
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def logits(
        self,
        tokens: ArrayLike,
        segment_ids: ArrayLike | None = None,
        *,
        compute_dtype: DTypeLike | None = None,
    ) -> Array:
        """Float32 logits [B, L, V] of tokens [B, L]; for evaluation and tests.

        Positions restart with every segment. `compute_dtype` None computes in the parameters' own.
        """
        dtype = self.params["embedding"].dtype if compute_dtype is None else compute_dtype
        with on_mesh(self.params):
            return _logits(self.config, dtype, self.params, tokens, segment_ids)

    def generate(
        self,
        prompts: text.TextsOrTokens,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str] | list[list[int]]:
        """Continues each prompt until an end token of the model, or for `max_new_tokens` tokens.

        A row's continuation depends on its prompt, the seed and its place in `prompts` alone.

        Args:
          prompts: texts, which need the tokenizer, or lists of token ids.
          max_new_tokens: at least 1.
          temperature: 0 takes the most probable token; above 0 draws.
          top_k: draw among the k most probable tokens.
          top_p: draw among the fewest tokens whose probability reaches p.
          min_p: draw among tokens at least min_p times as probable as the most probable one.
          seed: of the random streams.
          stop: strings that end a continuation.

        Returns:
          What follows each prompt, without end token and stop string: texts for texts, token ids
          for token ids.

        Raises:
          ModelError: for a setting out of range, texts without a tokenizer, or a prompt that does
            not fit the model's context.
        """
        completions = self.complete(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            logprobs=False,
        )
        if len(prompts) and isinstance(prompts[0], str):
            return [text.text_of(self.tokenizer, row[0]) for row in completions]
        return [row[0].content for row in completions]

    def complete(
        self,
        prompts: text.TextsOrTokens,
        *,
        streams: Sequence[int] | None = None,
        slots: int = SLOTS,
        cache_dtype: str | None = None,
        logprobs: bool = True,
        stop: Sequence[str] = (),
        **settings: Any,
    ) -> list[list[Completion]]:
        """Completions of every prompt, with tokens, log-probabilities and reasons.

        Args:
          prompts: texts, which need the tokenizer, or lists of token ids.
          streams: numbers that name the random streams of the prompts; None: their places in the
            list.
          slots: rows that are continued at the same time, at most.
          cache_dtype: "float32", "bfloat16" or "int8"; None: the parameters' own.
          logprobs: whether log-probabilities are wanted.
          stop: strings that end a continuation.
          **settings: other fields of `requests.Request`: max_new_tokens, samples, temperature, ...

        Raises:
          ModelError: as `generate`.
        """
        streams = range(len(prompts)) if streams is None else streams
        ids = text.token_ids(self.tokenizer, prompts, self.source)
        form = Request((), stop=text.stop_at(self.tokenizer, stop), **settings)
        check_settings(form)
        requests = [
            dataclasses.replace(form, tokens=tokens, stream=stream)
            for tokens, stream in zip(ids, streams, strict=True)
        ]
        return complete(
            self.config,
            self._per_layer_params,
            requests,
            slots=slots,
            cache_dtype=cache_dtype,
            logprobs=logprobs,
        )

    @functools.cached_property
    def _per_layer_params(self) -> dict:
        """What generation reads: made once, and held for as long as the model."""
        params = vocabulary.only_tokens(self.params, self.tokenizer)
        with on_mesh(params):
            return per_layer.split(self.config, params, params["embedding"].dtype)

    def consume_per_layer(self) -> "Model":
        """The model with split parameters, for whoever only generates; its own are deleted."""
        params = vocabulary.only_tokens(self.params, self.tokenizer)
        return dataclasses.replace(self, params=per_layer.consume(params))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config, dtype, params, tokens, segment_ids):
    outputs = decoder.apply(config, params, tokens, None, segment_ids, compute_dtype=dtype)
    return decoder.logits(outputs)
