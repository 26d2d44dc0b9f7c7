"""Answers as rows of a batch: packed behind their prompts, in one of few numbers of rows."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data import packing
from jaxdistill.data.dataset import empty_route, empty_row, empty_second, put_second
from jaxdistill.data.encode import Beside
from jaxdistill.data.records import TEACHER
from jaxdistill.data.routes import MicroBatchLayout, TeacherRoutes
from jaxdistill.rollouts.answers import Answer


def buckets(most: int, unit: int) -> tuple[int, ...]:
    """The numbers of rows that batches may have, ascending: most, 3/4, 1/2, 3/8, 1/4, ... of it.

    Each costs one compiled step, and a batch is filled up by half of what it needs at most.

    Args:
      most: rows of the largest.
      unit: every number is a multiple of it; `most` is one.
    """
    assert most % unit == 0, "checked before"
    parts = most // unit
    halves = range(parts.bit_length() + 1)
    sizes = {-(-parts // 2**n) for n in halves} | {-(-3 * parts // 2 ** (n + 2)) for n in halves}
    return tuple(unit * size for size in sorted(sizes))


def rows_of(
    answers: Sequence[Answer],
    *,
    seq_len: int,
    pad: int,
    packing_by: str,
    sizes: Sequence[int],
    distilled: int | None,
    sampler: bool = False,
    silent: Sequence[bool] | None = None,
    sampled: Mapping[str, Sequence[Any]] | None = None,
    taught: Sequence[np.ndarray | None] | None = None,
    servers: Sequence[str] = (),
    routing: TeacherRoutes | None = None,
    layout: MicroBatchLayout | None = None,
    second: tuple[int, int] | None = None,
    beside: Sequence[Beside] | None = None,
    skip: int = 0,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The rows of a batch, and log q of every target in them.

    A document is a prompt and its answer. What is masked: the prompt, padding, and what follows the
    last token; the token that ended an answer counts.

    Args:
      answers: in the order in which their rows stand; `Answer.length` at most seq_len.
      seq_len: the length of a row.
      pad: the token that fills rows.
      packing_by: `best_fit`: several documents share a row; `none`: one each.
      sizes: of `buckets`; the last is at least the number of answers.
      distilled: so many tokens of each answer count; None: all.
      sampler: whether rows carry `Batch.sampler_logprobs`, log mu of the targets.
      silent: which answers count nothing; None: none of them.
      sampled: by name, for each answer, a number or one for each of its tokens: a leaf of that
        name in `sampled` of every row; None: rows have no such tree.
      taught: for each answer, a teacher's log p of each token that counts: `logprobs` in `teacher`
        of every row, float32 [seq_len, 1]; None: rows have no such tree.
      servers: of several teachers those that say it: each has such a tree in `teacher`, by its
        name, and the answers of others are None.
      routing: several teachers, of which the note `teacher` of each prompt names one; a row holds
        answers for one. None: there are not several.
      layout: of the rows for several.
      second: (length, padding) of rows of the teacher's view; None: there is no such view.
      beside: of each answer, with its prompt, what stands there; None: the same answer, behind
        `Prompt.context`.
      skip: so many tokens at the beginning of each answer do not count.

    Returns:
      Rows as `Dataset` gives them, as many as one of `sizes`, of several teachers its
      `layout.size`; and float32 [rows, seq_len], the
      sampler's log q where the mask is true, else 0.
    """
    if second is not None and beside is None:
        beside = [behind(one) for one in answers]
    held, routes = _packed(answers, seq_len, packing_by, routing, second, beside)
    if layout is None:
        count = next(size for size in sizes if size >= len(held))
        places = [*range(len(held)), *[-1] * (count - len(held))]
    else:
        size = next(size for size in sizes if layout.fits(routes, size))
        places = layout.places(routes, size).tolist()
        count = len(places)
    route = {} if routing is None else empty_route()
    view = lambda: {} if second is None else empty_second(seq_len, *second)
    rows: list[dict[str, Any]] = [empty_row(seq_len, pad) | route | view() for _ in range(count)]
    types = {name: np.asarray(values[0]).dtype for name, values in (sampled or {}).items()}
    for row in rows if types else ():
        row["sampled"] = {name: np.zeros(seq_len, dtype) for name, dtype in types.items()}
    for row in rows if taught is not None else ():
        row["teacher"] = empty_scores(seq_len, servers)
    logprobs = np.zeros((count, seq_len), np.float32)
    if sampler:
        for row in rows:
            row["sampler_logprobs"] = np.zeros(seq_len, np.float32)
    for number, row in enumerate(places):
        place = other = groups = 0
        if row >= 0 and routing is not None:
            rows[number]["route"] = np.asarray(routes[row], np.int32)
        for segment, (index, length, *_) in enumerate(held[row] if row >= 0 else [], start=1):
            answer, most = answers[index], distilled or len(answers[index].tokens)
            counted = 0 if silent and silent[index] else min(len(answer.tokens), most)
            drawn = {name: values[index] for name, values in (sampled or {}).items()}
            theirs = None
            if taught is not None and (said := taught[index]) is not None:
                tree = rows[number]["teacher"]
                theirs = tree[answer.prompt.notes[TEACHER]] if servers else tree, said
            target = slice(min(skip, counted), counted)
            _put(rows[number], logprobs[number], answer, place, segment, target, drawn, theirs)
            if beside is not None:
                put_second(rows[number], beside[index], place, other, segment, groups)
                other += len(beside[index].ids)
                groups += int(beside[index].groups.max())
            place += length
    return rows, logprobs


