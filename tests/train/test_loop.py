"""The loop: its order, what is recorded when, and which step a number belongs to."""

import contextlib
import itertools
import json
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data.feed import Feed
from jaxdistill.errors import DamagedError, DivergedError, Preempted, StorageError
from jaxdistill.report import MetricsWriter, ProgressLine
from jaxdistill.train import loop
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.guard import Guard, GuardPolicy
from jaxdistill.train.meter import Meter
from jaxdistill.train.saving import SaveSchedule
from jaxdistill.train.state import TrainState
from jaxdistill.train.stopping import Stop
from jaxdistill.types import Batch, Mean, Span

ROWS = 2  # of every batch


def at(step, learned=(), skipped=(0, 0)):
    """A state whose parameters are the numbers of the batches that moved them."""
    numbers = (jnp.asarray(one, jnp.int32) for one in (step, learned, skipped))
    step, learned, skipped = numbers
    return TrainState(step, learned, None, None, skipped)


def learned_by(state):
    return tuple(np.asarray(state.params).tolist())


def batch_of(index):
    numbers = np.full((ROWS, 3), index, np.int32)
    return Batch(numbers, numbers, numbers > 0, numbers, numbers)


def span_of(first, end=None):
    """The rows of a batch by its number, or of several."""
    return Span(first * ROWS, (first + 1 if end is None else end) * ROWS)


class Given(Feed):
    """Ten rows are an epoch."""

    def epoch(self, row):
        return row / 10


def run(
    schedule,
    bad=(),
    overlaps=True,
    first=0,
    skipped=(0, 0),
    policy=None,
    folder="/no/such/folder",
    loss=lambda number, index: 10.0 - number,
    evaluation=None,
    stop_at=None,
    feed=None,
    log=None,
    waits=(),
    place=lambda span, batch: batch,
):
    """Trains with stand-ins that note what is asked of them: (state, log).

    The log counts batches of ROWS rows, which is what a feed of one batch after the other gives.
    A batch goes wrong when its index is in `bad`, which may map it to how often; a callable decides
    by the index and the batches learned so far.
    """
    log, disk, stop = [] if log is None else log, {}, Stop()
    waits = iter(waits)
    left = dict(bad) if isinstance(bad, dict) else {}

    def goes_wrong(index, learned):
        if callable(bad):
            return bad(index, learned)
        if index in left:
            left[index] -= 1
            return left[index] >= 0
        return index in bad and not left

    def step(state, teacher, batch):
        number, index = int(state.step) + 1, int(batch.tokens[0, 0])
        in_a_row, altogether = np.asarray(state.skipped).tolist()
        learned = learned_by(state)
        wrong = goes_wrong(index, learned)
        skipped = (in_a_row + 1, altogether + 1) if wrong else (0, altogether)
        value = float("nan") if wrong else loss(number, index)
        values = {"loss/total": value, "optim/grad_norm": 1.0}
        values |= {"guard/in_a_row": skipped[0], "guard/skipped": skipped[1]}
        log.append(("step", number, index))
        stop.asked = "SIGTERM" if number == stop_at else stop.asked
        means = {name: Mean(jnp.float32(v), jnp.float32(1)) for name, v in values.items()}
        return at(number, learned if wrong else (*learned, index), skipped), means

    def write(number, scalars):
        kind = "eval" if any(name.startswith("eval/") for name in scalars) else "metrics"
        log.append((kind, number, dict(scalars)))

    def save(number, state, meta, metrics, beside):
        counts = np.asarray(state.skipped).tolist()
        disk[number] = int(state.step), learned_by(state), counts, {**meta, **beside}
        log.append(("save", number, metrics))

    def restore():
        if not disk:
            return at(first, (), skipped), {loop.ROW: first * ROWS}
        *parts, meta = disk[max(disk)]
        return at(*parts), meta

    writer = mock.Mock(spec=MetricsWriter)
    writer.write.side_effect = write
    writer.rewind.side_effect = lambda number: log.append(("rewind", number))
    writer.event.side_effect = lambda kind, **fields: log.append(("event", kind, fields))
    checkpoints = mock.Mock(spec=Checkpoints)
    checkpoints.save.side_effect = save

    def wait():
        log.append(("waited",))
        if failure := next(waits, None):
            raise failure

    checkpoints.wait.side_effect = wait
    meter = mock.Mock(spec=Meter, overlaps=overlaps)
    meter.waiting.side_effect = lambda what: contextlib.nullcontext()
    meter.read.side_effect = lambda steps, rows: {"perf/steps_read": steps, "perf/rows_read": rows}
    guard = Guard(folder, policy or GuardPolicy())
    guard.begin({})

    class Corpus(Given):
        def next(self, row, state):
            gaps = {number for first, end in guard.left_out for number in range(first, end)}
            index = next(row for row in itertools.count(row) if row not in gaps) // ROWS
            return span_of(index), batch_of(index)

    parts = loop.Parts(
        step=lambda number, state, batch: step(state, None, batch),
        feed=feed or Corpus(),
        place=place,
        evaluate=lambda number, state: {"eval/loss": evaluation or float(state.step)},
        learning_rate=lambda update: 0.5**update,
        meta={"seed": 3},
        restore=restore,
        guard=guard,
        checkpoints=checkpoints,
        writer=writer,
        progress=mock.Mock(spec=ProgressLine),
        meter=meter,
        stop=stop,
    )
    return loop.train(
        at(first, (), skipped), Corpus().next(first * ROWS, None)[0][0], parts, schedule
    ), log


