"""A loaded model: its configuration, parameters and tokenizer in one hand."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from jaxdistill.models import decoder
from jaxdistill.models.architecture import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to run.

    Attributes:
      config: its shape.
      params: the parameter tree (see `decoder.shapes`).
      tokenizer: transformers tokenizer with its chat template, or None where there is none.
      source: where it came from, for messages and run records.
    """

    config: DecoderConfig
    params: Any
    tokenizer: Any = None
    source: str = ""

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
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str] | list[list[int]]:
        """Continues each prompt; see `generate.generate`."""
        from jaxdistill.models.generate import generate

        return generate(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
        )


def on_mesh(params: Any) -> contextlib.AbstractContextManager:
    """The context of the mesh that the parameters lie on, or nothing on a single device."""
    for leaf in jax.tree.leaves(params):
        place = getattr(leaf, "sharding", None)
        if isinstance(place, NamedSharding) and isinstance(place.mesh, jax.sharding.Mesh):
            return jax.set_mesh(place.mesh)
    return contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config, dtype, params, tokens, segment_ids):
    outputs = decoder.apply(config, params, tokens, None, segment_ids, compute_dtype=dtype)
    return decoder.logits(outputs)
