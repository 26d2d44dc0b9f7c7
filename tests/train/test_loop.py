"""The loop: its order, what is recorded when, and which step a number belongs to."""

import contextlib
from unittest import mock

import jax.numpy as jnp
import pytest

from jaxdistill.errors import DivergedError, Preempted
from jaxdistill.report import MetricsWriter, Progress
from jaxdistill.train import loop
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.meter import Meter
from jaxdistill.train.saving import SaveSchedule
from jaxdistill.train.state import TrainState
from jaxdistill.train.stopping import Stop
from jaxdistill.types import Mean


def at(step):
    return TrainState(step=step, params=None, opt_state=None, key=None, skipped=None)


def run(schedule, bad=(), overlaps=True, first=0, stop_at=None):
    """Trains with stand-ins that note what is asked of them: (state, log)."""
    log, stop = [], Stop()
    in_a_row = 0

    def step(state, teacher, batch):
        nonlocal in_a_row
        number = state.step + 1
        in_a_row = in_a_row + 1 if number in bad else 0
        loss = float("nan") if number in bad else 10.0 - number
        values = {"loss/total": loss, "optim/grad_norm": 1.0}
        values |= {"guard/in_a_row": in_a_row, "guard/skipped": 0}
        log.append(("step", number, batch))
        stop.asked = "SIGTERM" if number == stop_at else stop.asked
        means = {name: Mean(jnp.float32(v), jnp.float32(1)) for name, v in values.items()}
        return at(number), means

    def write(number, scalars):
        kind = "eval" if any(name.startswith("eval/") for name in scalars) else "metrics"
        log.append((kind, number, dict(scalars)))

    writer = mock.Mock(spec=MetricsWriter)
    writer.write.side_effect = write
    writer.event.side_effect = lambda kind, **fields: log.append(("event", kind, fields))
    checkpoints = mock.Mock(spec=Checkpoints)
    checkpoints.save.side_effect = lambda n, state, meta, metrics: log.append(("save", n, metrics))
    meter = mock.Mock(spec=Meter, overlaps=overlaps)
    meter.waiting.side_effect = lambda what: contextlib.nullcontext()
    meter.read.side_effect = lambda steps: {"perf/steps_read": steps}
    parts = loop.Parts(
        step=step,
        teacher_params=None,
        batches=lambda start: ((i, f"batch {i}") for i in range(start, 100)),
        evaluate=lambda number, state: {"eval/loss": float(state.step)},
        learning_rate=lambda update: 0.5**update,
        epoch=lambda number: number / 10,
        meta=lambda number: {"data_step": number},
        checkpoints=checkpoints,
        writer=writer,
        progress=mock.Mock(spec=Progress),
        meter=meter,
        stop=stop,
    )
    return loop.train(at(first), parts, schedule), log


def schedule(**changes):
    save = SaveSchedule(changes.pop("save_steps", 4), None, max_unsaved_minutes=10.0)
    values = {"steps": 7, "log_every": 2, "eval_every": 3, "save": save, "max_bad_in_a_row": 2}
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
        assert "guard/in_a_row" not in numbers
    read = [recorded[number]["perf/steps_read"] for number in sorted(recorded)]
    assert read == [1, 1, 2, 2, 1]


def test_numbers_are_read_one_step_late_only_where_that_saves_time():
    for overlaps, after in ((True, ("step", 3)), (False, ("step", 2))):
        _, log = run(schedule(eval_every=None, save_steps=None), overlaps=overlaps)
        index = next(i for i, entry in enumerate(log) if entry[:2] == ("metrics", 2))
        assert log[index - 1][:2] == after


def test_a_checkpoint_carries_the_evaluation_of_its_step_and_no_other():
    _, log = run(schedule(eval_every=4))
    saved = {entry[1]: entry[2] for entry in log if entry[0] == "save"}
    assert saved == {1: None, 4: {"eval/loss": 4.0}, 7: {"eval/loss": 7.0}}
    _, log = run(schedule(eval_every=None))
    saved = {entry[1]: entry[2] for entry in log if entry[0] == "save"}
    assert saved == {1: None, 4: None, 7: {"eval/loss": 7.0}}


def test_a_resumed_loop_takes_the_batch_of_its_step():
    _, log = run(schedule(), first=5)
    assert [entry[1:] for entry in log if entry[0] == "step"] == [(6, "batch 5"), (7, "batch 6")]


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_saves_it():
    with pytest.raises(Preempted, match="SIGTERM: saved after step 5 of 7") as stopped:
        run(schedule(), stop_at=5)
    assert stopped.value.exit_code == 75
    state, log = run(schedule(), stop_at=7)  # the last step is done: there is nothing to stop
    assert state.step == 7 and log[-1][:2] == ("event", "save")


def test_bad_steps_are_noted_and_too_many_end_the_run_before_anything_is_saved():
    _, log = run(schedule(), bad={2, 5})
    events = [entry for entry in log if entry[0] == "event" and entry[1] == "skipped"]
    assert [(entry[2]["step"], entry[2]["batch"]) for entry in events] == [(2, 1), (5, 4)]
    with pytest.raises(DivergedError, match=r"step 4 \(batch 3\).*2 steps in a row") as error:
        run(schedule(), bad={3, 4})
    assert error.value.exit_code == 7
