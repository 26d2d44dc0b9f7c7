"""Runs of several real processes: the same numbers as one, and no process left when one is lost."""

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxdistill import api
from jaxdistill import config as configs
from jaxdistill.cli import launch
from jaxdistill.report import read_metrics
from tests.run.conftest import take_devices
from tests.run.test_routing import written
from tests.run.test_session import losses

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

STEPS = 20
RUN = (
    f"train={{steps: {STEPS}, batch_size: 8, eval_every: {STEPS}, log_every: 1}}",
    "checkpoint.every.steps=10",
    "checkpoint.keep.latest=9",
    "eval.samples=1",
    "mesh={data: -1, fsdp: 2}",
)
GONE_SECONDS = 30
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def write_config(load_config):
    """(folder, overrides) -> a configuration file in the folder, for a run in it."""

    def write(folder: pathlib.Path, *overrides: str) -> str:
        path = folder / "config.yaml"
        path.write_text(configs.dump(load_config(folder, *RUN, *overrides)))
        return str(path)

    return write


def environment(**more: str) -> dict[str, str]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return os.environ | cache | more


@contextlib.contextmanager
def launched(folder: pathlib.Path, *words: str, fault: str = "", **variables: str):
    """A running `jaxdistill launch`; what it says goes to launch.txt, and it never outlives us."""
    program = ("tests.inject", fault) if fault else ("jaxdistill",)
    command = [sys.executable, "-m", *program, "launch", *words]
    with open(folder / "launch.txt", "a") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,  # where `tests` can be imported from
            env=environment(**variables),
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def told(folder: pathlib.Path) -> str:
    return (folder / "launch.txt").read_text()


def ended(process: subprocess.Popen, folder: pathlib.Path, code: int, limit: float = 900) -> None:
    """The launcher ends with this code, and no process of it is left."""
    ranks = children(process.pid)
    assert process.wait(limit) == code, told(folder)
    assert not alive(ranks)


def alive(ranks: dict[int, int]) -> list[int]:
    """Those of the processes that are still there."""
    return [pid for pid in ranks.values() if pathlib.Path(f"/proc/{pid}").exists()]


def children(launcher: int) -> dict[int, int]:
    """Rank -> process id, of those that live."""
    found = {}
    for pid in pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with contextlib.suppress(OSError):  # it ends while we look
            variables = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            found |= {int(v.split("=")[1]): int(pid) for v in variables if "JAX_PROCESS_ID=" in v}
    return found


def reaches(run: pathlib.Path, step: int, process: subprocess.Popen, folder: pathlib.Path) -> None:
    """Waits until the run has written down a step."""
    while not (run / "metrics.jsonl").exists() or step not in losses(run):
        assert process.poll() is None, told(folder)
        time.sleep(0.02)


