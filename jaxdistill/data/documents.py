"""Records of one kind to documents of one tokenizer: texts, completions, or conversations."""

import itertools
from collections.abc import Sequence

from jaxdistill.data import chat, encode, pairs, rendering
from jaxdistill.data.chat_template import RenderError
from jaxdistill.data.codec import Codec
from jaxdistill.data.encode import Documents
from jaxdistill.data.learned import each_turn
from jaxdistill.data.records import PAIRS, Record
from jaxdistill.data.settings import LOSS_ON, Settings
from jaxdistill.data.tally import Tally
from jaxdistill.errors import ConfigError, DataError

CHATS = ("messages", "dialogue")


class Encoder:
    """Encodes the records of a data set, all of one kind.

    Args:
      codec: of the tokenizer.
      settings: of the data set.
      kind: of the records.
      tally: where it is counted what there is to say of the records.
      source: the name of the file that the first record came from, for messages.

    Raises:
      DataError: if `loss_on` does not suit the kind.
      ConfigError: for a setting that has no effect on the kind.
    """

    def __init__(
        self,
        codec: Codec,
        settings: Settings,
        kind: str,
        tally: Tally,
        *,
        source: str,
    ):
        self._codec, self._settings, self._kind, self._tally = codec, settings, kind, tally
        self._parse = settings.special_tokens == "parse"
        self.chat: chat.ChatEncoder | None = None
        self._pairs = kind in PAIRS
        chats = PAIRS.get(kind, kind) in CHATS
        check(settings, kind, source)
        if chats:
            template = settings.chat_template
            if template is None:
                template = rendering.template_of(codec.tokenizer)
            given = settings.template_kwargs
            self.chat = chat.ChatEncoder(codec, template, settings.loss_on, given, tally)

    def __call__(self, records: Sequence[Record]) -> list[Documents]:
        """What becomes of each record."""
        if self._pairs:
            return pairs.of_both(self._plain if self.chat is None else self._whole)(records)
        if self.chat is None:
            return self._plain(records)
        return self._each_turn(records) if self._settings.turns == "each" else self._whole(records)

    def _plain(self, records: Sequence[Record]) -> list[Documents]:
        """Texts, or prompts and completions; those that look rendered are counted."""
        tally = self._tally
        if self._codec.controls and not self._parse:
            for record in records:
                controls = filter(None, map(self._codec.control_pattern.search, record.texts))
                for match in itertools.islice(controls, 1):
                    tally.rendered += 1
                    tally.shown_control = tally.shown_control or match[0]
        if self._kind == "text":
            made = encode.encode_texts(self._codec, records, self._parse)
        else:
            loss_on = self._settings.loss_on
            made = encode.encode_completions(self._codec, records, loss_on, self._parse)
        return [one if isinstance(one, str) else (one,) for one in made]

    def _whole(self, records: Sequence[Record]) -> list[Documents]:
        assert self.chat is not None
        made = self.chat.encode(records)
        return [one if isinstance(one, str) else (one,) for one in made]

    def _each_turn(self, records: Sequence[Record]) -> list[Documents]:
        """A document for every turn of the assistant; a reason of one is that of its record."""
        made: list[Documents] = []
        for record in records:
            try:
                parts = self._whole(each_turn(record, self._settings.loss_on))
            except RenderError as error:
                parts = [str(error)]
            reason = next((part for part in parts if isinstance(part, str)), None)
            made.append(reason or tuple(part[0] for part in parts if not isinstance(part, str)))
        return made


def check(settings: Settings, kind: str, source: str) -> None:
    """Which settings go with which kind of records, which a source holds.

    Raises:
      DataError: if `loss_on` does not suit the kind.
      ConfigError: for a setting that has no effect on the kind.
    """
    loss_on, chats = settings.loss_on, PAIRS.get(kind, kind) in CHATS
    if kind not in LOSS_ON[loss_on]:
        fitting = [choice for choice, kinds in LOSS_ON.items() if kind in kinds]
        raise DataError(
            f"data.loss_on: {loss_on!r} needs records of kind {' or '.join(LOSS_ON[loss_on])}, "
            f"but {source} holds {kind!r}: use {' or '.join(fitting)}"
        )
    if kind in PAIRS:
        pairs.check(settings)
    for name, value, plain in (
        ("turns", settings.turns, "whole"),
        ("chat_template", settings.chat_template, None),
        ("template_kwargs", dict(settings.template_kwargs), {}),
    ):
        if not chats and value != plain:
            raise ConfigError(f"data.{name}: has no effect on {kind!r}: remove it")
    if chats and settings.special_tokens == "parse":
        raise ConfigError(
            "data.special_tokens: 'parse' is for text and completions: in a conversation the "
            "chat template writes the special tokens: remove it"
        )
