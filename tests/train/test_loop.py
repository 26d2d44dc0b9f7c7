"""The loop: its order, what is recorded when, and which step a number belongs to."""

import contextlib
from unittest import mock

import jax.numpy as jnp
import pytest

from jaxdistill.errors import DivergedError
from jaxdistill.report import MetricsWriter, Progress
from jaxdistill.train import loop
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.meter import Meter
from jaxdistill.train.state import TrainState
from jaxdistill.types import Mean


def at(step):
    return TrainState(step=step, params=None, opt_state=None, key=None, skipped=None)


def run(schedule, bad=(), overlaps=True, first=0):
    """Trains with stand-ins that note what is asked of them: (state, log)."""
    log = []
    in_a_row = 0

    def step(state, teacher, batch):
        nonlocal in_a_row
        number = state.step + 1
        in_a_row = in_a_row + 1 if number in bad else 0
        loss = float("nan") if number in bad else 10.0 - number
        values = {"loss/total": loss, "optim/grad_norm": 1.0}
        values |= {"guard/in_a_row": in_a_row, "guard/skipped": 0}
        log.append(("step", number, batch))
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
    )
    return loop.train(at(first), parts, schedule), log


def schedule(**changes):
    values = {"steps": 7, "log_every": 2, "eval_every": 3, "save_steps": 4, "save_minutes": None}
    return loop.Schedule(**(values | {"max_bad_in_a_row": 2} | changes))


@pytest.mark.parametrize("overlaps", [True, False])
def test_everything_happens_at_its_step(overlaps):
    state, log = run(schedule(), overlaps=overlaps)
    assert state.step == 7
    steps = lambda kind: [entry[1] for entry in log if entry[0] == kind]
    assert steps("step") == [1, 2, 3, 4, 5, 6, 7]
    assert steps("metrics") == [1, 2, 4, 6, 7]
    assert steps("eval") == [3, 6, 7]
    assert steps("save") == [4, 7]
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
    assert saved == {4: {"eval/loss": 4.0}, 7: {"eval/loss": 7.0}}
    _, log = run(schedule(eval_every=None))
    saved = {entry[1]: entry[2] for entry in log if entry[0] == "save"}
    assert saved == {4: None, 7: {"eval/loss": 7.0}}


def test_a_resumed_loop_takes_the_batch_of_its_step():
    _, log = run(schedule(), first=5)
    assert [entry[1:] for entry in log if entry[0] == "step"] == [(6, "batch 5"), (7, "batch 6")]


def test_bad_steps_are_noted_and_too_many_end_the_run_before_anything_is_saved():
    _, log = run(schedule(), bad={2, 5})
    events = [entry for entry in log if entry[0] == "event" and entry[1] == "skipped"]
    assert [(entry[2]["step"], entry[2]["batch"]) for entry in events] == [(2, 1), (5, 4)]
    with pytest.raises(DivergedError, match=r"step 4 \(batch 3\).*2 steps in a row") as error:
        run(schedule(), bad={3, 4})
    assert error.value.exit_code == 7
