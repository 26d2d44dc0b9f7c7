"""Asks a teacher behind a server about all texts of a configuration, and stores its answers."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import jaxdistill
from jaxdistill.config import Config
from jaxdistill.config.server import Api
from jaxdistill.data.teacher_cache import catalog, parts, work
from jaxdistill.data.teacher_cache.formats import Format, pack_ids
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.data.teacher_cache.parts import Wanted
from jaxdistill.errors import DamagedError, ModelError
from jaxdistill.reasoning.asking import added
from jaxdistill.reasoning.scored import Scored, Scorer
from jaxdistill.run import changes, served_teacher, stored
from jaxdistill.run.capture_progress import CaptureProgress
from jaxdistill.safe import json_file

log = logging.getLogger(__name__)

MOST = 1 << 14  # positions of a part: its answers lie about singly until all of them are there
_ARRAYS = ("ids", "logprobs")


def store(
    config: Config,
    server: Api,
    models: Any,
    form: Format,
    objects: Objects,
    rows: Sequence[work.CapturedRow],
    shard: tuple[int, int],
) -> dict[str, Any]:
    """Asks for all that is lacking; every answer is kept as it comes.

    Returns:
      whole: whether nothing is lacking any more; spent: requests, tokens and cost of all runs of
      this shard.

    Raises:
      ModelError: if the server refuses, or answers of a part failed; the others are kept.
    """
    identity = stored.words(models.tokenizer, models.vocab) | {
        "teacher.server": server.model,
        "format": form.facts(),
    }
    catalog.begin(objects, identity, _notes(config, server))
    every = list(work.in_parts(rows, 1, min(MOST, parts.rows_per_part(form))))
    own = [[one for batch in part for row in batch for _, one in row.pieces] for part in every]
    number, count = shard
    there = parts.whole(objects)
    mine = [one for one in own[number - 1 :: count] if parts.name_of(one) not in there]
    scorer = served_teacher.scorer(server, k=form.k, vocab=form.vocab)
    progress = CaptureProgress(sum(int(one.mask.sum()) for part in mine for one in part))
    purse = "spent.json" if count == 1 else f"spent-{number}-of-{count}.json"
    before = _spent(objects, purse)
    try:
        for part in mine:
            _store_part(objects, form, scorer, part, progress)
    finally:
        spent = added(before, scorer.spent())
        objects.put(catalog.PENDING + purse, json.dumps(spent).encode())
    if {parts.name_of(part) for part in own} <= parts.whole(objects):
        catalog.seal(objects)
        return {"whole": True, "spent": spent}
    return {"whole": False, "spent": spent}


def _notes(config: Config, server: Api) -> dict[str, Any]:
    return {
        "source": server.base_url,
        "seq_len": config.data.seq_len,
        "loss_on": config.data.loss_on,
        "code": changes.code(),
        "jaxdistill": jaxdistill.__version__,
    }


def _store_part(
    objects: Objects,
    form: Format,
    scorer: Scorer,
    part: Sequence[Wanted],
    progress: CaptureProgress,
) -> None:
    """Asks for what of a part was not answered before, and writes it once all of it is there."""
    names = {one.key: f"{catalog.PENDING}{one.key.hex()}-{form.k}" for one in part}
    there = set(objects.names())
    asked = [one for one in part if names[one.key] not in there]
    failed: list[Scored] = []
    for answer in scorer.score([(one.key, one.tokens.tolist()) for one in asked]):
        if answer.failed:
            failed.append(answer)
            continue
        assert answer.ids is not None and answer.logprobs is not None
        packed = _packed({"ids": answer.ids, "logprobs": answer.logprobs})
        objects.put(names[answer.job.tag[0]], packed)
        progress.wrote(len(packed))
    if failed:
        raise ModelError(
            f"teacher.api: {len(failed)} of {len(part)} segments of a part failed "
            f"({failed[0].reason}): what was received is kept: mend it and run the command again"
        )
    fields = [_fields(form, one, _unpacked(objects, names[one.key])) for one in part]
    arrays = {name: np.concatenate([one[name] for one in fields]) for name in fields[0]}
    parts.write(objects, form, part, arrays)
    for name in names.values():
        objects.drop(name)
    progress.add(len(arrays["rest"]))


def _fields(form: Format, one: Wanted, answer: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The stored fields of a segment's counted positions."""
    counted = np.flatnonzero(one.mask)
    logprobs = answer["logprobs"][counted].astype(np.float64)
    rest = np.clip(1 - np.exp(logprobs).sum(axis=-1, keepdims=True), 0, 1)
    types = form.fields()
    return {
        "ids": pack_ids(answer["ids"][counted], form.id_bytes),
        "logprobs": logprobs.astype(types["logprobs"][0]),
        "rest": rest.astype(types["rest"][0]),
    }


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    for name in _ARRAYS:
        np.lib.format.write_array(file, arrays[name], allow_pickle=False)
    return file.getvalue()


def _unpacked(objects: Objects, name: str) -> dict[str, np.ndarray]:
    """An answer that was kept.

    Raises:
      DamagedError: if it is none.
    """
    file = io.BytesIO(objects.get(name) or b"")
    try:
        return {one: np.lib.format.read_array(file, allow_pickle=False) for one in _ARRAYS}
    except (ValueError, EOFError) as error:
        raise DamagedError(f"{objects.place}: damaged: {name}: remove it to ask again") from error


def _spent(objects: Objects, name: str) -> dict[str, float]:
    """What was spent before.

    Raises:
      DamagedError: if that cannot be read.
    """
    content = objects.get(catalog.PENDING + name)
    if content is None:
        return {}
    try:
        return json_file.amounts(json_file.parse(content))
    except ValueError as error:
        raise DamagedError(
            f"{objects.place}: damaged: {catalog.PENDING}{name}: {error}: it says what was spent "
            "on the answers: mend or remove it"
        ) from error
