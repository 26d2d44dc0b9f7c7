"""Shards: the documents of a file, or of several small ones, tokenised once and kept by content.

Neither the length of rows nor what else a data set is made of changes a shard: another `seq_len`,
or one more file, tokenises nothing again.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.data import fingerprint, store
from jaxdistill.data.codec import Codec
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.settings import Settings
from jaxdistill.data.shard_build import ShardBuild
from jaxdistill.data.sources import Source
from jaxdistill.data.tokenising import RecordBatch, Tokeniser
from jaxdistill.safe import manifest

# Part of every shard's identity: raise it when the same content would give other arrays or facts.
_VERSION = 1
_SMALL = 4 << 20  # bytes; smaller files share shards, larger ones have their own
_FULL = 64 << 20  # bytes of small files behind which a shard ends
_ENDS = 64  # so many small files share a shard on average: hashes decide behind which one it ends
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one folder holds, or will.

    Attributes:
      folder: where.
      identity: a hash of the content of its sources and of all that decides their documents.
      first: the number of its first source among those of the data set.
      sources: as the data set names them.
    """

    folder: Path
    identity: str
    first: int
    sources: tuple[Source, ...]


def planned(
    sources: Sequence[Source],
    contents: Sequence[Mapping[str, Any]],
    codec: Codec,
    settings: Settings,
    second: SecondView | PrivilegedView | None,
    cache: Path,
) -> list[Shard]:
    """The shards of sources, in order.

    Which small files share one depends on their content: a file that joins or leaves changes the
    shard that it is in, and perhaps the next.

    Args:
      sources: of the data set.
      contents: what each holds, see `fingerprint.content_of`.
      codec: of the tokenizer.
      settings: of the data set.
      second: see `pipeline.build`.
      cache: the folder of the shards.
    """
    beside = None if second is None else second.identity()
    decides = fingerprint.of_documents(codec, settings, beside) | {"shard": _VERSION}
    made = []
    for first, last in _grouped(sources, contents):
        content = {**decides, "contents": contents[first:last]}
        identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        folder = cache / f"tokens-{identity[:20]}"
        made.append(Shard(folder, identity, first, tuple(sources[first:last])))
    return made


def _grouped(
    sources: Sequence[Source], contents: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, int]]:
    """[first, last) of the sources that share a shard."""
    first, size = 0, 0
    for place, (source, content) in enumerate(zip(sources, contents, strict=True)):
        own = source.size
        if own is None or own >= _SMALL:
            if first < place:
                yield first, place
            yield place, place + 1
            first, size = place + 1, 0
            continue
        size += own
        if size >= _FULL or _drawn(content) % _ENDS == 0:
            yield first, place + 1
            first, size = place + 1, 0
    if first < len(sources):
        yield first, len(sources)


def _drawn(content: Mapping[str, Any]) -> int:
    """A number from 0 to 255 out of what a source holds."""
    return hashlib.sha256(content["sha256"].encode()).digest()[0]


def ensure(
    shards: Sequence[Shard], tokeniser: Tokeniser, *, codec: Codec, name: str, fail_fast: bool
) -> list[str]:
    """Builds the shards that are not there, or are damaged, and says which were.

    Args:
      shards: of the data set.
      tokeniser: of its records.
      codec: of the tokenizer.
      name: of the data set, for messages.
      fail_fast: whether the first broken record is an error.

    Raises:
      DataError: for records of several kinds, or, with fail_fast, a broken one.
      StorageError: if a folder cannot be written.
    """
    missing: dict[Path, Shard] = {}
    damages = []
    for shard in shards:
        there = shard.folder.exists()
        damage = store.problem(shard.folder) if there else None
        if damage:
            damages.append(damage)
        if damage or not there:
            missing.setdefault(shard.folder, shard)
            continue
        facts = manifest.read(shard.folder)
        assert facts["fingerprint"] == shard.identity
        if facts["kind"] is not None:
            source, line = facts["first"]
            tokeniser.meet(facts["kind"], shard.sources[source].name, line)
    if missing:
        _log.info("tokenising data.%s", name)
        given = {"vocab": len(codec.inert), "two_views": tokeniser.two_views}
        _build(
            [
                ShardBuild(
                    one.folder, one.identity, one.sources, tokeniser, fail_fast=fail_fast, **given
                )
                for one in missing.values()
            ],
            tokeniser,
        )
    return damages


def _build(builds: Sequence[ShardBuild], tokeniser: Tokeniser) -> None:
    """Builds shards one after the other; later ones are begun while the first is not sealed."""
    begun: list[ShardBuild] = []

    def batches() -> Iterator[tuple[tuple[ShardBuild, int | None], RecordBatch]]:
        for build in builds:
            begun.append(build.__enter__())
            for index, batch in build.batches():
                yield (build, index), batch
            yield (build, None), []

    def where(place: tuple[ShardBuild, int | None], batch: RecordBatch) -> str:
        assert place[1] is not None, "there is a batch"
        return place[0].where(place[1], batch)

    made = tokeniser.made(batches(), where)
    try:
        with contextlib.closing(made):
            for (build, index), batch, documents in made:
                if index is not None:
                    build.take(index, batch, documents)
                    continue
                build.seal()
                begun.remove(build)
                build.__exit__(None, None, None)
    except BaseException:
        for build in begun:
            build.__exit__(*sys.exc_info())
        raise
