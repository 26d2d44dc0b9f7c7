"""Checkpoints: exact on any mesh, kept by policy, checked before use, and honest about failures."""

import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import sharding
from jaxdistill.errors import ConfigError, DamagedError, ModelError, StorageError
from jaxdistill.safe import manifest
from jaxdistill.train import step_folders
from jaxdistill.train.checkpoint import Checkpoints


def _mesh(devices):
    return sharding.make_mesh(fsdp=devices, devices=jax.devices()[:devices])


def _state(mesh, seed=0, rows=16):
    """A state like that of a run: sharded and whole arrays, several dtypes, optimizer state."""
    generator = np.random.default_rng(seed)
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), sharding.replicated(mesh)
    params = {
        "student": {
            "head": jax.device_put(generator.normal(size=(rows, 4)).astype(np.float32), split),
            "norm": {"scale": jax.device_put(jnp.full(3, 1.5, jnp.bfloat16), whole)},
        },
        "objective": {},
    }
    key = jax.random.key_data(jax.random.key(seed))
    return {
        "step": jax.device_put(jnp.int32(7), whole),
        "params": params,
        "opt_state": jax.device_put(optax.adam(1e-3).init(params["student"]), whole),
        "key": jax.device_put(key, whole),
    }


def _abstract(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def _assert_same(ours, wanted):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 1 and 2, made once; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    states = {step: _state(_mesh(8), seed=step) for step in (1, 2)}
    with Checkpoints(folder, keep_latest=2, keep_best=1, best_metric="eval/loss") as checkpoints:
        for step, state in states.items():
            meta = {"data_step": step, "config": "seed: 0\n"}
            metrics = {"eval/loss": float(step), "eval/ce": 2.0}
            checkpoints.save(step, state, meta, metrics, {"answers": {"of": [step]}})
    return folder, states


@pytest.fixture
def copy(saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path / "checkpoints")
    return tmp_path / "checkpoints", states


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_a_state_comes_back_bitwise_on_any_number_of_devices(saved, devices):
    folder, states = saved
    abstract = _abstract(_state(_mesh(devices)))
    with Checkpoints(folder) as checkpoints:
        state, meta = checkpoints.restore(checkpoints.latest(), abstract)
    _assert_same(state, states[2])
    assert meta == {"data_step": 2, "config": "seed: 0\n", "answers": {"of": [2]}}
    assert "answers" not in manifest.read(folder / "2")["meta"]
    assert json.loads((folder / "2" / "answers.json").read_text()) == {"of": [2]}
    placed = jax.tree.map(lambda leaf, want: leaf.sharding == want.sharding, state, abstract)
    assert all(jax.tree.leaves(placed))
    assert len(state["params"]["student"]["head"].sharding.device_set) == devices


def test_a_state_may_be_donated_right_after_the_save(tmp_path):
    state = _state(_mesh(8), rows=4096)
    kept = jax.tree.map(np.asarray, state)
    change = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(1, state, {})
        change(state)
        restored, _ = checkpoints.restore(1, _abstract(_state(_mesh(8), rows=4096)))
    _assert_same(restored, kept)


def test_a_part_is_read_alone_in_the_dtype_asked_for(saved):
    folder, states = saved
    student = states[2]["params"]["student"]
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, student))
    places = jax.tree.map(lambda _: sharding.replicated(_mesh(2)), shapes)
    with Checkpoints(folder) as checkpoints:
        kept = checkpoints.restore_part(2, ("params", "student"), shapes, places)
        low = checkpoints.restore_part(2, ("params", "student"), shapes, places, jnp.bfloat16)
    _assert_same(kept, student)
    _assert_same(low, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), student))
    assert kept["head"].sharding == places["head"]