def empty_scores(seq_len: int, servers: Sequence[str] = ()) -> dict[str, Any]:
    """What a row has in `teacher` of a server that said nothing, or of several by their names."""
    one = lambda: {"logprobs": np.zeros((seq_len, 1), np.float32)}
    return {name: one() for name in servers} or one()


def _packed(
    answers: Sequence[Answer],
    seq_len: int,
    packing_by: str,
    routing: TeacherRoutes | None,
    second: tuple[int, int] | None,
    beside: Sequence[Beside] | None,
) -> tuple[list[list[list[int]]], list[int]]:
    """Of each row its answers, as numbers and lengths; and which of several teachers it is for."""
    if not answers:
        return [], []
    lengths = np.asarray([one.length for one in answers])
    pieces, capacity = np.stack([np.arange(len(answers)), lengths], axis=1), [seq_len]
    if second is not None and beside is not None:
        theirs = np.asarray([len(one.ids) for one in beside])
        pieces = np.column_stack([pieces, np.arange(len(answers)), theirs])
        capacity.append(second[0])
    named = [0] * len(answers)
    if routing is not None:
        named = [routing.names.index(one.prompt.notes[TEACHER]) + 1 for one in answers]
    held, routes = [], []
    for route in sorted(set(named)):
        placed, ends = packing.plan(pieces[np.equal(named, route)], capacity, packing_by)
        held += [placed[a:b].tolist() for a, b in itertools.pairwise(ends.tolist())]
        routes += [route] * (len(ends) - 1)
    return held, routes


def behind(answer: Answer) -> Beside:
    """An answer behind `Prompt.context`, as groups of one token.

    Where the teacher is told nothing it reads the student's prompt, and no token is in a group.
    """
    context, count = answer.prompt.context, len(answer.tokens)
    told, prompt = context is not None, answer.prompt.tokens
    theirs = prompt if context is None else context
    groups = np.arange(1, count + 1, dtype=np.int32) * told
    under = lambda prompt: np.concatenate([np.zeros(len(prompt), np.int32), groups])
    return Beside(under(prompt), np.concatenate([theirs, answer.tokens]), under(theirs))


def _put(
    row: dict[str, Any],
    logprobs: np.ndarray,
    answer: Answer,
    place: int,
    segment: int,
    target: slice,
    beside: Mapping[str, Any],
    theirs: tuple[Mapping[str, np.ndarray], np.ndarray] | None,
) -> None:
    """Writes a prompt and its answer, of which a slice counts, into a row, from a place on."""
    text = np.concatenate([answer.prompt.tokens, answer.tokens])
    first = place + len(answer.prompt.tokens) - 1  # predicts the answer's first token
    row["tokens"][place : place + len(text)] = text
    row["targets"][place : place + len(text) - 1] = text[1:]
    counted = slice(first + target.start, first + target.stop)
    row["mask"][counted] = True
    row["positions"][place : place + len(text)] = np.arange(len(text))
    row["segment_ids"][place : place + len(text)] = segment
    logprobs[counted] = answer.logprobs[target]
    if "sampler_logprobs" in row:
        row["sampler_logprobs"][counted] = answer.drawn_logprobs[target]
    for name, values in beside.items():
        one = np.broadcast_to(values, len(answer.tokens))
        row["sampled"][name][counted] = one[target]
    if theirs is not None:
        tree, said = theirs
        tree["logprobs"][counted, 0] = said[target]