def schedule(**changes):
    values = {"steps": 7, "log_every": 2, "eval_every": 3}
    values["save"] = SaveSchedule(changes.pop("save_steps", 4), None, max_unsaved_minutes=10.0)
    return loop.Schedule(**(values | changes))


@pytest.mark.parametrize("overlaps", [True, False])
def test_everything_happens_at_its_step(overlaps):
    state, log = run(schedule(), overlaps=overlaps)
    assert state.step == 7
    steps = lambda kind: [entry[1] for entry in log if entry[0] == kind]
    assert steps("step") == [1, 2, 3, 4, 5, 6, 7]
    assert steps("metrics") == [1, 2, 4, 6, 7]
    assert steps("eval") == [3, 6, 7]
    assert steps("save") == [1, 4, 7]
    recorded = {entry[1]: entry[2] for entry in log if entry[0] == "metrics"}
    for number, numbers in recorded.items():
        assert numbers["loss/total"] == 10.0 - number
        assert numbers["optim/lr"] == 0.5 ** (number - 1)
        assert numbers["data/epoch"] == number * ROWS / 10
        assert "guard/in_a_row" not in numbers
    read = [recorded[number]["perf/steps_read"] for number in sorted(recorded)]
    assert read == [1, 1, 2, 2, 1]
    assert [recorded[number]["perf/rows_read"] for number in sorted(recorded)] == [2, 2, 4, 4, 2]


def test_numbers_are_read_one_step_late_only_where_that_saves_time():
    for overlaps, after in ((True, ("step", 3)), (False, ("step", 2))):
        _, log = run(schedule(eval_every=None, save_steps=None), overlaps=overlaps)
        index = next(i for i, entry in enumerate(log) if entry[:2] == ("metrics", 2))
        assert log[index - 1][:2] == after


