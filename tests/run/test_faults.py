"""Real processes that are killed, stopped and starved: a little of what `make soak` does."""

import json
import subprocess

import jax
import pytest

from benchmarks import soak_faults
from jaxdistill.safe import manifest
from jaxdistill.train import step_folders


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    cache = jax.config.jax_compilation_cache_dir
    with soak_faults.Rig(tmp_path_factory.mktemp("rig"), cache) as rig:
        yield rig


def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(rig):
    found = soak_faults.kills(rig, 1, seed=22, per_run=1, report=lambda _: None)
    assert found["kills"] == 1
    assert found["bitwise_equal_runs"] == found["runs"]
    assert found["unreadable_run_folders"] == 0


@pytest.mark.variant
def test_a_run_killed_while_it_commits_goes_on_from_the_checkpoint_before(rig):
    run = rig.folder / "committing"
    assert rig.nursery.run(rig.command("kd", run), rig.log, "checkpoint.commit:2:kill") == -9
    assert step_folders.steps(run / "checkpoints") == [1]
    assert list((run / "checkpoints").glob(".saving-*")), "half-done, and no checkpoint"
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "lo')  # a torn last line, as a power cut leaves one
    assert rig.nursery.run(["resume", str(run)], rig.log) == 0
    assert soak_faults.same(soak_faults.result(run), rig.whole("kd"))
    assert not list((run / "checkpoints").glob(".saving-*"))
    attempts = json.loads((run / "RUN.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, 1]


def test_a_signal_in_a_step_saves_that_step_and_exits_75(rig):
    run = rig.folder / "asked"
    assert rig.nursery.run(rig.command("kd", run), rig.log, "step.before:6:term") == 75
    assert max(step_folders.steps(run / "checkpoints")) == 6
    record = json.loads((run / "RUN.json").read_text())
    assert record["status"] == "stopped"
    assert record["exit_reason"] == f"SIGTERM: saved after step 6 of {soak_faults.STEPS}"
    assert rig.nursery.run(["resume", str(run)], rig.log) == 0
    assert soak_faults.same(soak_faults.result(run), rig.whole("kd"))


@pytest.mark.variant
def test_flipped_bits_are_found_and_the_checkpoint_before_is_used(rig):
    found = soak_faults.flips(rig, 60)
    assert found["checkpoint"]["detected"] == found["data"]["detected"] == 60
    found = soak_faults.fallbacks(rig, 1)
    assert found == {"damaged": 1, "bitwise_equal_runs": 1, "put_aside_and_told": 1}


@pytest.mark.variant
def test_a_full_disk_ends_a_run_with_what_was_saved(rig):
    try:
        with soak_faults.small_disk(rig.folder / "probe", "1m"):
            pass
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small file system")
    found = soak_faults.full_disks(rig, {"stops": 0.0})
    for name, outcome in found.items():
        assert outcome["exit_code"] == 9, name
        assert outcome["sound"] and outcome["newest_checkpoint"] >= 1, name
        assert outcome["resumed_exit_code"] == 0 and outcome["arrays_equal"], name
    assert "could not be written" in rig.log.read_text()


def test_metrics_that_cannot_be_written_are_dropped_and_training_goes_on(rig):
    run = rig.folder / "dropping"
    assert rig.nursery.run(rig.command("kd", run), rig.log, "metrics.append:9:full") == 0
    arrays, records = soak_faults.result(run)
    whole = rig.whole("kd")
    assert soak_faults.same((arrays, []), (whole[0], []))
    assert len(whole[1]) - len(records) in (0, 1)  # the ninth line was a record, or TensorBoard's
    manifest.verify(run / "checkpoints" / str(soak_faults.STEPS))
