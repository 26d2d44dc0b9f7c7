"""Continues prompts of texts or token ids with the generation engine: the simple door to it."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from jaxdistill.errors import ModelError
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.generator import SLOTS, Generator
from jaxdistill.models.model import Model
from jaxdistill.models.requests import Completion, Request, check, check_settings

Prompts = Sequence[str] | Sequence[Sequence[int]]


def generate(
    model: Model,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    compute_dtype: DTypeLike | None = None,
) -> list[str] | list[list[int]]:
    """Continues each prompt until an end token of the model, or for `max_new_tokens` tokens.

    A row's continuation depends on its prompt, the seed and its place in `prompts` alone.

    Args:
      model: the model; texts need its tokenizer.
      prompts: texts, or lists of token ids.
      max_new_tokens: at least 1.
      temperature: 0 takes the most probable token; above 0 draws.
      top_k: draw among the k most probable tokens.
      top_p: draw among the fewest tokens whose probability reaches p.
      min_p: draw among tokens at least min_p times as probable as the most probable one.
      seed: of the random streams.
      stop: strings that end a continuation.
      compute_dtype: None computes in the parameters' own.

    Returns:
      What follows each prompt, without end token and stop string: texts for texts, token ids for
      token ids.

    Raises:
      ModelError: for a setting out of range, texts without a tokenizer, or a prompt that does not
        fit the model's context.
    """
    found = complete(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop),
        compute_dtype=compute_dtype,
        logprobs=False,
    )
    if len(prompts) and isinstance(prompts[0], str):
        return [str(row[0].text) for row in found]
    return [row[0].content for row in found]


def complete(
    model: Model,
    prompts: Prompts,
    *,
    samples: int = 1,
    streams: Sequence[int] | None = None,
    slots: int = SLOTS,
    compute_dtype: DTypeLike | None = None,
    cache_dtype: str | None = None,
    logprobs: bool = True,
    **settings: Any,
) -> list[list[Completion]]:
    """`samples` completions of every prompt, with tokens, log-probabilities and reasons.

    Args:
      model: the model.
      prompts: texts, or lists of token ids.
      samples: continuations of each prompt, all from one reading of it.
      streams: numbers that name the random streams of the prompts; None: their places in the list.
      slots: rows that are continued at the same time, at most.
      compute_dtype: None computes in the parameters' own.
      cache_dtype: "float32", "bfloat16" or "int8"; None: compute_dtype.
      logprobs: whether log-probabilities are wanted.
      **settings: the other fields of `requests.Request`.

    Raises:
      ModelError: as `generate`.
    """
    streams = range(len(prompts)) if streams is None else streams
    asked = [
        Request(tokens, samples=samples, stream=stream, tag=number, **settings)
        for number, (tokens, stream) in enumerate(
            zip(token_ids(model, prompts), streams, strict=True)
        )
    ]
    check_settings(Request((), samples=samples, **settings))
    if not asked:
        return []
    length = max(len(request.tokens) for request in asked) + asked[0].max_new_tokens
    for number, request in enumerate(asked):
        check(model, request, length, f"prompt {number}")
    rows = min(slots, 1 << (len(asked) * samples - 1).bit_length())
    generator = Generator(
        model,
        slots=rows,
        length=length,
        compute_dtype=compute_dtype,
        cache_dtype=cache_dtype,
        logprobs=logprobs,
    )
    for request in asked:
        generator.submit(request)
    found: list[dict[int, Completion]] = [{} for _ in asked]
    for done in generator.run():
        found[done.request.tag][done.sample] = done
    return [[row[sample] for sample in range(samples)] for row in found]


def token_ids(model: Model, prompts: Prompts) -> list[list[int]]:
    """The prompts as token ids; texts as the tokenizer begins them.

    Raises:
      ModelError: for texts without a tokenizer.
    """
    if not any(isinstance(prompt, str) for prompt in prompts):
        return [[int(token) for token in row] for row in prompts]
    if model.tokenizer is None:
        raise ModelError(
            f"generate: {model.source or 'the model'} has no tokenizer: give prompts as token ids"
        )
    return model.tokenizer(list(prompts))["input_ids"]


def generate_tokens(
    config: DecoderConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    compute_dtype: DTypeLike | None = None,
) -> list[list[int]]:
    """Token ids that follow each prompt of token ids; `generate` without a `Model`.

    Raises:
      ModelError: as `generate`.
    """
    found = complete(
        Model(config, params),
        prompts,
        max_new_tokens=max_new_tokens,
        seed=seed,
        compute_dtype=compute_dtype,
        logprobs=False,
        **(settings or {}),
    )
    return [row[0].content for row in found]
