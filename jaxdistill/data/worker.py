"""Turns batches of records into documents: here, or in a process that is told how by a message."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data import rendering, wire
from jaxdistill.data.codec import Codec, portable, ported
from jaxdistill.data.documents import CHATS, Encoder
from jaxdistill.data.encode import Document, Documents
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
        counts, reasons, flat = _learnable(documents, whole=self.kind in PAIRS)
        return wire.Made(counts, reasons, hashes, _arrays(flat), self._tally.taken())

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


def _learnable(
    documents: Sequence[Documents], whole: bool
) -> tuple[list[int], dict[int, str], list[Document]]:
    """(how many of each record, why there are none, all) of the documents that teach something.

    Where records are learned as wholes, a document that teaches nothing takes the others along.
    """
    counts, reasons, flat = [0] * len(documents), {}, []
    for place, made in enumerate(documents):
        if isinstance(made, str):
            reasons[place] = made
            continue
        good = [one for one in made if one.loss[1:].any()]
        if not made:
            reasons[place] = "no token counts in the loss: the assistant says nothing"
        elif not good or (whole and len(good) < len(made)):
            reasons[place] = "no token counts in the loss"
        else:
            counts[place] = len(good)
            flat += good
    return counts, reasons, flat


def _arrays(documents: Sequence[Document]) -> dict[str, np.ndarray]:
    """The arrays of `wire.Made`."""
    join = lambda parts, dtype: np.concatenate([np.zeros(0, dtype), *parts])
    sizes = lambda parts: np.asarray([len(part) for part in parts], np.int64)
    ids, loss = [one.ids for one in documents], [one.loss for one in documents]
    made = {"tokens": join(ids, np.int32), "sizes": sizes(ids), "loss": np.zeros(0, bool)}
    if not all(one.all() for one in loss):
        made["loss"] = join(loss, bool)
    views = [one.beside for one in documents if one.beside is not None]
    if views:
        assert len(views) == len(documents), "all documents have a second view, or none"
        others = [one.ids for one in views]
        made |= {
            "groups": join([one.groups for one in views], np.int32),
            "second_tokens": join(others, np.int32),
            "second_groups": join([one.other_groups for one in views], np.int32),
            "second_sizes": sizes(others),
            "shortened": np.asarray([one.shortened for one in documents], bool),
        }
    return made


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