def test_a_part_of_another_shape_is_refused(saved):
    folder, _ = saved
    shapes = {"head": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    places = {"head": sharding.replicated(_mesh(1))}
    with Checkpoints(folder) as checkpoints, pytest.raises(ModelError) as caught:
        checkpoints.restore_part(2, ("params", "student"), shapes, places)
    assert "params/student/head: the checkpoint has [16, 4], this run [8, 4]" in str(caught.value)
    assert "params/student/norm/scale: the checkpoint has [3], this run nothing" in str(
        caught.value
    )


def _replay(folder, values, **policy):
    state = {"x": jnp.arange(3.0)}
    with Checkpoints(folder, **policy) as checkpoints:
        for step, value in enumerate(values, 1):
            metrics = None if value is None else {"eval/loss": value}
            checkpoints.save(step, state, {}, metrics)
        best, steps = checkpoints.best(), checkpoints.steps()
    on_disk = sorted(int(name) for name in os.listdir(folder))
    assert steps == on_disk
    return steps, best


@pytest.mark.parametrize(
    "values, mode, keep_latest, keep_best, steps, best",
    [
        # A NaN never deletes the best: 1 (step 2) and 2 (step 4) stay, and the newest.
        ([5.0, 1.0, np.nan, 2.0, 4.0, 3.0], "min", 1, 2, [2, 4, 6], 2),
        ([5.0, 1.0, np.inf, 2.0, 4.0, -np.inf], "max", 1, 2, [1, 5, 6], 1),
        ([5.0, 1.0, 2.0], "min", 2, 0, [2, 3], 2),
        # Without an evaluation a checkpoint stays among the newest only.
        ([3.0, None, None, None], "min", 2, 1, [1, 3, 4], 1),
        ([None, np.nan], "min", 2, 1, [1, 2], None),
        # Of equals the newest is the best, and stays.
        ([1.0, 1.0, 2.0, 3.0], "min", 1, 1, [2, 4], 2),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path, values, mode, keep_latest, keep_best, steps, best
):
    policy = {"keep_latest": keep_latest, "keep_best": keep_best, "mode": mode}
    assert _replay(tmp_path, values, best_metric="eval/loss", **policy) == (steps, best)
    with Checkpoints(tmp_path) as reader:  # knows the rank without being told the metric
        assert (reader.steps(), reader.best()) == (steps, best)


def test_going_on_keeps_what_is_there_and_refuses_to_go_back(copy):
    folder, states = copy
    policy = {"keep_latest": 1, "keep_best": 1, "best_metric": "eval/loss"}
    with Checkpoints(folder, **policy) as checkpoints:
        checkpoints.save(3, states[1], {}, {"eval/loss": 9.0})
        assert checkpoints.steps() == [1, 3]  # 1 is the best, 3 the newest
        with pytest.raises(ConfigError, match="step 3 cannot be saved after step 3"):
            checkpoints.save(3, states[1], {})


def test_a_reader_changes_nothing_and_a_writer_removes_what_was_left_half_written(copy):
    folder, states = copy
    for left in (".saving-3", ".saving-3.orbax-checkpoint-tmp", ".removing-1"):
        (folder / left / "state").mkdir(parents=True)
    before = sorted(path.as_posix() for path in folder.rglob("*"))
    with Checkpoints(folder) as reader:
        assert reader.steps() == [1, 2]
        reader.restore(2, _abstract(states[2]))
    assert sorted(path.as_posix() for path in folder.rglob("*")) == before
    with Checkpoints(folder, keep_latest=2) as writer:
        assert writer.latest() == 2
        writer.save(3, states[1], {})
        assert writer.steps() == [2, 3]
    assert sorted(os.listdir(folder)) == ["2", "3"]


def test_a_folder_that_is_not_there_has_no_checkpoints_and_is_not_made(tmp_path):
    with Checkpoints(tmp_path / "none") as reader:
        assert (reader.steps(), reader.latest(), reader.best()) == ([], None, None)
        with pytest.raises(ConfigError, match="no checkpoint of step 5; there are: none"):
            reader.restore(5, {})
    assert not (tmp_path / "none").exists()


def test_a_state_that_differs_is_refused_with_the_first_ten_differences(tmp_path):
    state = {f"w{i:02}": jnp.zeros((2, 3)) for i in range(14)}
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(1, state, {})
        abstract = _abstract(state)
        del abstract["w00"]
        abstract["new"] = jax.ShapeDtypeStruct((5,), jnp.int32)
        abstract["w01"] = jax.ShapeDtypeStruct((3, 2), jnp.float32)
        for i in range(2, 14):  # Orbax alone would cast these and say nothing
            abstract[f"w{i:02}"] = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
        with pytest.raises(ModelError) as caught:
            checkpoints.restore(1, abstract)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  new: the checkpoint has nothing, this run int32[5]"
    assert lines[2] == "  w00: the checkpoint has float32[2, 3], this run nothing"
    assert lines[3] == "  w01: the checkpoint has float32[2, 3], this run float32[3, 2]"
    assert lines[4] == "  w02: the checkpoint has float32[2, 3], this run bfloat16[2, 3]"
    assert lines[11] == "  and 5 more" and len(lines) == 13


class _SmallFiles:
    """Lets this process write files of at most 256 KiB: a real failure of the operating system."""

    def __enter__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, self.limits[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


def _big():
    return {"noise": jnp.asarray(np.random.default_rng(0).normal(size=2**18), jnp.float32)}


@pytest.mark.parametrize("told_by", ["wait", "save", "steps", "close"])
def test_a_save_that_failed_is_told_by_what_comes_next(tmp_path, told_by, caplog):
    small = {"noise": jnp.zeros(4)}
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    checkpoints.save(1, small, {})
    checkpoints.wait()
    with _SmallFiles():
        seconds = checkpoints.save(2, _big(), {})  # returns: the failure is in the background
        assert 0 < seconds < 60
        calls = {
            "wait": checkpoints.wait,
            "save": lambda: checkpoints.save(3, small, {}),
            "steps": checkpoints.steps,
            "close": checkpoints.close,
        }
        with pytest.raises(StorageError, match="step 2 could not be written.*File too large"):
            calls[told_by]()
    assert not [record for record in caplog.records if "orbax" in record.pathname]
    if told_by != "close":  # the one before stands, and saving goes on once the cause is gone
        assert checkpoints.steps() == [1]
        checkpoints.save(4, small, {})
        assert checkpoints.steps() == [4]
        checkpoints.close()
        assert os.listdir(tmp_path) == ["4"]


def test_poll_tells_a_failure_without_waiting(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    checkpoints.poll()
    with _SmallFiles():
        checkpoints.save(1, _big(), {})
        step, future = checkpoints._pending
        assert future.exception() is not None and step == 1
        with pytest.raises(StorageError, match="step 1 could not be written"):
            checkpoints.poll()
    checkpoints.close()


def test_an_error_in_the_run_is_not_replaced_by_one_of_the_last_save(tmp_path):
    with pytest.raises(KeyError) as caught:
        with Checkpoints(tmp_path, keep_latest=1) as checkpoints, _SmallFiles():
            checkpoints.save(1, _big(), {})
            assert checkpoints._pending[1].exception() is not None
            raise KeyError("the run's own")
    assert "step 1 could not be written" in caught.value.__notes__[0]


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(StorageError, match="needs 0.00105 GB, 1e-06 GB are free"):
            checkpoints.save(1, _big(), {})
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep_latest=1)


def _damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if how == "cut" else data)
    if how == "remove":
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_seen_and_the_checkpoint_before_it_is_used(saved, tmp_path, how):
    folder, states = saved
    abstract = _abstract(states[1])
    files = [path.relative_to(folder) for path in (folder / "2").rglob("*") if path.is_file()]
    tested = 0
    for file in files:
        if not (folder / file).stat().st_size and how != "remove":
            continue
        place = tmp_path / str(tested)
        shutil.copytree(folder, place)
        _damage(place / file, how)
        with Checkpoints(place, keep_latest=2) as checkpoints:
            told = []
            note = lambda *what, told=told: told.append(what)
            step, state, meta = checkpoints.restore_latest(abstract, note)
            assert (step, meta["data_step"], checkpoints.steps()) == (1, 1, [1]), file
            assert [step for step, _ in told] == [2] and file.name in told[0][1]
            checkpoints.save(2, states[2], {})  # the step of the damaged one is free again
        _assert_same(state, states[1])
        assert [path.name.split("-")[0] for path in (place / "bad").iterdir()] == ["2"]
        tested += 1
    assert tested > 8


def test_a_flipped_bit_in_an_array_is_named(copy):
    folder, states = copy
    (file,) = (path for path in (folder / "2" / "state" / "d").iterdir())
    _damage(file, "flip")
    with Checkpoints(folder) as reader:
        with pytest.raises(DamagedError, match=f"damaged: state/d/{file.name} is changed"):
            reader.restore(2, _abstract(states[2]))


def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_not_damaged(copy, monkeypatch):
    folder, states = copy
    sums = manifest._sums

    def removed(*given):
        shutil.rmtree(folder / "2")
        return sums(*given)

    monkeypatch.setattr(manifest, "_sums", removed)
    with Checkpoints(folder) as reader, pytest.raises(ConfigError, match="removed while it was re"):
        reader.restore(2, _abstract(states[2]))


def test_without_one_sound_checkpoint_the_reason_of_each_is_told(copy):
    folder, states = copy
    for step in ("1", "2"):
        (folder / step / "state" / "_METADATA").unlink()
    with Checkpoints(folder, keep_latest=2) as checkpoints:
        with pytest.raises(DamagedError, match=r"no checkpoint can be read.*/2.*/1.*"):
            checkpoints.restore_latest(_abstract(states[1]), lambda *_: None)
        assert checkpoints.steps() == []
    with Checkpoints(folder, keep_latest=2) as checkpoints:
        with pytest.raises(DamagedError, match="there are no checkpoints"):
            checkpoints.restore_latest(_abstract(states[1]), lambda *_: None)


def test_damage_that_no_checksum_of_a_file_tells_is_still_an_error(copy):
    """Files and manifest agree, and yet it is no checkpoint: somebody made it."""
    folder, states = copy
    (folder / "2" / "state" / "_METADATA").write_text("{")
    manifest.seal(folder / "2", manifest.read(folder / "2"))
    with Checkpoints(folder) as reader, pytest.raises(DamagedError, match="2: cannot be"):
        reader.restore(2, _abstract(states[2]))


def test_metrics_must_hold_the_one_that_ranks(tmp_path):
    with pytest.raises(ConfigError, match="keep_best = 1: needs best_metric"):
        Checkpoints(tmp_path, keep_latest=1, keep_best=1)
    with Checkpoints(tmp_path, keep_latest=1, keep_best=1, best_metric="eval/loss") as checkpoints:
        with pytest.raises(ConfigError, match="'eval/loss': not among the metrics: eval/ce"):
            checkpoints.save(1, {"x": jnp.zeros(1)}, {}, {"eval/ce": 1.0})


def test_meta_and_metrics_are_plain_json_beside_the_arrays(saved):
    folder, _ = saved
    content = json.loads((folder / "2" / manifest.NAME).read_text())["content"]
    assert content["meta"] == {"data_step": 2, "config": "seed: 0\n"}
    assert content["metrics"] == {"eval/loss": 2.0, "eval/ce": 2.0}
    assert (content["rank"], content["step"]) == (-2.0, 2)
    one = step_folders.read(folder, 2)
    on_disk = [path.stat().st_size for path in (folder / "2").rglob("*") if path.is_file()]
    assert one.bytes == sum(on_disk) - (folder / "2" / manifest.NAME).stat().st_size
