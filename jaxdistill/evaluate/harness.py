"""Our models in EleutherAI's lm-eval: its tasks, few-shot prompts and metrics, our forward pass."""

from collections.abc import Sequence
from typing import Any

from jaxdistill.commands import Harness
from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.evaluate import scoring
from jaxdistill.models import Model
from jaxdistill.models.vocabulary import vocabulary_size
from jaxdistill.references import load_any

MAX_NEW_TOKENS = 256


def harness(
    model: str | Model,
    tasks: Sequence[str],
    options: Harness | None = None,
    *,
    dtype: str = "float32",
) -> dict[str, dict[str, Any]]:
    """Results of lm-eval tasks, by task and metric; tasks that are not cached are downloaded.

    Args:
      model: a loaded model, or any name `engine.load` understands.
      tasks: names that `lm-eval ls tasks` lists.
      options: how many documents, and how they are asked.
      dtype: held and computed in.

    Raises:
      ConfigError: if lm-eval is not installed.
      ModelError: if the model cannot be used.
    """
    options = options or Harness()
    _library()
    import lm_eval

    loaded = load_any(model, dtype=dtype)
    results = lm_eval.simple_evaluate(
        model=adapter(loaded, options.batch_size),
        tasks=list(tasks),
        limit=options.limit,
        num_fewshot=options.num_fewshot,
    )
    return results["results"]


def adapter(model: Model, batch_size: int = 8) -> Any:
    """The model as an `lm_eval.api.model.TemplateLM`, for `lm_eval.simple_evaluate(model=...)`.

    Raises:
      ConfigError: if lm-eval is not installed.
      ModelError: if the model has no tokenizer.
    """
    base = _library().TemplateLM
    if model.tokenizer is None:
        raise ModelError(f"{model.source}: has no tokenizer: lm-eval asks in text")
    vocab = vocabulary_size(model.tokenizer)

    class Adapter(base):
        """Answers lm-eval's three kinds of request."""

        tokenizer = model.tokenizer

        @property
        def eot_token_id(self) -> int:
            """What stands before a text that has no context."""
            ids = (self.tokenizer.eos_token_id, model.config.bos_id, *model.config.eos_ids)
            return next(int(one) for one in ids if one is not None)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: Any
        ) -> list[int]:
            """Token ids, without special tokens unless asked for."""
            return list(
                self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
            )

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
            pairs = [(context, rest) for _, context, rest in requests]
            return scoring.continuations(model, pairs, vocab=vocab, batch_size=batch_size)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Log-probability of whole texts; long ones in windows that do not overlap."""
            size = model.config.max_positions - 1
            totals = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
                pairs = [([self.eot_token_id], piece) for piece in pieces]
                scores = scoring.continuations(model, pairs, vocab=vocab, batch_size=batch_size)
                totals.append(sum(score for score, _ in scores))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Continuations up to the first of the stop texts."""
            return [_continued(model, *request.args) for request in requests]

    return Adapter()


def _continued(model: Model, prompt: str, options: dict[str, Any]) -> str:
    """One continuation by lm-eval's options: until, max_gen_toks, do_sample, temperature, top_p."""
    count = int(options.get("max_gen_toks") or MAX_NEW_TOKENS)
    limit = model.config.max_positions - count
    if limit < 1:
        raise ConfigError(
            f"lm-eval: max_gen_toks = {count}: the model has {limit + count} positions"
        )
    ids = list(model.tokenizer(prompt, add_special_tokens=False)["input_ids"])[-limit:]
    draws = bool(options.get("do_sample")) and float(options.get("temperature") or 0) > 0
    temperature = float(options["temperature"]) if draws else 0.0
    top_p = options.get("top_p") if draws else None
    new = model.generate([ids], max_new_tokens=count, temperature=temperature, top_p=top_p)
    text = str(model.tokenizer.decode(new[0], skip_special_tokens=True))
    stops = options.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text


def _library() -> Any:
    """The module with lm-eval's model classes.

    Raises:
      ConfigError: if it is not installed.
    """
    try:
        from lm_eval.api import model
    except ImportError as error:
        raise ConfigError(
            "lm-eval is not installed: pip install 'jaxdistill[eval]' (the built-in questions of "
            "`jaxdistill compare` need nothing)"
        ) from error
    return model
