"""Faults that a cluster brings, in numbers: killed runs, flipped bits, signals, full disks.

Every run is a process of its own on a tiny model. What it leaves is compared with a run of the same
configuration that nobody disturbed: the arrays of the last checkpoint and the records of
metrics.jsonl, times and rates apart, must be the same to the last bit.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.warm import ROOT, Command, Nursery
from jaxdistill.data import store
from jaxdistill.errors import DamagedError
from jaxdistill.safe import manifest
from jaxdistill.train import step_folders
from jaxdistill.train.hooks import POINTS

METHODS = {
    "kd": "{name: kd, alpha: 0.3, temperature: {schedule: linear, start: 1.0, end: 2.0}}",
    "taid": "{name: taid, mode: scaled, alpha: 0.2}",
    "ctkd": "{name: ctkd, alpha: 0.2, t_range: 4.0, temperature_lr: 0.05}",
    "ted": "{name: ted, alpha: 0.2, layers: [[0, 0]], filter_steps: 0.3, filter_lr: 1e-3}",
    "minilm": "{name: minilm, alpha: 0.2, student_layer: 0, teacher_layer: 1}",
    "hidden": "{name: hidden, alpha: 0.2, layers: [[0, 1]], feature_weight: 0.5, balance: true}",
    "akl": "{name: akl, alpha: 0.2}",
    "jsd": "{name: jsd, alpha: 0.2}",
    "sft": "{name: sft}",
    "on_policy": "{name: reverse_kd, alpha: 0.0}\n"
    "rollout: {share: 0.7, prompts_per_step: 4, samples: 2, max_new_tokens: 12, max_age: 1}",
    "replay": "{name: distillm, alpha: 0.0}\n"
    "rollout: {share: 0.8, prompts_per_step: 4, samples: 2, max_new_tokens: 12,\n"
    "  replay: {capacity: 24, schedule: constant, tolerance: 0.0}}",
    "grpo": "{name: grpo, teacher_weight: 0.5}\n"
    "rollout: {prompts_per_step: 4, samples: 2, max_new_tokens: 12}\n"
    "reward: {updates: 2, resample: 1, verifiers: [\n"
    "  {verifier: length, options: {limit: 12, ramp: 12}},\n"
    "  {verifier: format, options: {pattern: '.*[a-m].*'}, weight: 0.5}]}",
    "ema": "{name: kd, alpha: 0.0}\n"
    "rollout: {prompts_per_step: 4, samples: 2, max_new_tokens: 12}\n"
    'teacher: {self: {weights: ema, ema_decay: 0.9, context: "Answer: {solution}; {prompt}"}}\n'
    "student: {random: {layers: 1, embed: 32, mlp: 48, heads: 4, kv_heads: 2}, "
    "compute_dtype: float32}",
}
# Runs whose student writes, and where they are: generating, and around the step, in which the
# teacher scores and the student is updated.
WRITING = ("on_policy", "replay", "ema", "grpo")
WHILE_WRITING = tuple(p for p in POINTS if p.startswith(("rollout.", "step.")))
STEPS = 30
# Whether a run stops at once when it cannot save: the minutes that it may stay unsaved.
FULL_DISKS = {"stops": 0.0, "goes_on": 60.0}
MODELS = """teacher:
  random: {layers: 2, embed: 32, mlp: 48, heads: 4, kv_heads: 2}
  dtype: float32
