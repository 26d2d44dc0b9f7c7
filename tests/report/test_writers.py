import json
import logging
import math
import os
import resource
import struct

import numpy as np
import pytest

from jaxdistill.errors import ConfigError, DataError, StorageError
from jaxdistill.report.writers import MetricsWriter, SilentWriter, read_metrics


def writer(folder, **options):
    return MetricsWriter(folder, **{"tensorboard": False, "clock": lambda: 1.5, **options})


def steps(folder):
    return [record["step"] for record in read_metrics(folder)]


def board_events(folder):
    """All events of the TensorBoard files of a folder, read by the format's own definition."""
    from tensorboardX.proto import event_pb2

    events = []
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
        assert at == len(data)
    return events


@pytest.fixture
def full_disk():
    """A real refusal of the operating system to let files grow beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_record_is_one_line_with_step_time_and_scalars(tmp_path):
    with writer(tmp_path) as out:
        out.write(3, {"loss/total": np.float32(0.5), "guard/skipped": np.int64(2)})
        # Flushed at once: whoever looks now sees the record.
        assert (tmp_path / "metrics.jsonl").read_text() == (
            '{"step": 3, "time": 1.5, "loss/total": 0.5, "guard/skipped": 2}\n'
        )


def test_jax_scalars_are_numbers(tmp_path):
    import jax.numpy as jnp

    with writer(tmp_path) as out:
        out.write(1, {"loss/total": jnp.float32(0.25), "perf/mfu": jnp.bfloat16(0.5)})
    assert read_metrics(tmp_path)[0]["loss/total"] == 0.25
    assert read_metrics(tmp_path)[0]["perf/mfu"] == 0.5


def test_nonfinite_values_are_null_and_named(tmp_path):
    with writer(tmp_path) as out:
        out.write(1, {"loss/total": math.nan, "loss/ce": -math.inf, "agree/top1": 0.5})
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    record = json.loads(line, parse_constant=refuse)
    assert record["loss/total"] is None and record["loss/ce"] is None
    assert record["agree/top1"] == 0.5
    assert record["nonfinite"] == ["loss/total", "loss/ce"]


def test_what_is_no_number_is_refused_by_name(tmp_path):
    with writer(tmp_path) as out, pytest.raises(TypeError, match="loss/total must be one number"):
        out.write(1, {"loss/total": [1, 2]})


def test_resume_continues_without_gap_or_repeat(tmp_path):
    with writer(tmp_path) as out:
        for step in range(1, 11):
            out.write(step, {"loss/total": 1.0 / step})
        out.write(6, {"eval/loss": 1.0})  # out of order: goes by its step, not by its place
    whole = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with writer(tmp_path, resume_step=6) as out:
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join([*whole[:6], whole[10]])
        for step in range(7, 11):
            out.write(step, {"loss/total": 1.0 / step})
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_goes_back_continues_without_gap_or_repeat(tmp_path):
    with writer(tmp_path) as out:
        for step in range(1, 8):
            out.write(step, {"loss/total": 1.0 / step})
        out.event("rollback", step=7, to=4)
        out.rewind(4)
        assert steps(tmp_path) == [1, 2, 3, 4]
        for step in range(5, 9):
            out.write(step, {"loss/total": 2.0 / step})
    assert steps(tmp_path) == list(range(1, 9))
    losses = [record["loss/total"] * record["step"] for record in read_metrics(tmp_path)]
    assert losses == pytest.approx([1.0] * 4 + [2.0] * 4)
    assert (tmp_path / "events.jsonl").read_text().count("rollback") == 1


def test_resume_drops_a_torn_last_line(tmp_path):
    with writer(tmp_path) as out:
        for step in (1, 2):
            out.write(step, {"loss/total": 1.0})
        out.event("start")
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"step": 3, "ti')
    with writer(tmp_path, resume_step=2) as out:
        out.write(3, {"loss/total": 2.0})
        out.event("resume", step=2)
    assert steps(tmp_path) == [1, 2, 3]
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["start", "resume"]


def test_a_restart_from_nothing_keeps_nothing(tmp_path):
    with writer(tmp_path) as out:
        out.write(1, {"loss/total": 1.0})
    with writer(tmp_path, resume_step=0):
        assert steps(tmp_path) == []


def test_a_new_run_does_not_mix_with_another(tmp_path):
    with writer(tmp_path) as out:
        out.write(7, {"loss/total": 1.0})
    with pytest.raises(StorageError, match="holds 1 records of another run, the last of step 7"):
        writer(tmp_path)
    assert steps(tmp_path) == [7]


def test_read_metrics_of_a_run_that_is_writing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1}]
    # Whole by chance, yet without its line end: the writer ends every record.
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_read_metrics_names_a_damaged_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\x00\x00garbage\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2: not a JSON object"):
        read_metrics(tmp_path)
    with pytest.raises(ConfigError, match="no such run directory"):
        read_metrics(tmp_path / "absent")


def test_events_keep_their_fields_and_stay_json(tmp_path):
    with writer(tmp_path) as out:
        out.event("checkpoint", step=np.int64(5), seconds=math.inf, path=tmp_path, ok=True, n=[1.5])
    record = json.loads((tmp_path / "events.jsonl").read_text())
    assert record == {
        "time": 1.5,
        "kind": "checkpoint",
        "step": 5,
        "seconds": None,
        "path": str(tmp_path),
        "ok": True,
        "n": [1.5],
    }


def test_a_full_disk_costs_records_and_one_warning_but_no_run(tmp_path, full_disk):
    notices = []
    out = writer(tmp_path, notice=notices.append)
    out.write(1, {"loss/total": 1.0})
    room = (tmp_path / "metrics.jsonl").stat().st_size
    full_disk(room + 10)  # the next record fits by 10 bytes only: it is written in part
    for step in (2, 3, 4):
        out.write(step, {"loss/total": 1.0})
    assert out.dropped == 3
    assert len(notices) == 1 and "metrics.jsonl cannot be written" in notices[0]
    assert (tmp_path / "metrics.jsonl").stat().st_size == room, "the half line was taken back"
    full_disk(resource.RLIM_INFINITY)
    out.write(5, {"loss/total": 1.0})
    out.close()
    assert steps(tmp_path) == [1, 5]


def test_the_warning_is_logged_where_nobody_takes_it(tmp_path, full_disk, caplog):
    out = writer(tmp_path)
    full_disk(4)
    with caplog.at_level(logging.WARNING, "jaxdistill.report"):
        out.event("start")
        out.event("start")
    full_disk(resource.RLIM_INFINITY)
    out.close()
    assert len(caplog.records) == 1 and "events.jsonl" in caplog.text


def test_a_folder_that_cannot_be_opened_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be opened"):
        writer(tmp_path / "file" / "run")


def test_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    os.symlink(victim, run / "events.jsonl")
    with pytest.raises(StorageError):
        writer(run)
    assert victim.read_text() == "precious"


def test_tensorboard_gets_the_same_scalars(tmp_path):
    with writer(tmp_path, tensorboard=True) as out:
        out.write(1, {"loss/total": 0.5, "optim/lr": 0.25})
        # Written at once, not when a buffer is full.
        assert len(board_events(tmp_path / "tensorboard")) == 2
        out.write(2, {"loss/total": math.nan})
    events = [e for e in board_events(tmp_path / "tensorboard") if e.HasField("summary")]
    seen = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events]
    assert seen[0] == (1, {"loss/total": 0.5, "optim/lr": 0.25})
    assert seen[1][0] == 2 and math.isnan(seen[1][1]["loss/total"])
    assert events[0].wall_time == 1.5


def test_tensorboard_hides_what_a_resumed_run_computes_again(tmp_path):
    from tensorboardX.proto import event_pb2

    with writer(tmp_path, tensorboard=True) as out:
        out.write(9, {"loss/total": 1.0})
    with writer(tmp_path, tensorboard=True, resume_step=6) as out:
        out.write(7, {"loss/total": 1.0})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "attempts do not overwrite"
    starts = [e for e in board_events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in starts] == [(7, event_pb2.SessionLog.START)]


def test_a_full_disk_under_tensorboard_drops_whole_records(tmp_path, full_disk):
    notices = []
    out = writer(tmp_path, tensorboard=True, notice=notices.append)
    out.write(1, {"a/b": 1.0})
    board = next((tmp_path / "tensorboard").iterdir()).stat().st_size
    full_disk(board + 3)
    out.write(2, {"a/b": 2.0})
    full_disk(resource.RLIM_INFINITY)
    out.write(3, {"a/b": 3.0})
    out.close()
    assert [notice.split(" ")[0] for notice in notices].count("tensorboard") == 1
    events = board_events(tmp_path / "tensorboard")
    assert [event.step for event in events if event.HasField("summary")] == [1, 3]


def test_tensorboard_records_carry_the_checksums_of_the_format(tmp_path):
    """CRC-32C by its definition: reflected polynomial 0x82F63B78, then the mask of TFRecord."""

    def masked(data):
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        crc ^= 0xFFFFFFFF
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    with writer(tmp_path, tensorboard=True):
        pass
    data = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    assert struct.unpack_from("<I", data, 8) == (masked(data[:8]),)
    assert struct.unpack_from("<I", data, 12 + length) == (masked(data[12 : 12 + length]),)


def test_samples_are_written_for_people_and_for_the_report(tmp_path):
    row = {"prompt": "p ```` x", "teacher": "t\ud800", "student": "s"}
    with writer(tmp_path) as out:
        out.samples(500, [row])
    page = (tmp_path / "samples" / "step_000500.md").read_text()
    assert page.startswith("# Samples at step 500\n")
    assert "`````text\np ```` x\n`````" in page, "the fence is longer than any inside"
    record = json.loads((tmp_path / "samples" / "step_000500.jsonl").read_text())
    assert record == {"step": 500, **row}


def test_close_twice_and_sync(tmp_path):
    out = writer(tmp_path, tensorboard=True)
    out.write(1, {"a/b": 1.0})
    out.sync()
    out.close()
    out.close()


def test_the_silent_writer_leaves_out_nothing_that_a_writer_does():
    public = {name for name in vars(MetricsWriter) if not name.startswith("_")}
    assert public <= set(vars(SilentWriter))


def test_damaged_lines_are_put_aside_and_told(tmp_path):
    """A line that is no record, one of another step, and zeros of a power cut; and a torn end."""
    good = [f'{{"step": {step}, "loss/total": 1.0}}\n'.encode() for step in range(1, 6)]
    cut = good[1].replace(b"}", b"")
    jumped = good[2].replace(b'"step": 3', b'"step": 773')
    huge = b'{"step": 1' + b"0" * 400 + b"}\n"
    lines = [good[0], cut, jumped, b"\0" * 9 + b"\n", b"\xff\n", huge, good[3], good[4]]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 6')
    (tmp_path / "events.jsonl").write_bytes(b'{"kind": "a"}\nnothing\n{"kind": "b"}\n{"ki')
    told = []
    MetricsWriter(tmp_path, tensorboard=False, resume_step=4, notice=told.append).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good[0] + good[3]
    kept = (tmp_path / "metrics.damaged.jsonl").read_bytes()
    assert kept == b"".join(lines[1:6])
    assert (tmp_path / "events.damaged.jsonl").read_bytes() == b"nothing\n"
    assert "5 damaged line(s) (line 2, 3, 4, 5, 6)" in told[0] and len(told) == 2
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [one["kind"] for one in events] == ["a", "b", *["damaged_records"] * 2]
    assert events[2]["lines"] == [2, 3, 4, 5, 6]
    MetricsWriter(tmp_path, tensorboard=False, resume_step=4, notice=told.append).close()
    assert len(told) == 2 and (tmp_path / "metrics.damaged.jsonl").read_bytes() == kept


def test_later_records_are_computed_again_and_are_no_damage(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 7):
            writer.write(step, {"loss/total": 1.0})
    told = []
    MetricsWriter(tmp_path, tensorboard=False, resume_step=4, notice=told.append).close()
    assert not told and not (tmp_path / "metrics.damaged.jsonl").exists()
    assert [one["step"] for one in read_metrics(tmp_path)] == [1, 2, 3, 4]
