"""What may change between two attempts: the table of rules, and fingerprints of weights."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import api
from jaxdistill.errors import ConfigError, DamagedError
from jaxdistill.formats import sums
from jaxdistill.references import STUDENT
from jaxdistill.report import ProgressLine, read_metrics
from jaxdistill.run import anew, changes, run_table, schedule
from jaxdistill.run.folder import RunDir
from jaxdistill.run.run_table import ORDER
from tests.run.conftest import take_devices


@pytest.fixture
def run(tmp_path):
    return RunDir.create(str(tmp_path / "run"), name="x", input_text="", resolved="", overrides=())


FACTS = {
    "data.train": "a",
    "data.eval": "b",
    "tokenizer": "c",
    "teacher.shape": "d",
    "teacher.weights": "e",
    "teachers.math.shape": "m",
    "student.shape": "f",
    "config.train.steps": "100",
    "config.optimizer.lr": "0.1",
    "code": "h",
    "versions.jax": "0.12.0",
    "device": "8 x cpu",
    "mesh": "data 1, fsdp 8",
    "processes": "1",
    "flags": "",
}


def test_the_first_attempt_only_keeps_its_facts(run, capsys):
    changes.check(run, FACTS)
    changes.check(run, FACTS)
    assert changes.kept(run) == FACTS
    assert not (run.path / "events.jsonl").exists() and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("optimizer.name", True),
        ("optimizer.moments", True),
        ("student.param_dtype", True),
        ("student.lora", True),
        ("student.lora.rank", True),
        ("student.lora.targets", True),
        ("student.lora.dropout", False),
        ("optimizer.lr", False),
    ],
)
def test_what_the_checkpoints_hold_must_not_change(run, name, refused):
    facts = FACTS | {f"config.{name}": "1"}
    changes.check(run, facts)
    if not refused:
        assert changes.check(run, facts | {f"config.{name}": "2"}) == {f"config.{name}": "1"}
        return
    for other in (facts | {f"config.{name}": "2"}, FACTS):
        with pytest.raises(ConfigError, match=f"changed since this run began: config.{name}: go"):
            changes.check(run, other)


@pytest.mark.parametrize(
    "name",
    [name for name in FACTS if name.split(".")[0] in ("data", "tokenizer", "teacher", "student")],
)
def test_what_a_run_is_made_of_must_not_change(run, name):
    changes.check(run, FACTS)
    for other in (FACTS | {name: "new"}, {n: v for n, v in FACTS.items() if n != name}):
        with pytest.raises(ConfigError, match=f"changed since this run began: {name}: going on"):
            changes.check(run, other | {"versions.jax": "0.13.0"})
    assert changes.kept(run) == FACTS
    assert not (run.path / "events.jsonl").exists()


@pytest.mark.parametrize(
    "name", ["config.train.steps", "code", "versions.jax", "device", "mesh", "processes", "flags"]
)
def test_what_is_around_a_run_may_change_and_is_told_once(run, name, capsys):
    changes.check(run, FACTS)
    changes.check(run, FACTS | {name: "new"})
    assert (
        f"{name} has changed ({FACTS[name]} -> new): not the same bits" in capsys.readouterr().err
    )
    changes.check(run, FACTS | {name: "new"})
    assert not capsys.readouterr().err
    (event,) = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    assert (event["what"], event["before"], event["after"]) == (name, FACTS[name], "new")
    assert event["bitwise"] is False


def test_every_fact_has_a_rule(mesh8):
    world = changes.world(mesh8, {"jax": jax.__version__})
    assert {name.partition(".")[0] for name in world | FACTS} == {
        name.partition(".")[0] for name in changes.RULES
    }


def test_the_longest_name_decides_and_every_setting_has_a_rule(load_config, tmp_path):
    assert changes.rule_of("config.method.name").refused and changes.rule_of("config.seed").refused
    assert not changes.rule_of("config.method.alpha").refused
    assert changes.rule_of("config.run.dir").bitwise
    settings = changes.facts_of(load_config(tmp_path).settings())
    assert settings["config.train.steps"] == "6" and settings["config.method.name"] == '"kd"'
    for name in settings:
        changes.rule_of(name)


def test_what_becomes_of_the_learning_rate_is_told(run, load_config, tmp_path, capsys):
    """Cosine, to zero in the last step, which is steps - 1."""
    longer = load_config(tmp_path, "train.steps=200", "optimizer.end_lr_ratio=0")
    changed = {"config.train.steps": "100", "config.train.log_every": "5"}
    schedule.tell(run, longer.optimizer, 200, changed, step=95)
    half_cosine = lambda steps: 1e-2 / 2 * (1 + math.cos(math.pi * (95 - 2) / (steps - 1 - 2)))
    (event,) = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    np.testing.assert_allclose(event["before"], half_cosine(100), rtol=1e-5)
    np.testing.assert_allclose(event["after"], half_cosine(200), rtol=1e-5)
    assert "step 95: 100 -> 200 steps, cosine schedule: the learning rate goes from 4" in (
        capsys.readouterr().err
    )
    schedule.tell(run, longer.optimizer, 200, {"config.optimizer.lr": "0.1"}, step=95)
    told = capsys.readouterr().err
    assert "step 95: 200 steps, cosine schedule" in told and "number of steps" not in told
    schedule.tell(run, longer.optimizer, 200, {"config.train.log_every": "5"}, step=95)
    schedule.tell(run, longer.optimizer, 200, changed, step=0)
    assert not capsys.readouterr().err


def test_rows_that_other_settings_made_are_measured_again(run):
    rows = [{"name": name} | dict.fromkeys(run_table._FIELDS - {"name"}, 1.0) for name in ORDER]
    run.write_json("table.json", {"held_out": "x", "rows": rows})
    for changed, left in (
        ({"config.logging.progress", "versions.jax"}, ORDER),
        ({"config.train.steps"}, ORDER[:2]),
        ({"config.eval.max_rows"}, ()),
    ):
        run_table.drop(run, run_table.stale(changed))
        assert tuple(run_table._stored(run)) == tuple(left)
    run.write_text("table.json", "[]")
    assert run_table._stored(run) == {}
    assert (run.path / "table.damaged.json").read_text() == "[]"


def test_changed_settings_are_kept_before_they_hold(run):
    changes.check(run, FACTS)
    order = []
    longer = FACTS | {"config.train.steps": "200"}
    changed = changes.check(run, longer, lambda names: order.append((*names, changes.kept(run))))
    assert order == [("config.train.steps", FACTS)] and changed == {"config.train.steps": "100"}
    with pytest.raises(ConfigError, match="config.seed"):
        changes.check(run, longer | {"config.seed": "4"}, order.append)
    assert len(order) == 1


@pytest.mark.parametrize(
    "damage",
    [
        None,
        b"",
        b"null",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"crc32": 1, "facts": {}}',
        b'{"crc32": 1, "facts": null}',
        b'{"crc32": 1e999, "facts": {}}',
    ],
)
def test_without_its_facts_a_run_does_not_go_on(run, damage):
    changes.check(run, FACTS)
    again = RunDir.open(run.path)
    assert again.record["sealed"]
    if damage is None:
        (run.path / changes.FILE).unlink()
    else:
        (run.path / changes.FILE).write_bytes(damage)
    with pytest.raises(DamagedError, match="fingerprints.json.*--from-start"):
        changes.check(again, FACTS)
    anew.begin(again)  # the way out
    changes.check(again, FACTS | {"data.train": "new"})
    assert changes.kept(again)["data.train"] == "new"


def test_a_changed_fact_is_noticed_as_damage(run):
    changes.check(run, FACTS)
    file = run.path / changes.FILE
    file.write_text(file.read_text().replace('"e"', '"x"'))
    with pytest.raises(DamagedError, match="another checksum"):
        changes.check(run, FACTS | {"teacher.weights": "x"})


def _params(dtype=jnp.float32):
    draw = np.random.default_rng(0)
    return {
        "head": jnp.asarray(draw.normal(size=(16, 4)), dtype),
        "layers": {"scale": jnp.asarray(draw.normal(size=(2, 3, 8)), jnp.bfloat16)},
        "steps": jnp.int8([1, -2, 3]),
    }


def test_a_fingerprint_of_weights_is_that_of_the_definition_in_integers():
    params = _params()
    leaf = np.asarray(params["head"])
    bits = leaf.view(np.uint32).ravel().astype(object)  # Python integers, of any size
    total = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
    assert int(changes._sum(params["head"])) == total


def test_any_flipped_bit_changes_it_and_no_mesh_does(mesh8):
    params = _params()
    print_ = changes.weights(params)
    split = NamedSharding(mesh8, PartitionSpec("fsdp", "tensor"))
    assert changes.weights(params | {"head": jax.device_put(params["head"], split)}) == print_
    draw = np.random.default_rng(1)
    for _ in range(40):
        name = draw.choice(["head", "scale", "steps"])
        leaf = params["layers"]["scale"] if name == "scale" else params[name]
        raw = bytearray(np.asarray(leaf).tobytes())
        raw[draw.integers(len(raw))] ^= 1 << draw.integers(8)
        changed = jnp.asarray(np.frombuffer(bytes(raw), leaf.dtype).reshape(leaf.shape))
        other = params | ({"layers": {"scale": changed}} if name == "scale" else {name: changed})
        assert changes.weights(other) != print_
    swapped = params["head"].at[jnp.array([0, 1])].set(params["head"][jnp.array([1, 0])])
    assert changes.weights(params | {"head": swapped}) != print_


def _break_off(config, monkeypatch, after):
    """Runs a configuration up to a step, and stops there as Ctrl-C would."""
    step = ProgressLine.step

    def stop(self, number, scalars):
        step(self, number, scalars)
        if number == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressLine, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            api.train(config)


@pytest.mark.long
def test_on_another_mesh_a_run_goes_on_told_and_to_rounding(
    finished, load_config, tmp_path, monkeypatch
):
    _break_off(load_config(tmp_path), monkeypatch, after=4)
    folder = tmp_path / "run"
    resolved = folder / "config.resolved.yaml"
    text = resolved.read_text()
    assert "  data: null\n  fsdp: -1\n" in text
    sizes = "  data: 2\n  fsdp: 4\n"
    resolved.write_text(text.replace("  data: null\n  fsdp: -1\n", sizes))
    api.resume(folder)
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    changed = {event["what"]: event for event in told if event["kind"] == "changed"}
    edited = {"config.mesh.data", "config.mesh.fsdp"}
    assert changed.keys() - {"code"} == edited | {"mesh"}  # who edits while tests run changes it
    assert changed["mesh"]["after"].startswith("data 2, fsdp 4")
    losses = [
        {r["step"]: r["loss/total"] for r in read_metrics(place) if "loss/total" in r}
        for place in (finished.run_dir, folder)
    ]
    assert sorted(losses[0]) == sorted(losses[1]) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(losses[1].values()), list(losses[0].values()), rtol=1e-5)


@pytest.mark.long
def test_another_teacher_is_refused_and_what_was_lost_meanwhile_is_told(
    finished, load_config, tmp_path, monkeypatch, caplog, capsys
):
    """Weights of the teacher, all records of the run, and what its checkpoints mean."""
    take_devices(monkeypatch, 1)
    teacher = api.export(str(finished.run_dir), tmp_path / "teacher")
    config = load_config(
        tmp_path,
        f"teacher={{source: {teacher}, dtype: float32}}",
        "student={random: {like: teacher, layers: 1}, compute_dtype: float32}",
        "eval.samples=0",
    )
    _break_off(config, monkeypatch, after=2)
    (teacher / sums.FILE).unlink()
    weights = teacher / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # one bit of one number, which stays finite
    weights.write_bytes(data)
    with pytest.raises(ConfigError, match="changed since this run began: teacher.weights"):
        api.resume(tmp_path / "run")
    data[-2] ^= 1
    weights.write_bytes(data)
    run = tmp_path / "run"
    (run / "metrics.jsonl").write_bytes(b"")
    student = run / STUDENT / "config.json"
    described = student.read_text()
    student.write_text(described.replace("10000.0", "17.0"))
    assert student.read_text() != described
    capsys.readouterr()
    with caplog.at_level("WARNING"):
        api.resume(run)
    assert student.read_text() == described
    assert "config.json is changed since it was saved" in capsys.readouterr().err
    assert "there are no records of the steps 1 to" in caplog.text
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert {"records_missing", "student_renewed"} <= set(kinds)
