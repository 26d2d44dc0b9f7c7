"""What a client may ask for: OpenAI's and vLLM's fields that are served; all others are refused."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, ValidationError

from jaxdistill.data.rules import printable
from jaxdistill.section import Problem, Section

MAX_SAMPLES = 256  # of all prompts of a request together
MAX_STOPS, MAX_STOP = 16, 256  # strings, and characters of each
MAX_BIASES = 1024
MAX_TURNS = 2048  # a template may look at all of them for each of them
MAX_ALTERNATIVES = 20  # tokens whose log-probabilities are told beside the chosen one's
MAX_PROMPT_ALTERNATIVES = 1024

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[Token], Field(min_length=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]


def _one_or_several(value: Any) -> str:
    """Which of the two forms a value has, whatever is wrong with it."""
    return "<several>" if isinstance(value, list) else "<one>"


def _prompt_form(value: Any) -> str:
    """Which of the forms of prompts a value has, by its first item."""
    first = value[0] if isinstance(value, list) and value else ""
    if isinstance(first, str):
        return _one_or_several(value)
    return "<several lists>" if isinstance(first, list) else "<ids>"


PromptField = Annotated[
    Annotated[NonEmpty, Tag("<one>")]
    | Annotated[list[NonEmpty], Field(min_length=1), Tag("<several>")]
    | Annotated[Tokens, Tag("<ids>")]
    | Annotated[list[Tokens], Tag("<several lists>")],
    Discriminator(_prompt_form),
]
Stops = Annotated[
    Annotated[StopString, Tag("<one>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag("<several>")],
    Discriminator(_one_or_several),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]

# What fields of `models.requests.Request` are called here.
NAMES = {
    "max_new_tokens": "max_tokens",
    "samples": "n",
    "stop_tokens": "stop_token_ids",
    "bias": "logit_bias",
}

B = TypeVar("B", bound="Body")


class BadRequest(Exception):
    """What the client sent cannot be served; the message names the field."""


class NoModel(Exception):
    """The client named another model than the one that is served."""


class StreamOptions(Section):
    """What a stream tells besides texts."""

    include_usage: bool = False


class ContentPart(Section):
    """A piece of a turn's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[list[ContentPart], Tag("<several>")],
    Discriminator(_one_or_several),
]


class Turn(Section):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())

    def problems(self) -> Iterator[Problem]:
        """Only the assistant may not have begun to speak."""
        if self.content is None and self.role != "assistant":
            yield ("content",), "is missing"


class TextFormat(Section):
    """The form of an answer: free text."""

    type: Literal["text"]


class Body(Section):
    """What both routes take.

    Attributes:
      NAMES: what fields of `models.requests.Request` are called here, besides those of `NAMES`.
    """

    NAMES: ClassVar[Mapping[str, str]] = {}

    model: Annotated[str, Field(max_length=1000)] = ""
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    stop: Stops = Field(default_factory=list)
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOPS)] = Field(
        default_factory=list
    )
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] = Field(
        default_factory=dict
    )
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""  # says who asks, and changes no answer

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def biases(self) -> dict[int, float]:
        """What is added to the logits of tokens."""
        return {int(token): added for token, added in self.logit_bias.items()}

    @property
    def limit(self) -> int | None:
        """How many tokens an answer may have; None: as many as fit."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many log-probabilities are told beside each token's own; None: not even that."""
        return None

    def problems(self) -> Iterator[Problem]:
        """Rules between fields."""
        wrong = [name for name in self.logit_bias if not re.fullmatch("0|[1-9][0-9]{0,8}", name)]
        if wrong:
            yield ("logit_bias",), f"{wrong[0][:40]!r} must be the id of a token"
        if self.stream and self.alternatives is not None:
            yield ("logprobs",), "do not come in a stream: leave one of them out"
        if not self.stream and "stream_options" in self.model_fields_set:
            yield ("stream_options",), "have a meaning with stream only: set it or leave them out"


