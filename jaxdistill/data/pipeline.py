"""The door of the data room: a data set is built once, and opened afterwards."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.data import build as building
from jaxdistill.data import digests, fingerprint, quarantine, settings, store
from jaxdistill.data import shards as sharding
from jaxdistill.data.codec import prepare
from jaxdistill.data.dataset import Dataset, open_dataset
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.routes import TeacherRoutes
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.sources import Source, open_source
from jaxdistill.data.tokenising import Tokeniser, default_workers
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.safe import manifest

_LAYOUT = 2  # of the folder of a data set: one of another is not opened
_log = logging.getLogger(__name__)

SourcesLike = str | Path | Source | Sequence[str | Path | Source]


def build(
    sources: SourcesLike,
    tokenizer: Any,
    *,
    seq_len: int,
    packing: str = "best_fit",
    loss_on: str = "all",
    cache_dir: str | Path,
    on_bad_record: str = "quarantine",
    max_bad_fraction: float = 0.001,
    quarantine_path: str | Path | None = None,
    name: str = "train",
    long_documents: str = "auto",
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    turns: str = "whole",
    special_tokens: str = "text",
    second: SecondView | PrivilegedView | None = None,
    routing: TeacherRoutes | None = None,
    workers: int | None = None,
) -> Dataset:
    """Tokenises, masks and packs the sources, or opens what an earlier call built from the same.

    A document is a text, a prompt with its completion, or a conversation; it begins with what the
    tokenizer puts before a text (conversations: what the template prints) and ends with the
    end-of-text token (conversations: only where the template prints no special token last). Special
    tokens written in the data stay text.

    Args:
      sources: files, folders and names as in `sources.open_source`, or opened sources; their
        order counts.
      tokenizer: a transformers PreTrainedTokenizerFast.
      seq_len: tokens in a row.
      packing: `best_fit`: several documents in a row, kept apart by segment_ids; `none`: one.
      loss_on: `all` tokens; `completion`: not the prompt, and of a conversational completion what
        the assistant says; `assistant`: only what the assistant says, the token that ends its turn
        included. Marks in the records take turns out.
      cache_dir: results are kept here, in a folder named after their fingerprint.
      on_bad_record: `quarantine` leaves unusable records out and lists them, `fail` stops at one.
      max_bad_fraction: more unusable records than this share of all is an error.
      quarantine_path: JSONL of file, line and reason, written when there are unusable records.
      name: for messages and the cache.
      long_documents: what becomes of documents longer than seq_len. `split`: windows of seq_len
        tokens, each a segment of its own; `truncate`: the rest is dropped and the document counted;
        `reject`: left out and counted. `auto` splits texts and truncates the others, whose later
        windows would have lost the question.
      chat_template: Jinja text in place of the tokenizer's own.
      template_kwargs: what the template is given besides, such as {"enable_thinking": False}.
      turns: `whole`: a conversation is one document; `each`: every turn of the assistant that is
        learned is the end of a document of its own, rendered as when the model is asked for it.
      special_tokens: `text`: special tokens written in texts and completions stay text; `parse`:
        they become special tokens, for text that is rendered already.
      second: the tokens of another model, in which rows give the same documents too.
      routing: several teachers: every row is for one of them.
      workers: processes that tokenise, where it takes longer than some seconds: the result is the
        same for any number. None: one for each processor.

    Returns:
      A Dataset.

    Raises:
      ConfigError: if a setting is not one of its choices.
      DataError: if a source is missing or cannot be read, holds no usable record or records of
        several kinds, does not suit `loss_on`, has too many unusable records, or a record for no
        teacher of several.
      ModelError: if the tokenizer is not a fast one, or the template has a syntax error.
      MismatchError: if the tokens of a tokenizer of two stand for no fixed bytes.
      StorageError: if cache_dir or quarantine_path cannot be written.
    """
    chosen = settings.Settings(
        seq_len=seq_len,
        packing=packing,
        loss_on=loss_on,
        long_documents=long_documents,
        chat_template=chat_template,
        template_kwargs=template_kwargs or {},
        turns=turns,
        special_tokens=special_tokens,
    )
    settings.check_choice("on_bad_record", on_bad_record, settings.ON_BAD_RECORD)
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ConfigError(f"data.max_bad_fraction: {max_bad_fraction}: must lie between 0 and 1")
    if workers is not None and workers < 1:
        raise ConfigError(f"data.workers: {workers}: must be at least 1")
    opened = _open(sources, name)
    codec = prepare(tokenizer)
    cache = Path(cache_dir)
    with digests.kept_in(cache):
        contents = [fingerprint.content_of(source) for source in opened]
    shards = sharding.planned(opened, contents, codec, chosen, second, cache)
    beside = None if second is None else second.identity()
    routed = None if routing is None else routing.identity()
    identity = fingerprint.fingerprint(opened, contents, codec, chosen, beside, routed)
    tokeniser = Tokeniser(codec, chosen, second, name, workers or default_workers())
    fail_fast = on_bad_record == "fail"
    left_out = None if quarantine_path is None else Path(quarantine_path)
    damages = sharding.ensure(shards, tokeniser, codec=codec, name=name, fail_fast=fail_fast)
    folder = cache / f"{name}-{_LAYOUT}-{identity[:20]}"
    damage = store.problem(folder) if folder.exists() else "not built yet"
    if damage:
        damages += [damage] if folder.exists() else []
        building.build(
            folder,
            shards,
            codec,
            chosen,
            identity,
            kind=tokeniser.kind,
            fail_fast=fail_fast,
            name=name,
            quarantine_path=left_out,
            second=second,
            routing=routing,
        )
    facts = manifest.read(folder)
    assert facts["fingerprint"] == identity
    notices = [f"the cached data is damaged and was built again: {one}" for one in damages]
    notices += facts["notices"]
    for notice in notices:
        _log.warning("data.%s: %s", name, notice)
    names = tuple(source.name for source in opened)
    quarantine.export(folder, names, left_out)
    allowed = 0.0 if fail_fast else max_bad_fraction
    _judge(facts["counts"], quarantine.first_reasons(folder, names), allowed, name, left_out)
    return open_dataset(folder, facts, name, tuple(notices), names)


def _open(sources: SourcesLike, name: str) -> list[Source]:
    several = [sources] if isinstance(sources, str | Path | Source) else list(sources)
    if not several:
        raise DataError(f"data.{name}: no files are given: name at least one")
    opened = [item if isinstance(item, Source) else open_source(item) for item in several]
    # The files of a folder are sources of their own: messages name the file. Its notes stay.
    return [
        dataclasses.replace(one, notes=source.notes if first else ())
        for source in opened
        for first, one in zip(
            (True, *(False for _ in source.parts)), source.parts or (source,), strict=False
        )
    ]


def _judge(
    counts: dict[str, int], reasons: list[str], allowed: float, name: str, left_out: Path | None
) -> None:
    bad, total = counts[quarantine.BROKEN], counts["records"]
    where = f"; all of them are listed in {left_out}" if left_out else ""
    quarantine.check_share(f"data.{name}", bad, total, allowed, reasons, where)
