"""The feed: whose turn it is, what it asks for, what it recalls, what a checkpoint keeps."""

import json
import types

import numpy as np
import pytest

from jaxdistill.data import batching
from jaxdistill.data.dataset import empty_row
from jaxdistill.data.feed import Feed
from jaxdistill.data.prompts import Prompt, Prompts
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.feed import FILE, RolloutFeed, RolloutPlan
from jaxdistill.rollouts.replay import ReplayBuffer, ReplaySettings
from jaxdistill.rollouts.writing import Writer
from jaxdistill.types import Span

PROMPTS = [Prompt(np.asarray([1 + n], np.int32), {}) for n in range(50)]


class Scribe(Writer):
    """Answers every prompt with the version and the place; counts how often it is asked."""

    seconds = 1.0

    def __init__(self):
        self.asked = []
        self.stopping = False

    def write(self, params, version, prompts):
        if self.stopping:
            return None
        self.asked.append((version, sorted(prompts)))
        return [
            Answer(
                prompts[place],
                place,
                sample,
                version,
                np.asarray([version, place], np.int32),
                True,
                np.zeros(2, np.float32),
                np.zeros(2, np.float32),
            )
            for place in sorted(prompts)
            for sample in range(2)
        ]


class Corpus(Feed):
    """Rows whose first token says where they stand, below 0."""

    def next(self, row, state):
        filled = [empty_row(4, -1 - row) for _ in range(4)]
        return Span(row, row + 4), batching.stack(filled)

    def epoch(self, row):
        return float(row)

    def usual(self):
        return self.next(0, None)[1]


def make(share=1.0, max_age=0, left_out=(), replay=None):
    scribe = Scribe()
    feed = RolloutFeed(
        RolloutPlan(share, 2, 2, max_age, seed=5),
        Prompts(PROMPTS, ""),
        scribe,
        corpus=Corpus(),
        params_of=lambda state: state,
        shape={"seq_len": 4, "pad": 0, "packing_by": "none", "distilled": None},
        unit=1,
        replay=replay,
        rows=range,
        recalled=64,
        left_out=lambda: left_out,
    )
    return feed, scribe


def at(step):
    return types.SimpleNamespace(step=step)


def written(batch):
    """(version, place) of every row."""
    return [(int(row[1]), int(row[2])) for row in np.asarray(batch.tokens)]


def test_an_update_asks_its_own_prompts_with_the_parameters_before_it():
    feed, scribe = make()
    for step in range(3):
        span, batch = feed.next(4 * step, at(step))
        assert span == Span(4 * step, 4 * step + 4)
        places = [2 * step, 2 * step, 2 * step + 1, 2 * step + 1]
        assert written(batch) == [(step, place) for place in places]
        asked = {feed._prompts.at(place, 5).tokens[0] for place in places}
        assert {int(row[0]) for row in np.asarray(batch.tokens)} == asked
        assert feed.numbers(span)["rollout/age"] == 0 and feed.numbers(span)["rollout/answers"] == 4
    assert not feed.beside(12)


def test_share_is_drawn_for_each_update_and_the_others_are_the_corpus():
    half, _ = make(0.5)
    turns = [half.plan.of_student(update) for update in range(2000)]
    assert 0.45 < np.mean(turns) < 0.55
    assert turns != [RolloutPlan(0.5, 2, 2, 0, 6).of_student(update) for update in range(2000)]
    none, scribe = make(0.0)
    assert [int(none.next(4 * u, at(u))[1].tokens[0, 0]) for u in range(3)] == [-1, -5, -9]
    assert not scribe.asked and all(RolloutPlan(1.0, 2, 2, 0, 5).of_student(u) for u in range(100))
    for update, student in enumerate(turns[:8]):
        span, batch = half.next(4 * update, at(update))
        assert (batch.tokens[0, 0] > 0) == student
        assert half.origin(span) == ("student" if student else "data")
        assert half.numbers(span)["rollout/student"] == student


def test_answers_of_several_updates_are_written_at_once_and_kept_in_checkpoints():
    feed, scribe = make(max_age=2)
    whole = [written(feed.next(4 * step, at(step))[1]) for step in range(6)]
    assert [one[0][0] for one in whole] == [0, 0, 0, 3, 3, 3]
    assert [version for version, _ in scribe.asked] == [0, 3]
    for stop in range(1, 6):
        feed, _ = make(max_age=2)
        for step in range(stop):
            feed.next(4 * step, at(step))
        meta = feed.beside(4 * stop)
        assert bool(meta) == (stop % 3 != 0)
        again, scribe = make(max_age=2)
        again.begin(meta)
        rest = [written(again.next(4 * step, at(step))[1]) for step in range(stop, 6)]
        assert rest == whole[stop:]
        assert again.numbers(Span(20, 24))["rollout/age"] == 2
        assert len(scribe.asked) == (stop <= 3)