def test_a_batch_is_placed_before_the_step_in_front_of_it_is_waited_for():
    log = []
    place = lambda span, batch: log.append(("place", span.end_row // ROWS)) or batch
    run(schedule(eval_every=None, save_steps=None, log_every=1), log=log, place=place)
    order = [entry[:2] for entry in log]
    for number in range(2, 7):
        ahead = order.index(("place", number + 1))
        assert order.index(("step", number)) < ahead < order.index(("metrics", number))


def test_a_checkpoint_carries_the_evaluation_of_its_step_and_no_other():
    _, log = run(schedule(eval_every=4))
    saved = {entry[1]: entry[2] for entry in log if entry[0] == "save"}
    assert saved == {1: None, 4: {"eval/loss": 4.0}, 7: {"eval/loss": 7.0}}
    _, log = run(schedule(eval_every=None))
    saved = {entry[1]: entry[2] for entry in log if entry[0] == "save"}
    assert saved == {1: None, 4: None, 7: {"eval/loss": 7.0}}


def test_a_resumed_loop_takes_the_batch_of_its_step():
    _, log = run(schedule(), first=5)
    assert [entry[1:] for entry in log if entry[0] == "step"] == [(6, 5), (7, 6)]


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_saves_it():
    with pytest.raises(Preempted, match="SIGTERM: saved after step 5 of 7") as stopped:
        run(schedule(), stop_at=5)
    assert stopped.value.exit_code == 75
    state, log = run(schedule(), stop_at=7)  # the last step is done: there is nothing to stop
    assert state.step == 7 and log[-1][:2] == ("event", "save")


@pytest.mark.parametrize("done", [4, 5])  # its save is on its way, and not asked for
def test_a_stop_while_a_batch_is_made_saves_the_step_before_it(done):
    class Stopped(Given):
        def next(self, row, state):
            index = row // ROWS
            return None if state.step == done else (span_of(index), batch_of(index))

    log = []
    with pytest.raises(Preempted, match=f"saved after step {done} of 7"):
        run(schedule(), feed=Stopped(), log=log)
    save = max(place for place, entry in enumerate(log) if entry[:2] == ("save", done))
    assert ("waited",) in log[save:] and log[-1][:2] == ("event", "stopped")


def test_a_save_that_failed_unseen_is_made_again_before_a_stop():
    class Stopped(Given):
        def next(self, row, state):
            index = row // ROWS
            return None if state.step == 4 else (span_of(index), batch_of(index))

    log, failures = [], [StorageError("full"), None, None]
    with pytest.raises(Preempted, match="saved after step 4 of 7"):
        run(schedule(), feed=Stopped(), log=log, waits=failures)
    assert [entry[1] for entry in log if entry[0] == "save"][-2:] == [4, 4]


def told(log, kind):
    return [entry[2] for entry in log if entry[:2] == ("event", kind)]


def stepped(log):
    return [entry[1:] for entry in log if entry[0] == "step"]


def test_single_bad_steps_are_noted_and_their_batches_spent():
    state, log = run(schedule(), bad={1, 4})
    skipped = [(one["step"], one["first_row"], one["end_row"]) for one in told(log, "skipped")]
    assert skipped == [(2, *span_of(1)), (5, *span_of(4))]
    assert learned_by(state) == (0, 2, 3, 5, 6)
    assert stepped(log) == [(number, number - 1) for number in range(1, 8)]


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_transient_fault_costs_nothing(overlaps):
    """Two batches go wrong once; run again they are fine, and the run is the undisturbed one."""
    policy = GuardPolicy(max_consecutive=2)
    state, log = run(schedule(), bad={2: 1, 3: 1}, overlaps=overlaps, policy=policy)
    assert learned_by(state) == tuple(range(7)) and np.asarray(state.skipped).tolist() == [0, 0]
    (rerun,) = told(log, "rerun")
    assert rerun == {"step": 3, **span_of(2)._asdict(), "verdict": "transient"}
    assert not told(log, "rollback")
    assert stepped(log) == [(1, 0), (2, 1), (3, 2), (4, 3), (3, 2), (4, 3), (5, 4), (6, 5), (7, 6)]
    again = log[log.index(("rewind", 2)) :]
    assert [entry[1] for entry in again if entry[0] == "metrics"] == [4, 6, 7]
    assert {one[2]["optim/lr"] for one in again if one[:2] == ("metrics", 7)} == {0.5**6}


@pytest.mark.parametrize("overlaps", [True, False])
def test_batches_that_go_wrong_again_are_left_out(overlaps, tmp_path):
    policy = GuardPolicy(max_consecutive=2)
    options = {"overlaps": overlaps, "policy": policy, "folder": tmp_path}
    state, log = run(schedule(steps=9), bad={5, 6}, **options)
    assert learned_by(state) == (0, 1, 2, 3, 4, 7, 8, 9, 10) and int(state.step) == 9
    (rerun,), (back,) = told(log, "rerun"), told(log, "rollback")
    assert rerun == {"step": 6, **span_of(5)._asdict(), "verdict": "reproducible"}
    expected = {"step": 7, "to": 4, **span_of(5, 7)._asdict(), "blamed": "batches"}
    assert back.items() >= (expected | {"count": 1}).items()
    assert stepped(log)[-5:] == [(5, 4), (6, 7), (7, 8), (8, 9), (9, 10)]
    # What an earlier attempt left out stays left out, wherever the run begins.
    later, log = run(schedule(steps=9), bad={5, 6}, first=5, **options)
    assert stepped(log) == [(6, 7), (7, 8), (8, 9), (9, 10)] and learned_by(later) == (7, 8, 9, 10)
    _, log = run(schedule(steps=5), first=3, **options)
    assert stepped(log) == [(4, 3), (5, 4)]


def test_parameters_that_went_wrong_lose_the_batches_since_the_checkpoint(tmp_path):
    """Batch 4 spoils them: from then on nothing is finite, not even what has been before."""
    options = {"policy": GuardPolicy(max_consecutive=2), "folder": tmp_path}
    state, log = run(schedule(steps=9), bad=lambda index, learned: 4 in learned, **options)
    (back,) = told(log, "rollback")
    expected = {"step": 7, "to": 4, **span_of(4, 7)._asdict(), "blamed": "parameters"}
    assert back.items() >= expected.items()
    assert learned_by(state) == (0, 1, 2, 3, 7, 8, 9, 10, 11)


def test_after_the_last_rollback_the_run_stops_with_the_batch_saved(tmp_path):
    policy = GuardPolicy(max_consecutive=2, max_rollbacks=1)
    with pytest.raises(DivergedError) as error:
        run(schedule(steps=30), bad=range(5, 99), policy=policy, folder=tmp_path)
    assert error.value.exit_code == 7
    path = tmp_path / "crash" / "rows_00000014.npz"
    for words in (
        "step 6 (rows 14 to 15)",
        "steps 6 to 7",
        "max_rollbacks = 1",
        str(path),
        "float32",
    ):
        assert words in str(error.value)
    with np.load(path, allow_pickle=False) as saved:
        assert (saved["step"], saved["first_row"], saved["end_row"]) == (6, 14, 16)
        np.testing.assert_array_equal(saved["tokens"], batch_of(7).tokens)
        leaves = {name for name, leaf in vars(batch_of(0)).items() if leaf is not None}
        assert set(saved) == {"step", *Span._fields, *leaves}


def test_the_list_of_rollbacks_is_read_whole_and_written_whole_or_the_run_stops(tmp_path):
    for unit in ("row", "batch"):
        (tmp_path / "rollbacks.json").write_text(f'[{{"first_{unit}": 3}}]')
        with pytest.raises(DamagedError, match=f"rollbacks.json.*end_{unit}"):
            Guard(tmp_path, GuardPolicy())
    (tmp_path / "rollbacks.json").unlink()
    (tmp_path / "rollbacks.json.tmp").mkdir()  # in the way of what is written
    with pytest.raises(StorageError, match="rollbacks.json: cannot be written"):
        run(schedule(), bad={3}, policy=GuardPolicy(max_consecutive=1), folder=tmp_path)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([(3, 5)], [(3, 5)]),
        ([(7, 9), (3, 5)], [(3, 5), (7, 9)]),
        ([(3, 5), (5, 6), (4, 5)], [(3, 6)]),
        ([(4, 6), (2, 9)], [(2, 9)]),
    ],
)
def test_ranges_that_are_left_out_are_joined(windows, expected, tmp_path):
    rollbacks = [{"first_row": first, "end_row": end} for first, end in windows]
    (tmp_path / "rollbacks.json").write_text(json.dumps(rollbacks))
    assert Guard(tmp_path, GuardPolicy()).left_out == expected


