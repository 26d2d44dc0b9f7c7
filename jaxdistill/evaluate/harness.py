"""Our models in EleutherAI's lm-eval: its tasks, few-shot prompts and metrics, our forward pass."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.commands import Harness
from jaxdistill.data.chat_template import ChatTemplate, RenderError
from jaxdistill.data.rendering import template_of
from jaxdistill.errors import ConfigError, DataError, ModelError
from jaxdistill.evaluate import scoring
from jaxdistill.models import Model, text
from jaxdistill.models.vocabulary import vocabulary_size
from jaxdistill.references import load_any

MAX_NEW_TOKENS = 256
# Options of a generation that lm-eval's tasks name, and the values that change nothing here.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "use_cache": (None, True),
    "length_penalty": (None, 1.0),
    "num_return_sequences": (None, 1),
}
_log = logging.getLogger(__name__)


def harness(
    model: str | Model,
    tasks: Sequence[str],
    options: Harness | None = None,
    *,
    dtype: str = "float32",
) -> dict[str, dict[str, Any]]:
    """Results of lm-eval tasks, by task and metric; tasks that are not cached are downloaded.

    Args:
      model: a loaded model, or any name `references.load_any` understands.
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
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
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
    return type("Adapter", (_Answers, base), {})(model, batch_size)


class _Answers:
    """Answers lm-eval's three kinds of request as its own `hf` model does, token for token."""

    def __init__(self, model: Model, batch_size: int):
        super().__init__()
        self.tokenizer: Any = model.tokenizer
        self._model, self._batch_size = model, batch_size

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        vocab = vocabulary_size(self.tokenizer)
        return scoring.continuations(self._model, pairs, vocab=vocab, batch_size=self._batch_size)

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        config = self._model.config
        ids = (self.tokenizer.eos_token_id, *config.eos_ids, config.bos_id)
        return next(int(one) for one in ids if one is not None)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS where there is none."""
        begins = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else int(begins)

    @property
    def tokenizer_name(self) -> str:
        """The model's name, which lm-eval keeps prompts under."""
        return self._model.source.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Token ids, begun as the tokenizer begins a text unless it is begun already."""
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not begun
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
        return self._score([(context, rest) for _, context, rest in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts; long ones in windows that do not overlap."""
        from lm_eval import utils

        windows, size = [], self._model.config.max_positions
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, size, 1):
                windows.append((number, utils.make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        scores = self._score([pair for _, pair in windows])
        for (number, _), (logprob, _) in zip(windows, scores, strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the stop texts; those asked for alike together."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        answers: dict[int, str] = {}
        for numbers in alike.values():
            settings = _settings(self._model, requests[numbers[0]].args[1])
            room = self._model.config.max_positions - settings["max_new_tokens"]
            ids = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            ids = [one or [self.prefix_token_id] for one in ids]
            done = self._model.complete(
                ids, slots=self._batch_size, streams=numbers, logprobs=False, **settings
            )
            texts = [text.text_of(self.tokenizer, row[0]) for row in done]
            answers |= dict(zip(numbers, texts, strict=True))
        return [answers[number] for number in range(len(requests))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text; a system turn goes where the template refuses it."""
        source = template_of(self.tokenizer)
        if source is None:
            name = self._model.source
            raise ConfigError(f"lm-eval: {name}: has no chat template: leave chat out")
        template = ChatTemplate(source, self.tokenizer.special_tokens_map)
        options = {"add_generation_prompt": add_generation_prompt}
        try:
            made = template.render(chat_history, **options)
        except RenderError as error:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            if turns == chat_history:
                raise DataError(f"lm-eval: {error}") from error
            _log.warning("lm-eval: %s; asked again without the system turn", error)
            made = template.render(turns, **options)
        made = template.spans(made)[0]
        if not add_generation_prompt:  # the last turn goes on
            last = chat_history[-1]["content"].lstrip()
            place = made.rindex(last.rstrip())
            kept = last if made[place:].startswith(last) else last.rstrip()
            made = made[: place + len(kept)]
        return made


def _settings(model: Model, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `Model.complete` takes, from lm-eval's options of a generation.

    Raises:
      ConfigError: for an option that changes what is drawn and is not built, or no room to draw in.
    """
    options = dict(given)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    counts = [value for name in names if (value := options.pop(name, None)) is not None]
    count = int(counts[0]) if counts else MAX_NEW_TOKENS
    if count >= model.config.max_positions:
        raise ConfigError(
            f"lm-eval: max_gen_toks = {count}: the model has {model.config.max_positions} positions"
        )
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    temperature = float(options.pop("temperature", None) or 0)
    draws = options.pop("do_sample", temperature > 0) and temperature > 0
    settings: dict[str, Any] = {"max_new_tokens": count, "stop": [one for one in until if one]}
    for name in ("top_k", "top_p", "min_p"):
        value = options.pop(name, None)
        if draws and value:
            settings[name] = value
    penalty = options.pop("repetition_penalty", None)
    settings |= {"temperature": temperature if draws else 0.0, "repetition_penalty": penalty or 1.0}
    for name, value in options.items():
        if value not in _WITHOUT_EFFECT.get(name, (None,)):
            raise ConfigError(
                f"lm-eval: {name} = {value!r}: this option of generation is not built: take it out "
                "of the task's generation_kwargs"
            )
    return settings


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
