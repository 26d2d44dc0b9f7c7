"""Answers in the tokens of two models as rows of batches: what is compared, counted, made again."""

import json
import types

import jax
import numpy as np
import pytest

from jaxdistill.data.codec import prepare
from jaxdistill.data.prompts import Prompt, Prompts
from jaxdistill.data.records import Record
from jaxdistill.data.second_answers import AnswerViews
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.token_bytes import token_bytes
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.feed import RolloutFeed, RolloutPlan
from jaxdistill.rollouts.rows import rows_of
from jaxdistill.rollouts.views import Aligner
from jaxdistill.rollouts.writing import Writer
from tests.data.test_alignment import TOKENIZERS
from tests.data.test_second_view import spelled

OURS, THEIRS = byte_tokenizer(), TOKENIZERS["byte-level 400"]
TEXTS = ["the quick fox", " jumps over", "日本語 naïve", "a", "lazy dog the"]
SHAPE = {"seq_len": 64, "pad": 0, "packing_by": "best_fit", "second": (32, 7)}


def ids(text):
    return np.asarray(OURS(text, add_special_tokens=False)["input_ids"], np.int32)


@pytest.fixture(scope="module")
def asked():
    """Prompts of a student that reads bytes, in the tokens of a teacher too."""
    views = AnswerViews(SecondView(THEIRS, 32), prepare(OURS), 64, None, {})
    made = []
    for text in ("fox: ", "the dog ", "日: "):
        view = views.of(Record("prompt", (text,), 1), ids(text).tolist())
        made.append(Prompt(ids(text), {}, view=view))
    return made


def answer(prompt, tokens, place=0, sample=0, version=0):
    tokens = np.asarray(tokens, np.int32)
    values = np.arange(len(tokens), dtype=np.float32)
    return Answer(prompt, place, sample, version, tokens, False, -values, -values)


@pytest.mark.parametrize("distilled", [None, 4])
def test_rows_hold_every_answer_that_can_be_compared_in_both_views(asked, distilled):
    table = token_bytes(THEIRS)
    given = [answer(asked[i % 3], ids(text)) for i, text in enumerate(TEXTS)]
    broken = answer(asked[0], ids("日")[:2])
    long = answer(asked[1], ids("xyz" * 11))  # 33 tokens of the teacher, too
    found = Aligner(distilled)([broken, *given, long])
    if distilled:  # of some the teacher's first token is longer
        first = [table.pieces(THEIRS(text)["input_ids"][:1])[0] for text in TEXTS]
        given = [one for one, piece in zip(given, first, strict=True) if len(piece) <= distilled]
    assert found.answers == given and len(given) == (4 if distilled else 5)
    unaligned = (6 - len(given)) / 7
    assert found.numbers == {"rollout/unaligned": unaligned, "rollout/too_long": 1 / 7}
    rows, logprobs = rows_of(
        found.answers, beside=found.beside, sizes=(1, 2, 4, 8), distilled=distilled, **SHAPE
    )
    assert len(rows) < len(given)  # several share a row
    read = []
    for row in rows:
        second = row["second"]
        mine = spelled(OURS, row["tokens"], row["groups"])
        assert mine == spelled(THEIRS, second["tokens"], second["groups"])
        assert list(mine) == list(range(1, len(mine) + 1))
        for number in set(row["segment_ids"]) - {0}:
            here, there = row["segment_ids"] == number, second["segment_ids"] == number
            assert OURS.decode(row["tokens"][here]) == THEIRS.decode(second["tokens"][there])
            own = spelled(OURS, row["tokens"] * here, row["groups"] * here)
            read.append(b"".join(own.values()).decode(errors="ignore"))
            assert second["positions"][there].tolist() == list(range(there.sum()))
            # What counts to the student is what is compared, in groups of which all of it counts.
            counted, grouped = (row["mask"] & here).sum(), (row["groups"][here] > 0).sum()
            assert counted >= grouped and (distilled or counted == grouped)
        assert (np.diff(row["groups"][row["groups"] > 0]) >= 0).all()
    texts = [text.encode()[:distilled].decode(errors="ignore") for text in TEXTS]
    if distilled:
        assert all(any(text.startswith(one) for text in texts) for one in read)
    else:
        assert sorted(read) == sorted(texts)


def test_where_nothing_can_be_compared_a_batch_counts_nothing(asked):
    found = Aligner(None)([answer(asked[0], ids("日")[:1])] * 2)
    assert found.answers == [] and found.numbers["rollout/unaligned"] == 1
    rows, logprobs = rows_of(
        found.answers, beside=found.beside, sizes=(2, 4), distilled=None, **SHAPE
    )
    assert len(rows) == len(logprobs) == 2
    for row in rows:
        assert not row["mask"].any() and not row["groups"].any()
        assert (row["second"]["tokens"] == 7).all() and not row["second"]["groups"].any()


class Scribe(Writer):
    """Answers with texts by version and place, some of them no UTF-8."""

    seconds = 1.0

    def __init__(self):
        pass

    def write(self, params, version, prompts):
        return [
            answer(
                prompts[place],
                ids(TEXTS[(place + sample + version) % 5])[: 3 + place % 9],
                place,
                sample,
                version,
            )
            for place in sorted(prompts)
            for sample in range(2)
        ]


def test_answers_out_of_a_checkpoint_are_aligned_to_the_same_bits(asked):
    def run(feed, first):
        found = []
        for step in range(first, 6):
            span, batch = feed.next(4 * step, types.SimpleNamespace(step=step))
            found.append((batch, feed.numbers(span)["rollout/unaligned"]))
        return found

    def make():
        return RolloutFeed(
            RolloutPlan(1.0, 2, 2, 2, seed=5),
            Prompts(asked, ""),
            Scribe(),
            corpus=None,
            params_of=lambda state: state,
            shape={"distilled": 5, **SHAPE},
            unit=1,
            rows=range,
            recalled=64,
            left_out=lambda: (),
            aligner=Aligner(5),
        )

    whole = run(make(), 0)
    assert any(share > 0 for _, share in whole) and any(share < 1 for _, share in whole)
    for stop in (1, 2, 5):
        feed = make()
        for step in range(stop):
            feed.next(4 * step, types.SimpleNamespace(step=step))
        again = make()
        again.begin(json.loads(json.dumps(feed.beside(4 * stop))))
        for (batch, share), (other, as_before) in zip(run(again, stop), whole[stop:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, batch, other)
            assert share == as_before