def test_a_list_of_rollbacks_that_counts_batches_is_read_and_written_by_rows(tmp_path):
    file = tmp_path / "rollbacks.json"
    file.write_text(
        '[{"step": 9, "first_batch": 3, "end_batch": 5}, {"first_row": 9, "end_row": 10}]'
    )
    assert Guard(tmp_path, GuardPolicy(), lambda: 8).left_out == [(9, 10), (24, 40)]
    counted = [{"step": 9, "first_row": 24, "end_row": 40}, {"first_row": 9, "end_row": 10}]
    assert json.loads(file.read_text()) == counted
    assert Guard(tmp_path, GuardPolicy()).left_out == [(9, 10), (24, 40)]


class Rollouts(Given):
    """A feed that writes the rows of two steps at once, with what the student has learned by then.

    Numbers of batches count what was drawn, so that a state that differs gives other batches.
    """

    def __init__(self):
        self.drawn = {}  # kept, so that a step in the middle can be asked for again

    def next(self, row, state):
        number, half = divmod(row // ROWS, 2)
        if not half:
            self.drawn[number] = 100 * len(learned_by(state)) + sum(learned_by(state)) % 7
        return span_of(2 * number + half), batch_of(self.drawn[number] + half)


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_feed_may_depend_on_the_state_and_going_back_asks_it_again(overlaps):
    whole, _ = run(schedule(steps=9), feed=Rollouts(), overlaps=overlaps)
    learned = learned_by(whole)
    assert learned[:4] == (0, 1, 201, 202) and len(set(learned)) == 9
    # Two steps go wrong once: the second half of a rollout, and a rollout drawn without it.
    calls = itertools.count(1)
    bad = lambda index, learned: next(calls) in (4, 5)
    policy = GuardPolicy(max_consecutive=2)
    again, log = run(schedule(steps=9), bad, feed=Rollouts(), overlaps=overlaps, policy=policy)
    assert len(told(log, "rerun")) == 1 and learned_by(again) == learned


class Hearing(Given):
    """A feed whose memory is what it heard of evaluations, kept in both places of a checkpoint."""

    def __init__(self):
        self.heard, self.begun = [], []

    def begin(self, meta):
        self.begun.append(meta)
        self.heard = list(meta.get("heard", ()))

    def next(self, row, state):
        return span_of(row // ROWS), batch_of(row // ROWS)

    def evaluated(self, row, metrics):
        self.heard.append((row, metrics["eval/loss"]))

    def kept(self, row):
        return {"heard": list(self.heard)}

    def beside(self, row):
        return {"row": row}


def test_a_feed_hears_evaluations_and_gets_its_memory_back_with_the_state(tmp_path):
    """Evaluated after steps 3, 6 and 8, saved after 4; step 7 goes wrong twice: back to step 4."""
    feed = Hearing()
    policy = GuardPolicy(max_consecutive=1)
    run(schedule(steps=8), bad={6: 2}, feed=feed, policy=policy, folder=tmp_path)
    (meta,) = feed.begun
    assert meta["heard"] == [(3 * ROWS, 3.0)] and meta["row"] == meta[loop.ROW] == 4 * ROWS
    assert feed.heard == [(3 * ROWS, 3.0), (6 * ROWS, 6.0), (8 * ROWS, 8.0)]


def test_nothing_is_saved_in_a_row_of_bad_steps_but_right_after_it():
    _, log = run(
        schedule(steps=9, eval_every=None), bad={3, 4}, policy=GuardPolicy(max_consecutive=3)
    )
    assert [entry[1] for entry in log if entry[0] == "save"] == [1, 6, 8, 9]


def test_a_row_that_an_earlier_process_left_open_counts_on(tmp_path):
    """Only this process's part of it is run again: what is on disk stays behind."""
    options = {"first": 5, "skipped": (1, 1), "policy": GuardPolicy(max_consecutive=2)}
    state, log = run(schedule(steps=8), bad={5: 1}, folder=tmp_path, **options)
    assert stepped(log) == [(6, 5), (6, 5), (7, 6), (8, 7)]
    assert np.asarray(state.skipped).tolist() == [0, 1]
    _, log = run(schedule(steps=8), bad={5}, folder=tmp_path, **options)
    assert stepped(log) == [(6, 5), (6, 5), (6, 6), (7, 7), (8, 8)]


@pytest.mark.parametrize(("then", "events"), [("warn", 1), ("rollback", 1), ("ignore", 0)])
def test_a_loss_spike_is_told_and_its_batch_left_out_where_asked(then, events, tmp_path):
    state, log = run(
        schedule(steps=70, save_steps=10),
        loss=lambda number, index: 10 / number + 50 * (index == 64),
        policy=GuardPolicy(spike_then=then),
        folder=tmp_path,
    )
    spikes = told(log, "spike")
    assert [(one["step"], one["first_row"]) for one in spikes] == [(65, 64 * ROWS)] * events
    left_out = {64} if then == "rollback" else set()
    assert learned_by(state) == tuple(sorted({*range(70 + len(left_out))} - left_out))
    assert [(one["to"], one["blamed"]) for one in told(log, "rollback")] == (
        [(60, "batches")] if then == "rollback" else []
    )


def test_an_evaluation_that_is_not_finite_is_told():
    _, log = run(schedule(steps=3), evaluation=float("nan"))
    assert told(log, "evaluation") == [{"step": 3, "nonfinite": ["eval/loss"]}]