def arrays(run: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by name, read by Orbax alone, whoever wrote it."""
    folder = str(run / "checkpoints" / str(step))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for name, leaf in ocp.checkpointables_metadata(folder).metadata["state"].items()
    }
    tree = ocp.load_checkpointables(folder, {"state": wanted})["state"]
    return {name: np.asarray(value) for name, value in tree.items()}


@pytest.fixture(scope="module")
def pair(write_config, tmp_path_factory):
    """A run of two processes with four devices each: its folder."""
    folder = tmp_path_factory.mktemp("pair")
    words = ("--devices-per-process", "4", "--log-dir", str(folder / "logs"), "--", "train")
    with launched(folder, "-n", "2", *words, write_config(folder)) as process:
        ended(process, folder, 0)
    return folder / "run"


def run_here(monkeypatch, devices: int, call) -> api.RunResult:
    """A run in this process on its first devices."""
    with monkeypatch.context() as patch:
        take_devices(patch, devices)
        return call()


@pytest.fixture(scope="module")
def alone(load_config, tmp_path_factory):
    """devices -> the folder of the same run in this process alone, made when first asked for."""

    @functools.cache
    def run(devices: int) -> pathlib.Path:
        folder = tmp_path_factory.mktemp(f"alone{devices}")
        mesh = () if devices > 1 else ("mesh.fsdp=1",)
        with pytest.MonkeyPatch.context() as patch:
            config = load_config(folder, *RUN, *mesh)
            return run_here(patch, devices, lambda: api.train(config)).run_dir

    return run


def assert_same_curve(one: pathlib.Path, other: pathlib.Path) -> None:
    """Every number of every step that the mesh must not change, to 1e-5."""
    records = [read_metrics(folder) for folder in (one, other)]
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]]
    for left, right in zip(*records, strict=True):
        names = [n for n in left if not n.startswith("perf/") and n != "time"]
        assert len(names) > 5
        for name in names:
            assert left[name] == pytest.approx(right[name], rel=1e-5, abs=1e-7), (
                left["step"],
                name,
            )


def assert_same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_stopped_process_ends_the_group_and_one_process_goes_on(
    pair, alone, write_config, tmp_path, monkeypatch
):
    """The first of the file: what others compare with is made while the group waits for its end."""
    words = ("-n", "2", "--devices-per-process", "4", "--", "train", write_config(tmp_path))
    with launched(tmp_path, *words, fault="step.before:13:wait") as process:
        reaches(tmp_path / "run", 12, process, tmp_path)
        ranks, stopped = children(process.pid), time.monotonic()
        os.kill(ranks[1], signal.SIGSTOP)
        with concurrent.futures.ThreadPoolExecutor(1) as waiting:
            end = waiting.submit(lambda: (process.wait(900), time.monotonic() - stopped))
            for devices in (8, 4, 1):
                alone(devices)
        code, seconds = end.result()
        assert code == 128 + signal.SIGABRT and seconds < GONE_SECONDS, (seconds, told(tmp_path))
        assert not alive(ranks)
    before = arrays(tmp_path / "run", 10)
    assert_same_bits(before, arrays(pair, 10))
    resumed = run_here(monkeypatch, 8, lambda: api.resume(tmp_path / "run"))
    assert_same_curve(resumed.run_dir, pair)


@pytest.mark.parametrize("devices", [1, 8])
def test_two_processes_learn_as_one_does(devices, pair, alone):
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} devices")
    assert len(losses(pair)) == STEPS
    assert_same_curve(pair, alone(devices))
    tables = [
        json.loads((run / "table.json").read_text())["rows"] for run in (pair, alone(devices))
    ]
    for left, right in zip(*tables, strict=True):
        assert left["perplexity"] == pytest.approx(right["perplexity"], rel=1e-5)


def assert_same_first_gradients(one: pathlib.Path, other: pathlib.Path) -> None:
    """Adam's first moment after one step is 0.1 of the first gradient."""
    ours, theirs = arrays(one, 1), arrays(other, 1)
    moments = [name for name in ours if "/mu/" in name]
    assert len(moments) > 5
    for name in moments:
        size = np.abs(theirs[name]).max()
        assert size > 0
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6 * size)


def test_gradients_are_the_same_leaf_by_leaf(pair, alone):
    assert_same_first_gradients(pair, alone(8))


def test_one_process_writes_and_the_others_say_nothing(pair):
    steps = [record["step"] for record in read_metrics(pair) if "loss/total" in record]
    assert steps == list(range(1, STEPS + 1))
    record = json.loads((pair / "RUN.json").read_text())
    assert record["status"] == "done" and len(record["attempts"]) == 1
    logs = pair.parent / "logs"
    assert "perplexity" in (logs / "rank-0.log").read_text()
    others = (logs / "rank-1.log").read_text()
    assert "perplexity" not in others and "Traceback" not in others