student: {from: teacher, every: 2, compute_dtype: float32}
"""
CONFIG = """
version: 1
seed: 3
run: {{name: tiny, dir: {folder}}}
{models}tokenizer: {{from: bytes}}
data:
  train: [{train}]
  eval: [{{path: {data}/eval.txt, format: paragraphs}}]
  seq_len: 32
  cache_dir: {data}/cache
{prompts}method: {method}
optimizer: {{lr: 1e-2, warmup: 2, weight_decay: 0.0}}
train: {{steps: {steps}, batch_size: 8, eval_every: 10, log_every: 1}}
checkpoint: {{every: {{steps: 4}}, keep: {{latest: 2}}, max_unsaved_minutes: {unsaved}}}
logging: {{progress: none, tensorboard: true}}
eval: {{max_rows: 8, samples: 0, compare: false}}
"""
_WORDS = "the quick brown fox jumps over a lazy dog while nine wizards box".split()
_CACHE = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_HUB_OFFLINE": "1",
    "XLA_FLAGS": "",
}


class Rig:
    """Tiny runs in a folder, and the undisturbed run of each method.

    Args:
      folder: an empty one.
      cache: of compiled programs; by default one of the folder's own.
    """

    def __init__(self, folder: pathlib.Path, cache: str | os.PathLike | None = None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.txt").write_text(_sentences(0, 120))
        (folder / "eval.txt").write_text(_sentences(1000, 12))
        asked = [{"prompt": word, "solution": f"of {word}"} for word in _WORDS]
        prompts = [json.dumps(one) + "\n" for one in asked]
        (folder / "prompts.jsonl").write_text("".join(prompts))
        (folder / "jax").mkdir(mode=0o700, exist_ok=True)
        compiled = os.fspath(cache or folder / "jax")
        self.environment = {**_CACHE, "JAX_COMPILATION_CACHE_DIR": compiled}
        self.nursery = Nursery(environment=self.environment)
        self.log = folder / "log.txt"
        self._whole: dict[str, tuple[dict, list]] = {}
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_: object) -> None:
        self.nursery.close()

    def config(self, method: str, run: pathlib.Path, unsaved: float = 60.0) -> pathlib.Path:
        """A configuration file for a run in a folder that does not exist yet."""
        asked = f"  prompts: [{{path: {self.folder}/prompts.jsonl}}]\n"
        itself, given = "self:" in METHODS[method], f"path: {self.folder}/train.txt"
        alone = itself or "reward:" in METHODS[method]  # it writes all its text
        text = CONFIG.format(
            folder=run,
            models="" if itself else MODELS,
            train="" if alone else f"{{{given}, format: paragraphs}}",
            data=self.folder,
            method=METHODS[method],
            prompts=asked if "rollout:" in METHODS[method] else "",
            steps=STEPS,
            unsaved=unsaved,
        )
        path = run.with_suffix(".yaml")
        path.write_text(text)
        return path

    def command(self, method: str, run: pathlib.Path) -> list[str]:
        """What starts or resumes a run."""
        if (run / "RUN.json").exists():
            return ["resume", str(run)]
        return ["train", str(self.config(method, run))]

    def whole(self, method: str) -> tuple[dict, list]:
        """What the undisturbed run of a method left; it runs once, and is timed."""
        if method not in self._whole:
            run = self.folder / f"whole-{method}"
            began = time.perf_counter()
            code = self.nursery.run(self.command(method, run), self.log)
            self.seconds[method] = time.perf_counter() - began
            assert code == 0, f"{run}: ended with {code}: {self.log.read_text()[-2000:]}"
            self._whole[method] = result(run)
        return self._whole[method]


def _sentences(first: int, count: int) -> str:
    lines = (
        " ".join(_WORDS[(i * k + k) % len(_WORDS)] for k in range(1, 9)) + f" {i}."
        for i in range(first, first + count)
    )
    return "\n\n".join(lines)


def result(run: pathlib.Path) -> tuple[dict[str, np.ndarray], list[dict]]:
    """The arrays of the last checkpoint, and all records without what a clock decides."""
    from orbax.checkpoint import v1 as ocp

    directory = run / "checkpoints"
    last = max(step_folders.steps(directory))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = ocp.load_checkpointables(str(directory / str(last)), {"state": None})["state"]
    arrays = {name: np.asarray(leaf) for name, leaf in state.items()}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name in [n for n in record if n == "time" or n.startswith("perf/")]:
            del record[name]
    return arrays, records


def same(left: tuple[dict, list], right: tuple[dict, list]) -> bool:
    """Whether two runs left the same bits."""
    arrays, others = left[0], right[0]
    return (
        left[1] == right[1]
        and arrays.keys() == others.keys()
        and all(
            a.dtype == others[name].dtype and a.tobytes() == others[name].tobytes()
            for name, a in arrays.items()
        )
    )


def sound(run: pathlib.Path) -> bool:
    """Whether every checkpoint that a run folder shows is whole."""
    directory = run / "checkpoints"
    try:
        for step in step_folders.steps(directory):
            manifest.verify(directory / str(step))
    except DamagedError as error:
        print(f"unsound: {error}", file=sys.stderr)
        return False
    return True


def kills(
    rig: Rig,
    count: int,
    seed: int = 0,
    report: Callable[[dict], Any] = print,
    per_run: int = 8,
    *,
    methods: Sequence[str] = tuple(METHODS),
    points: Sequence[str] = POINTS,
) -> dict[str, Any]:
    """Kills runs with SIGKILL, half of them at named points, and compares what they end as.

    Args:
      rig: where.
      count: how many kills at least.
      seed: of the choice of points and moments.
      report: called with the counts so far, after every run.
      per_run: kills of one run before it may finish.
      methods: of `METHODS`, in turn.
      points: of `hooks.POINTS`, at which the other half are killed.
    """
    draw = random.Random(seed)
    at, of = Counter(), Counter()
    runs = equal = unsound = 0
    growth: list[int] = []
    began = time.perf_counter()
    while sum(at.values()) < count:
        method = methods[runs // 3 % len(methods)]  # each costs an undisturbed run first
        whole = rig.whole(method)
        run = rig.folder / f"killed-{seed}-{runs}"
        for _ in range(per_run):
            before = _newest(run)
            where = _kill_once(rig, method, run, draw, points)
            if where is None:
                break
            at[where] += 1
            of[method] += 1
            unsound += not sound(run)
            growth.append(_newest(run) - before)
        code = rig.nursery.run(rig.command(method, run), rig.log)
        runs += 1
        if code == 0 and same(result(run), whole):
            equal += 1
            shutil.rmtree(run)
        else:
            print(f"{run}: ended with {code}, not as undisturbed", file=sys.stderr)
        counts = {
            "kills": sum(at.values()),
            "runs": runs,
            "bitwise_equal_runs": equal,
            "unreadable_run_folders": unsound,
            "kills_at": dict(at.most_common()),
            "kills_of": dict(of),
            "kills_that_left_progress": sum(step > 0 for step in growth),
            "undisturbed_seconds": {name: round(s, 2) for name, s in rig.seconds.items()},
            "seconds": round(time.perf_counter() - began, 1),
        }
        report(counts)
    return counts


def _newest(run: pathlib.Path) -> int:
    return max(step_folders.steps(run / "checkpoints"), default=0)


def _kill_once(
    rig: Rig, method: str, run: pathlib.Path, draw: random.Random, points: Sequence[str]
) -> str | None:
    """One life of a run that ends by SIGKILL: where; None if it came to its end before."""
    if draw.random() < 0.5:
        point = draw.choice(points)
        fault = f"{point}:{draw.randint(1, 6)}:kill"
        code = rig.nursery.run(rig.command(method, run), rig.log, fault)
    else:
        point = "any moment"
        command = _live(rig, method, run, draw)
        command.kill()
        code = command.wait()
    if code == 0:
        return None
    assert code == -signal.SIGKILL, f"{run}: ended with {code}: {rig.log.read_text()[-2000:]}"
    return point


def _held(run: pathlib.Path) -> bool:
    """Whether a process has its name in the lock of a run."""
    try:
        return (run / "RUN.json").exists() and bool((run / "LOCK").read_text())
    except OSError:
        return False


def _live(rig: Rig, method: str, run: pathlib.Path, draw: random.Random) -> Command:
    """One life of a run up to any moment of it; one that ends before says how long a life is."""
    began = time.monotonic()
    command = rig.nursery.start(rig.command(method, run), rig.log)
    deadline = began + draw.uniform(0.0, rig.seconds[method])
    while time.monotonic() < deadline:
        if not command.running():
            rig.seconds[method] = time.monotonic() - began
            break
        time.sleep(0.002)
    return command


def stops(
    rig: Rig,
    count: int,
    seed: int = 0,
    report: Callable[[dict], Any] = print,
    again: Sequence[int] = (),
) -> dict[str, Any]:
    """Asks runs to stop, by SIGTERM at any moment, and compares what they end as.

    Args:
      rig: where.
      count: how many signals.
      seed: of the choice of moments.
      report: called with the counts so far, after every run.
      again: signals that follow each within a fifth of a second, as one stop often comes.
    """
    draw = random.Random(seed)
    clean = asked = runs = equal = unsound = 0
    seconds: list[float] = []
    while asked < count and runs < 3 * count + 10:  # most end before the signal on a fast machine
        method = list(METHODS)[runs // 3 % len(METHODS)]
        whole = rig.whole(method)
        run = rig.folder / f"stopped-{len(again)}-{seed}-{runs}"
        while asked < count:
            command = _live(rig, method, run, draw)
            # Before it holds its run, and after, a signal does what it does to any process.
            while command.running() and not _held(run):
                time.sleep(0.002)
            if not command.running():
                break
            began = time.perf_counter()
            command.kill(signal.SIGTERM)
            for number in again:
                time.sleep(draw.uniform(0, 0.2))
                command.kill(number)
            code = command.wait()
            if code == 0:  # its last step was already done
                break
            asked += 1
            seconds.append(time.perf_counter() - began)
            clean += code == 75
            if code != 75:
                print(f"{run}: ended with {code} after SIGTERM", file=sys.stderr)
            unsound += not sound(run)
        code = rig.nursery.run(rig.command(method, run), rig.log)
        runs += 1
        equal += code == 0 and same(result(run), whole)
        counts = {
            "signals": asked,
            "exits_75": clean,
            "runs": runs,
            "bitwise_equal_runs": equal,
            "unreadable_run_folders": unsound,
            "seconds_to_exit": {
                "median": round(statistics.median(seconds), 3) if seconds else None,
                "most": round(max(seconds), 3) if seconds else None,
            },
        }
        report(counts)
    return counts


def flips(rig: Rig, count: int, seed: int = 0) -> dict[str, Any]:
    """Flips single bits in files of a checkpoint and of the tokenised data, one at a time."""
    rig.whole("kd")
    run = rig.folder / "whole-kd"
    checkpoint = run / "checkpoints" / str(_newest(run))
    (cached,) = (rig.folder / "cache").glob("train-*")
    shard = cached.parent / manifest.read(cached)["shards"][0]

    def refused(folder: pathlib.Path) -> bool:
        try:
            manifest.verify(folder)
        except DamagedError:
            return True
        return False

    return {
        "checkpoint": _flip(checkpoint, count, seed, refused),
        "data": _flip(cached, count, seed, lambda folder: store.problem(folder) is not None),
        "tokens": _flip(shard, count, seed, lambda folder: store.problem(folder) is not None),
    }


def _flip(
    folder: pathlib.Path, count: int, seed: int, detected: Callable[[pathlib.Path], bool]
) -> dict[str, Any]:
    draw = random.Random(seed)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    assert not detected(folder), "sound before anything was flipped"
    detections = 0
    for _ in range(count):
        path = draw.choice(files)  # small files as often as large ones
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        detections += detected(folder)
        path.write_bytes(whole)
    assert not detected(folder), "sound again"
    return {"flips": count, "detected": detections, "files": len(files)}


def fallbacks(rig: Rig, count: int, seed: int = 0) -> dict[str, Any]:
    """Damages the newest checkpoint of a broken-off run, which must go on from the one before."""
    draw = random.Random(seed)
    whole = rig.whole("kd")
    equal = aside = 0
    for number in range(count):
        run = rig.folder / f"damaged-{seed}-{number}"
        code = rig.nursery.run(rig.command("kd", run), rig.log, "step.before:22:kill")
        assert code == -signal.SIGKILL
        newest = run / "checkpoints" / str(_newest(run))
        path = draw.choice([p for p in newest.rglob("*") if p.is_file() and p.stat().st_size])
        damaged = bytearray(path.read_bytes())
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        code = rig.nursery.run(rig.command("kd", run), rig.log)
        equal += code == 0 and same(result(run), whole)
        bad = list((run / "checkpoints" / step_folders.BAD).iterdir())
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        reported = [event["step"] for event in events if event["kind"] == "damaged"]
        aside += len(bad) == 1 and reported == [int(newest.name)]
    return {"damaged": count, "bitwise_equal_runs": equal, "put_aside_and_told": aside}


def full_disks(rig: Rig, unsaved_minutes: Mapping[str, float] = FULL_DISKS) -> dict[str, Any]:
    """Fills the disk under a run, on a small file system of its own; needs root."""
    whole = rig.whole("kd")
    outcome = {}
    for name, unsaved in unsaved_minutes.items():
        with small_disk(rig.folder / f"disk-{name}", "4m") as disk:
            run = disk / "run"
            config = rig.config("kd", rig.folder / f"run-{name}", unsaved)
            text = config.read_text().replace(str(rig.folder / f"run-{name}"), str(run))
            config.write_text(text)
            command = rig.nursery.start(
                ["train", str(config)], rig.log, "checkpoint.committed:2:wait"
            )
            while command.running() and _newest(run) < 4:
                time.sleep(0.002)
            filler = disk / "filler"
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, check=False
            )
            code = command.wait()
            newest, whole_folder = _newest(run), sound(run)
            filler.unlink()
            again = rig.nursery.run(["resume", str(run)], rig.log)
            outcome[name] = {
                "exit_code": code,
                "newest_checkpoint": newest,
                "sound": whole_folder,
                "resumed_exit_code": again,
                "arrays_equal": same((result(run)[0], []), (whole[0], [])),
            }
    return outcome


class small_disk:  # noqa: N801  used as a function
    """A file system in memory of a few MB, mounted while inside."""

    def __init__(self, place: pathlib.Path, size: str):
        self.place, self.size = place, size

    def __enter__(self) -> pathlib.Path:
        self.place.mkdir(parents=True)
        options = ["-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.place)]
        subprocess.run(["mount", *options], check=True, capture_output=True)
        return self.place

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.place)], check=True)


def cold_kills(rig: Rig, count: int, seed: int = 0) -> dict[str, Any]:
    """Kills whole processes, interpreter start and imports included, at any moment."""
    draw = random.Random(seed)
    whole = rig.whole("kd")
    run = rig.folder / f"cold-{seed}"
    killed = 0

    def life() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "jaxdistill", *rig.command("kd", run)],
            cwd=ROOT,
            env={**os.environ, **rig.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    began = time.perf_counter()
    first = life()
    first.wait()
    seconds = time.perf_counter() - began
    shutil.rmtree(run)
    while killed < count:
        process = life()
        try:
            code = process.wait(timeout=draw.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        killed += code == -signal.SIGKILL
        if code == 0:  # it came to its end before: another one
            shutil.rmtree(run)
    code = rig.nursery.run(rig.command("kd", run), rig.log)
    return {"kills": killed, "bitwise_equal": code == 0 and same(result(run), whole)}


def digest_cost(folder: pathlib.Path, megabytes: int, repeats: int = 5) -> dict[str, Any]:
    """What checksums add to the background of a save, and what of it the training waits for."""
    import jax

    from jaxdistill.train.checkpoint import Checkpoints

    draw = np.random.default_rng(0)
    parts = max(1, megabytes // 16)
    state = {
        f"w{i}": jax.device_put(draw.normal(size=2**22).astype(np.float32)) for i in range(parts)
    }
    jax.block_until_ready(state)
    shares, works, waits, saves = [], [], [], []
    with Checkpoints(folder / "checkpoints", keep_latest=1) as checkpoints:
        for step in range(1, repeats + 2):
            began = time.perf_counter(), time.process_time()
            waited = checkpoints.save(step, state, {})
            checkpoints.wait()
            seconds = time.perf_counter() - began[0]
            work = time.process_time() - began[1]
            began = time.perf_counter(), time.process_time()
            manifest.verify(folder / "checkpoints" / str(step))  # reads and sums as a save does
            if step > 1:  # the first warms up
                shares.append((time.perf_counter() - began[0]) / seconds)
                works.append((time.process_time() - began[1]) / work)
                waits.append(waited)
                saves.append(seconds)
    return {
        "state_mb": 16 * parts,
        "save_seconds": round(statistics.median(saves), 3),
        "blocked_seconds": round(statistics.median(waits), 4),
        "digest_share_of_time": round(statistics.median(shares), 4),
        "digest_share_of_processor_time": round(statistics.median(works), 4),
    }
