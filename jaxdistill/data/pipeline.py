"""The door of the data room: build a data set once, then take batches of it by row."""

import dataclasses
import functools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import build as building
from jaxdistill.data import digests, fingerprint, quarantine, settings, store, tokenising
from jaxdistill.data.codec import prepare
from jaxdistill.data.dataset import Dataset, open_dataset
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.routes import Layout, Routing
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.sources import Source, open_source
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.safe import manifest
from jaxdistill.types import Batch, Span

_log = logging.getLogger(__name__)

Sources = str | Path | Source | Sequence[str | Path | Source]


def build(
    sources: Sources,
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
    routing: Routing | None = None,
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
    beside = None if second is None else second.identity()
    routed = None if routing is None else routing.identity()
    with digests.kept_in(Path(cache_dir)):
        identity = fingerprint.fingerprint(opened, codec, chosen, beside, routed)
    folder = Path(cache_dir) / f"{name}-{identity[:20]}"
    left_out = None if quarantine_path is None else Path(quarantine_path)
    notices = []
    damage = store.problem(folder) if folder.exists() else "not built yet"
    if damage:
        if folder.exists():
            notices.append(f"the cached data is damaged and was built again: {damage}")
        _log.info("tokenising data.%s", name)
        building.build(
            folder,
            opened,
            codec,
            chosen,
            identity,
            fail_fast=on_bad_record == "fail",
            name=name,
            quarantine_path=left_out,
            second=second,
            routing=routing,
            workers=tokenising.default_workers() if workers is None else workers,
        )
    facts = manifest.read(folder)
    assert facts["fingerprint"] == identity
    notices += facts["notices"]
    for notice in notices:
        _log.warning("data.%s: %s", name, notice)
    names = tuple(source.name for source in opened)
    quarantine.export(folder, names, left_out)
    allowed = 0.0 if on_bad_record == "fail" else max_bad_fraction
    _judge(facts["counts"], quarantine.first_reasons(folder, names), allowed, name, left_out)
    return open_dataset(folder, facts, name, tuple(notices), names)


def _open(sources: Sources, name: str) -> list[Source]:
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


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    start: int = 0,
    left_out: Sequence[tuple[int, int]] = (),
    seed: int,
    shuffle: bool = True,
    rows: Sequence[int] | None = None,
    threads: int = 2,
    layout: Layout | None = None,
) -> Iterator[tuple[Span, Batch]]:
    """Batches without end, epoch after epoch, each epoch in an order of its own.

    The epochs are one stream of rows, whose row r depends on (dataset, seed, r) only. A batch holds
    the next `batch_size` rows of the stream that are not left out. To resume, start at the row
    where the batch before ended, with batches of any size and any number of processes and threads.

        batch_size=4, start=0, left_out=[(2, 6)]     rows 0 1 6 7 | 8 9 10 11 | ...
                                                     Span(0, 8), Span(8, 12), ...

    Args:
      dataset: from `build`.
      batch_size: rows of the stream in the global batch.
      start: the row of the stream to start with.
      left_out: ranges (first row, end) that no batch holds, disjoint and ascending.
      seed: decides the order of every epoch.
      shuffle: False keeps the rows' own order in every epoch.
      rows: which rows of every global batch this process wants, such as
        `sharding.local_rows(mesh, batch_size)`; None: all.
      threads: how many prepare batches ahead; 0 prepares each when it is asked for.
      layout: of batches for several teachers, of `layout.size(batch_size)` rows; None: there are
        not several.

    Returns:
      An iterator of (Span, Batch of NumPy arrays [rows, L]).

    Raises:
      ConfigError: if a number is out of range.
    """
    wanted = _wanted(batch_size if layout is None else layout.size(batch_size), rows)
    if start < 0:
        raise ConfigError(f"data: row {start}: must be at least 0")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed: {seed}: must lie between 0 and 2**32 - 1")
    if start == 0 and batch_size > len(dataset):
        _log.warning(
            "batch_size = %d: the data set has %d rows, so every batch holds some of them more "
            "than once: take a smaller batch, a shorter seq_len, or more data",
            batch_size,
            len(dataset),
        )
    # Importing grain takes seconds, which building and inspecting data do not need.
    import grain

    stream = grain.MapDataset.range(len(dataset))
    if shuffle:
        stream = stream.seed(seed).shuffle()
    stream = stream.repeat()
    gaps = [(max(first, start), end) for first, end in left_out if end > start]

    def row_at(place: int) -> int:
        """The row of the stream behind `place` others that are not left out, from `start` on."""
        row = start + place
        for first, end in gaps:
            if row >= first:
                row += end - first
        return row

    padding = dataset.empty_row()

    def number_of(row: int) -> int:
        """Which row of the data stands at a row of the stream."""
        found: Any = stream[row]
        return int(found)

    def of_stream(row: int) -> Any:
        return dataset.in_epoch(dataset[number_of(row)], row // len(dataset))

    def batch_of(number: int) -> tuple[Span, Batch]:
        first = number * batch_size
        span = Span(row_at(first), row_at(first + batch_size - 1) + 1)
        places = range(batch_size)
        if layout is not None:
            routes = [dataset.route(number_of(row_at(first + row))) for row in places]
            places = layout.places(routes, batch_size).tolist()
        here = [places[place] for place in wanted]
        return span, stack([padding if row < 0 else of_stream(row_at(first + row)) for row in here])

    return _feed(batch_of, sys.maxsize, threads)


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    threads: int = 2,
) -> Iterator[tuple[int, Batch]]:
    """Every row exactly once, in order; the last batch is filled up with empty rows.

    Empty rows have segment 0 and a mask of False. All processes get the same number of batches.

    Args:
      dataset: from `build`.
      batch_size: rows of the global batch.
      rows: which rows of every global batch this process wants, as in `batches`.
      threads: how many prepare batches ahead.

    Returns:
      An iterator of (number, Batch of NumPy arrays [rows, L]).

    Raises:
      ConfigError: if a number is out of range.
    """
    wanted = _wanted(batch_size, rows)
    padding = dataset.empty_row()

    def batch_of(number: int) -> tuple[int, Batch]:
        indices = [number * batch_size + row for row in wanted]
        held = [dataset.in_epoch(dataset[i], 0) for i in indices if i < len(dataset)]
        return number, stack(held + [padding] * (len(indices) - len(held)))

    return _feed(batch_of, -(-len(dataset) // batch_size), threads)


def _wanted(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size}: must be at least 1")
    if rows is None:
        return range(batch_size)
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ConfigError(f"rows: {list(rows)}: must be some of 0 to {batch_size - 1}")
    return rows


def stack(rows: Sequence[Any]) -> Batch:
    """A batch of rows: trees of arrays by the names of `Batch`, such as `Dataset` gives."""
    return Batch(**_stacked(rows))


def _stacked(nodes: Sequence[Any]) -> Any:
    # By hand: jax.tree.map takes half as long again as np.stack alone.
    if isinstance(nodes[0], np.ndarray):
        return np.stack(nodes)
    return {name: _stacked([node[name] for node in nodes]) for name in nodes[0]}


def _feed(batch_of: Any, count: int, threads: int) -> Iterator[tuple[Any, Batch]]:
    """batch_of(0), batch_of(1), ..., made ahead of the reader in threads; the order is kept."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    # Grain names a function by its line in a file, which may be torn while somebody edits it, and
    # that would end the run; a partial has no line.
    made = functools.partial(batch_of)
    # No worker processes: they outlive a killed trainer, and slicing mapped arrays needs none.
    return iter(grain.MapDataset.range(count).map(made).to_iter_dataset(options))