def test_two_processes_write_what_one_does_and_resume_to_the_same_bits(
    write_config, load_config, tmp_path, monkeypatch
):
    """The student writes; two processes also resume from a save, and write steps 5 and 6 again."""
    asked = tmp_path / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"the fox {n}"}) + "\n" for n in range(20)))
    rollouts = (
        "train={steps: 6, eval_every: 6, log_every: 1}",
        "checkpoint.every.steps=2",
        "method={name: reverse_kd, alpha: 0.0}",
        f"data.prompts=[{{path: {asked}}}]",
        "rollout={prompts_per_step: 4, samples: 2, max_new_tokens: 6, max_age: 1, slots: 8}",
    )
    folders = {name: tmp_path / name for name in ("whole", "again", "alone")}
    for folder in folders.values():
        folder.mkdir()
    whole, again = (folders[name] / "run" for name in ("whole", "again"))
    words = ("-n", "2", "--devices-per-process", "4", "--")
    config = write_config(folders["whole"], *rollouts)
    with launched(folders["whole"], *words, "train", config) as process:
        ended(process, folders["whole"], 0)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "6")
    with launched(folders["again"], *words, "resume", str(again)) as process:
        ended(process, folders["again"], 0)
    attempts = json.loads((again / "RUN.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, 4]
    assert_same_bits(arrays(again, 6), arrays(whole, 6))
    config = load_config(folders["alone"], *RUN, *rollouts)
    alone = run_here(monkeypatch, 8, lambda: api.train(config)).run_dir
    records = [read_metrics(run) for run in (whole, again, alone)]
    for ours, again, theirs in zip(*records, strict=True):
        if "rollout/tokens" not in ours:
            continue
        assert ours["rollout/age"] in (0, 1) and ours["rollout/age"] == theirs["rollout/age"]
        assert ours["rollout/age"] or ours["rollout/sampler_difference_max"] < 1e-5
        for number in (n for n in ours if n != "time" and not n.startswith("perf/")):
            assert ours[number] == again[number], number
        assert ours["rollout/tokens"] == theirs["rollout/tokens"]
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)


def alike(options, write_config, load_config, tmp_path, *apart: str) -> list[dict]:
    """What two processes report, once one process has learned the same of the same options.

    Args:
      options: of both runs.
      write_config, load_config, tmp_path: fixtures.
      apart: options of the two processes alone, each of which then has four devices.
    """
    words = ("-n", "2", "--devices-per-process", "4" if apart else "1", "--", "train")
    for name in ("pair", "alone"):
        (tmp_path / name).mkdir()
    with launched(tmp_path, *words, write_config(tmp_path / "pair", *options, *apart)) as process:
        ended(process, tmp_path, 0)
    config = load_config(tmp_path / "alone", *RUN, *options, "mesh.fsdp=1")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, 1, lambda: api.train(config))
    runs = [tmp_path / name / "run" for name in ("pair", "alone")]
    assert_same_curve(*runs)
    assert_same_first_gradients(*runs)
    return [one for one in read_metrics(runs[0]) if "loss/total" in one]


def test_a_teacher_on_devices_of_its_own_teaches_two_processes(write_config, load_config, tmp_path):
    """Half of the rows in each, and half of its weights in each of its two devices there."""
    few = (
        "train={steps: 4, batch_size: 8, micro_batches: 2, eval_every: 4, log_every: 1}",
        "checkpoint.every.steps=1",
    )
    told = alike(few, write_config, load_config, tmp_path, "teacher.mesh={data: 2, tensor: 2}")
    assert len(told) == 4