def test_going_back_asks_again_unless_the_batch_is_recalled():
    feed, scribe = make()
    first = written(feed.next(0, at(0))[1])
    assert written(feed.next(0, at(0))[1]) == first and len(scribe.asked) == 1  # a rerun
    feed.next(4, at(1))
    feed.next(0, at(0))  # the step before was run again, so that the next one meets another state
    assert written(feed.next(4, at(7))[1])[0][0] == 7
    feed.begin({})  # a rollback
    feed.next(0, at(0))
    assert [version for version, _ in scribe.asked] == [0, 1, 7, 0]


def test_going_back_to_given_text_forgets_what_was_written_behind_it():
    """The step on given text is run again, so that the next one meets another state."""
    turns = RolloutPlan(0.5, 2, 2, 0, seed=5).of_student
    given = next(update for update in range(99) if not turns(update) and turns(update + 1))
    feed, scribe = make(0.5)
    feed.next(4 * given, at(0))
    assert written(feed.next(4 * given + 4, at(1))[1])[0][0] == 1
    feed.next(4 * given, at(0))
    assert written(feed.next(4 * given + 4, at(9))[1])[0][0] == 9
    assert [version for version, _ in scribe.asked] == [1, 9]


def test_rates_are_of_all_writing_since_the_last_record():
    feed, scribe = make(max_age=1)
    scribe.seconds = 2.0
    for step in range(3):  # written for two updates, and for two more
        feed.next(4 * step, at(step))
    told = feed.numbers(Span(4, 8))  # the next batch may be made before a step is recorded
    assert told["perf/rollout_seconds"] == 2 and told["perf/rollout_tokens_per_second"] == 16 / 2
    told = feed.numbers(Span(8, 12))
    assert told["perf/rollout_seconds"] == 2
    feed.next(12, at(3))
    assert "perf/rollout_seconds" not in feed.numbers(Span(12, 16))


def test_epochs_are_those_of_the_rows_or_prompts_that_are_read():
    for share, epoch in ((0.5, 10.0), (1.0, 0.1)):
        feed, _ = make(share)
        assert feed.epoch(10) == epoch and (feed.usual() is None) == (share == 1)
        for step in range(2):
            feed.next(4 * step, at(step))
            assert feed.numbers(Span(4 * step, 4 * step + 4))["rollout/epoch"] == (step + 1) * 0.04


def test_rows_that_are_left_out_are_not_asked():
    feed, scribe = make(left_out=[(4, 12)])
    assert feed.next(0, at(0))[0] == Span(0, 4)
    span, batch = feed.next(4, at(1))
    assert span == Span(12, 16) and written(batch)[0] == (1, 6)


def test_nothing_is_kept_of_answers_that_were_stopped():
    feed, scribe = make(max_age=1)
    scribe.stopping = True
    assert feed.next(0, at(0)) is None
    assert not feed.beside(0)
    scribe.stopping = False
    assert written(feed.next(0, at(0))[1])[0] == (0, 0)


def replayed():
    return make(0.7, replay=ReplayBuffer(ReplaySettings(8, "constant", 0.7, 30, 0.1, 0.1), 5, 40))


def test_old_answers_are_met_again_and_a_run_resumes_in_the_midst():
    """Against one run from the start: turns, answers and phi, for every place of a checkpoint."""

    def run(feed, first, last):
        found = []
        for step in range(first, last):
            span, batch = feed.next(4 * step, at(step))
            told = {n: v for n, v in feed.numbers(span).items() if not n.startswith("perf/")}
            found.append((written(batch), feed.origin(span), told))
            feed.evaluated(span.end_row, {"eval/loss": (step % 5) / 4})
        return found

    feed, scribe = replayed()
    whole = run(feed, 0, 30)
    old = [told["rollout/replayed"] for *_, told in whole]
    assert 0 < sum(old) < sum(one == "student" for _, one, _ in whole) < 30
    assert len(scribe.asked) == sum(one == "student" for _, one, _ in whole) - sum(old)
    ages = [told["rollout/age"] for *_, told in whole if told["rollout/replayed"]]
    assert min(ages) > 0 and whole[0][2]["rollout/share"] < whole[29][2]["rollout/share"]
    for stop in (1, 7, 16, 25):
        feed, _ = replayed()
        run(feed, 0, stop)
        meta = {**feed.kept(4 * stop), **feed.beside(4 * stop)}
        again, _ = replayed()
        again.begin(json.loads(json.dumps(meta)))
        assert run(again, stop, 30) == whole[stop:]
    run(feed, 25, 30)
    assert run(feed, 20, 30) == whole[20:]  # going back without a checkpoint


def test_the_checkpoint_holds_json():
    feed, _ = make(max_age=1)
    feed.next(0, at(0))
    kept = json.loads(json.dumps(feed.beside(4)))
    assert [one["update"] for one in kept[FILE]["ahead"]] == [1]


def test_updates_lie_one_behind_the_other():
    with pytest.raises(AssertionError, match="one behind the other"):
        make()[0].next(3, at(0))