class CompletionBody(Body):
    """A request to /v1/completions."""

    NAMES = {"alternatives": "logprobs", "prompt_alternatives": "prompt_logprobs"}

    prompt: PromptField
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_PROMPT_ALTERNATIVES)] | None = None
    # What others may answer with is taken where it asks for nothing.
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    @property
    def alternatives(self) -> int | None:
        """As in OpenAI's protocol: a number, and 0 is one."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts: texts, or token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # pyrefly: ignore

    def problems(self) -> Iterator[Problem]:
        """Rules between fields."""
        yield from super().problems()
        if len(self.prompts) * self.n > MAX_SAMPLES:
            rule = f"{len(self.prompts)} prompts times n = {self.n} must be at most {MAX_SAMPLES}"
            yield ("prompt",), rule
        if self.stream and self.prompt_logprobs is not None:
            yield ("prompt_logprobs",), "do not come in a stream: leave one of them out"


class ChatBody(Body):
    """A request to /v1/chat/completions."""

    NAMES = {"alternatives": "top_logprobs"}

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_TURNS)]
    max_completion_tokens: Positive | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] = Field(
        default_factory=dict
    )
    # What others may answer with is taken where it asks for nothing.
    response_format: TextFormat = TextFormat(type="text")
    tools: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)

    @property
    def limit(self) -> int | None:
        """The newer name counts."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """As in OpenAI's protocol: a switch and a number."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def problems(self) -> Iterator[Problem]:
        """Rules between fields."""
        yield from super().problems()
        if self.top_logprobs is not None and not self.logprobs:
            yield ("top_logprobs",), "needs logprobs: true"


def read(kind: type[B], given: Mapping[str, Any]) -> B:
    """The request in a JSON object; null is as good as absent.

    Raises:
      BadRequest: naming field, value and rule.
    """
    try:
        return kind.model_validate(_without_nulls(given))
    except ValidationError as error:
        told = [_words(kind, one) for one in error.errors(include_url=False)[:4]]
        raise BadRequest("; ".join(told)) from None


def _without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    """The object without nulls, nor what is null or empty in its turns: clients send them back."""
    made = _full(given)
    for name in ("stream_options", "response_format", "logit_bias"):
        if name in made:
            made[name] = _full(made[name])
    turns = made.get("messages")
    if isinstance(turns, list):
        made["messages"] = [_full_turn(turn) for turn in turns]
    return made


def _full_turn(turn: Any) -> Any:
    """A turn without what is null or empty in it, or null in the pieces of its content."""
    if not isinstance(turn, dict):
        return turn
    made = {name: value for name, value in _full(turn).items() if value != []}
    if isinstance(content := made.get("content"), list):
        made["content"] = [_full(part) for part in content]
    return made


def _full(value: Any) -> Any:
    """An object without its nulls; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    return {name: item for name, item in value.items() if item is not None}


def _words(kind: type[Body], error: Any) -> str:
    """A broken rule: where, and what was given and what is right."""
    # Of a union pydantic names the form, too; only fields and places are the client's.
    where = [part for part in error["loc"] if str(part)[:1] != "<"]
    name = printable(".".join(str(part)[:60] for part in where))
    if error["type"] == "rules":
        return f"{name}.{error['ctx']['text']}" if name else str(error["ctx"]["text"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(where[-1]), kind.model_fields, 1, cutoff=0.8)
        hint = f"did you mean {near[0]}?" if near and len(where) == 1 else "leave it out"
        return f"{name}: is not supported by this server: {hint}"
    if error["type"] == "missing":
        return f"{name}: is missing"
    if error["type"] == "string_unicode":
        return f"{name}: contains a lone surrogate, which is not Unicode text"
    rule = error["msg"].replace("Input should", "must").replace(" or instance of", ", a")
    return f"{name}: {_short(error['input'])} {rule[0].lower()}{rule[1:]}"


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:40]