@pytest.mark.variant
def test_two_teachers_teach_in_two_processes_as_in_one(write_config, load_config, tmp_path):
    """Each text is taught by its own one, in micro-batches of one teacher each."""
    shape = "random: {layers: %d, embed: 32, mlp: 48, heads: 4, kv_heads: 2}, dtype: float32"
    named = lambda number: {"teacher": "math" if number % 3 else "code"}
    for name, first, count in (("train", 0, 60), ("eval", 1000, 9)):
        written(tmp_path / f"{name}.jsonl", first, count, named)
    several = (
        "train={steps: 4, batch_size: 8, micro_batches: 2, eval_every: 4, log_every: 1}",
        "checkpoint.every.steps=4",
        "teacher=null",
        f"teachers={{math: {{{shape % 1}}}, code: {{{shape % 2}}}}}",
        "student={random: {layers: 1, embed: 32, mlp: 48, heads: 4}, compute_dtype: float32}",
        "method={name: kd, alpha: 0.0}",
        f"data.train=[{{path: {tmp_path}/train.jsonl}}]",
        f"data.eval=[{{path: {tmp_path}/eval.jsonl}}]",
    )
    told = alike(several, write_config, load_config, tmp_path)
    assert len(told) == 4
    for name in ("math", "code"):  # both teach, and two programs of other sizes differ
        assert sum(one[f"teachers/{name}/tokens"] for one in told) > 0
    assert told[0]["teachers/math/kl_t1"] != told[0]["teachers/code/kl_t1"]


@pytest.mark.variant
def test_two_processes_learn_from_themselves_what_one_does(write_config, load_config, tmp_path):
    """Given answers, behind a prompt that holds the solution, by the average of the weights."""
    for name, first, count in (("train", 0, 60), ("eval", 1000, 9)):
        records = [
            {"prompt": f"{n}: ", "completion": f"is {n * n}.", "solution": f"{n} by {n}"}
            for n in range(first, first + count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    itself = (
        "train={steps: 4, batch_size: 8, micro_batches: 2, eval_every: 4, log_every: 1}",
        "checkpoint.every.steps=4",
        "teacher={self: {weights: ema, ema_decay: 0.5, context: 'Know {solution}: {prompt}'}}",
        # Weights so large that what stands before an answer matters, and gradients are no noise.
        "student={random: {layers: 1, embed: 32, mlp: 48, heads: 4, initializer_range: 0.3}, "
        "compute_dtype: float32}",
        "data.loss_on=completion",
        "method={name: kd, alpha: 0.0}",
        f"data.train=[{{path: {tmp_path}/train.jsonl}}]",
        f"data.eval=[{{path: {tmp_path}/eval.jsonl}}]",
    )
    told = alike(itself, write_config, load_config, tmp_path)
    assert len(told) == 4 and all(one["loss/divergence"] > 0 for one in told)


def test_a_signal_stops_all_at_one_step_and_others_go_on(
    pair, alone, write_config, load_config, tmp_path, monkeypatch
):
    """Four devices of one process, then two processes of two devices, then one of eight."""
    run = tmp_path / "run"
    shutil.copytree(alone(4), run)
    for step in (11, 20):
        shutil.rmtree(run / "checkpoints" / str(step), ignore_errors=True)
    words = ("-n", "2", "--devices-per-process", "2", "--", "resume", str(run))
    with launched(tmp_path, *words, fault="step.before:4:wait") as process:
        while losses(run).keys() != set(range(1, 14)):
            assert process.poll() is None, told(tmp_path)
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        ended(process, tmp_path, 75)
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    [stopped] = [event for event in events if event["kind"] == "stopped"]
    assert (run / "checkpoints" / str(stopped["step"])).is_dir() and stopped["step"] < STEPS
    resumed = run_here(monkeypatch, 8, lambda: api.resume(run))
    assert_same_curve(resumed.run_dir, pair)


def test_processes_that_were_started_otherwise_all_stop(write_config, tmp_path):
    config = write_config(tmp_path)
    port = launch._free_port()
    started = []
    for rank, more in ((0, []), (1, ["train.steps=21", "optimizer.lr=0.02"])):
        command = [sys.executable, "-m", "jaxdistill", "train", config, *more]
        variables = os.environ | launch._environment(rank, 2, 4, port)
        variables.pop("JAXDISTILL_LAUNCHER")
        started.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
    for process in started:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 2, said
        assert "train.steps: process 0 has 20, process 1 has 21" in said
        assert "optimizer.lr: process 0 has 0.01, process 1 has 0.02" in said
    assert not (tmp_path / "run").exists()
