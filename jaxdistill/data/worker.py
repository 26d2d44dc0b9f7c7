"""Turns batches of records into documents: here, or in a process that is told how by a message."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data import rendering, wire
from jaxdistill.data.codec import Codec, portable, ported
from jaxdistill.data.documents import CHATS, Encoder
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.record_hash import fingerprint_of
from jaxdistill.data.records import PAIRS, Record
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.settings import Settings
from jaxdistill.data.tally import Tally

MAIN = "jaxdistill.data.worker:opened"


class Worker:
    """Makes documents of records of one kind.

    Args:
      codec: of the tokenizer.
      settings: of the data set.
      kind: of the records.
      source: the name of the file that the first record came from, for messages.
      second: the tokens of another model beside them, see `pipeline.build`; or None.

    Raises:
      DataError, ConfigError, ModelError: as `documents.Encoder`, or the encoder of the second view.
    """

    def __init__(
        self,
        codec: Codec,
        settings: Settings,
        kind: str,
        source: str,
        second: SecondView | PrivilegedView | None,
    ):
        self._tally, self._given = Tally(), (codec, settings, kind, source, second)
        self.kind = kind
        encoder: Any = Encoder if second is None else second.encoder
        self._encode = encoder(codec, settings, kind, self._tally, source=source)

    def __call__(self, records: Sequence[Record]) -> wire.Made:
        """What becomes of records."""
        documents = self._encode(records) if records else []
        hashes = np.asarray([fingerprint_of(one) for one in records], np.uint64)
        return wire.Made(documents, hashes, self._tally.taken())

    def portable(self) -> bytes:
        """What `opened` makes the same of in another process."""
        codec, settings, kind, source, second = self._given
        if PAIRS.get(kind, kind) in CHATS and settings.chat_template is None:
            template = rendering.template_of(codec.tokenizer)
            settings = dataclasses.replace(settings, chat_template=template)
        facts = {
            "codec": portable(codec),
            "settings": dataclasses.asdict(settings),
            "kind": kind,
            "source": source,
            "second": None if second is None else _view_facts(second),
        }
        return wire.packed(facts)


def _view_facts(view: SecondView | PrivilegedView) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(view) if field.name != "tokenizer"]
    own = {name: getattr(view, name) for name in names}
    return {"is": type(view).__name__, "codec": portable(view.codec), "own": own}


def _view(facts: Mapping[str, Any]) -> SecondView | PrivilegedView:
    codec = ported(facts["codec"])
    kind = {"SecondView": SecondView, "PrivilegedView": PrivilegedView}[facts["is"]]
    view = kind(tokenizer=codec.tokenizer, **facts["own"])
    vars(view)["codec"] = codec  # as it was prepared where the tokenizer was read
    return view


def opened(message: bytes) -> Callable[[bytes], bytes]:
    """The function of a process: from records to documents, both as bytes."""
    facts, _ = wire.unpacked(message)
    second = None if facts["second"] is None else _view(facts["second"])
    settings = Settings(**facts["settings"])
    worker = Worker(ported(facts["codec"]), settings, facts["kind"], facts["source"], second)
    return lambda records: wire.of_made(worker(wire.records_of(records)))
