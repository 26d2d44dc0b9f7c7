"""The fingerprint of a data set: of every byte, and of every setting that decides its rows."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.data import rendering
from jaxdistill.data.codec import Codec
from jaxdistill.data.settings import Settings
from jaxdistill.data.sources import Source
from jaxdistill.errors import DataError

# Part of every fingerprint: raise it when the same input would give other tokens, masks, rows or
# facts of the folder: one of before is not opened then.
_VERSION = 5


def content_of(source: Source) -> dict[str, Any]:
    """What a source holds, as JSON: how it is read, and a hash of its bytes.

    Raises:
      DataError: if it cannot be read.
    """
    try:
        return {"format": source.format, "sha256": source.digest()}
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from error


def fingerprint(
    sources: Sequence[Source],
    contents: Sequence[Mapping[str, Any]],
    codec: Codec,
    settings: Settings,
    second: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None,
) -> str:
    """A hash over every byte of the sources, the tokenizer, the template and the settings.

    `contents` are those of `content_of`; `second` is the identity of a second view, `routing` of
    several teachers; they join where there are such.
    """
    content: dict[str, Any] = {
        "version": _VERSION,
        "sources": [
            _identity(source, content) for source, content in zip(sources, contents, strict=True)
        ],
        "tokenizer": codec.fingerprint,
        "prefix": codec.prefix,
        "template": rendering.template_of(codec.tokenizer, settings.chat_template),
        "settings": dataclasses.asdict(settings),
    }
    content |= {} if second is None else {"second": second}
    if routing is not None:
        content["routing"] = {**routing, "of_sources": [one.teacher for one in sources]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity(source: Source, content: Mapping[str, Any]) -> dict[str, Any]:
    # Who wrote it joins where it matters, so that other data sets keep their fingerprints.
    whose = {} if source.origin == "data" else {"origin": source.origin}
    often = {} if source.weight == 1.0 else {"weight": source.weight}
    return {**content, **whose, **often}


def of_documents(
    codec: Codec, settings: Settings, second: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What decides, besides its content, which documents a source gives, as JSON.

    Without a second view, in which documents are cut to fit, that is not the length of rows.
    """
    names = ["loss_on", "template_kwargs", "turns", "special_tokens"]
    if second is not None:
        names += ["seq_len", "long_documents"]
    return {
        "tokenizer": codec.fingerprint,
        "prefix": codec.prefix,
        "end": codec.end,
        "template": rendering.template_of(codec.tokenizer, settings.chat_template),
        "settings": {name: dataclasses.asdict(settings)[name] for name in names},
        "second": second,
    }
