"""What may change between two attempts: the table of rules, and fingerprints of weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill import api
from jaxdistill.errors import ConfigError
from jaxdistill.report import Progress, read_metrics
from jaxdistill.run import changes
from jaxdistill.run.folder import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir.create(str(tmp_path / "run"), name="x", input_text="", resolved="", overrides=())


FACTS = {
    "data.train": "a",
    "data.eval": "b",
    "tokenizer": "c",
    "teacher.shape": "d",
    "teacher.weights": "e",
    "student.shape": "f",
    "config": "g",
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
    assert run.read_json(changes.FILE) == FACTS
    assert not (run.path / "events.jsonl").exists() and not capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [name for name in FACTS if name.split(".")[0] in ("data", "tokenizer", "teacher", "student")],
)
def test_what_a_run_is_made_of_must_not_change(run, name):
    changes.check(run, FACTS)
    for other in (FACTS | {name: "new"}, {n: v for n, v in FACTS.items() if n != name}):
        with pytest.raises(ConfigError, match=f"changed since this run began: {name}: going on"):
            changes.check(run, other | {"versions.jax": "0.13.0"})
    assert run.read_json(changes.FILE) == FACTS
    assert not (run.path / "events.jsonl").exists()


@pytest.mark.parametrize(
    "name", ["config", "code", "versions.jax", "device", "mesh", "processes", "flags"]
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
    assert {name.partition(".")[0] for name in world | FACTS} == set(changes.RULES)


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
    step = Progress.step

    def stop(self, number, scalars):
        step(self, number, scalars)
        if number == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        api.train(config)
    monkeypatch.undo()


def test_on_another_mesh_a_run_goes_on_told_and_to_rounding(
    finished, load_config, tmp_path, monkeypatch
):
    _break_off(load_config(tmp_path), monkeypatch, after=4)
    folder = tmp_path / "run"
    resolved = folder / "config.resolved.yaml"
    text = resolved.read_text()
    assert "  fsdp: -1\n" in text
    resolved.write_text(
        text.replace("  fsdp: -1\n", "  fsdp: 4\n").replace("data: 1\n", "data: 2\n")
    )
    api.resume(folder)
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    changed = {event["what"]: event for event in told if event["kind"] == "changed"}
    assert changed.keys() - {"code"} == {"config", "mesh"}  # who edits while tests run changes it
    assert changed["mesh"]["after"].startswith("data 2, fsdp 4")
    losses = [
        {r["step"]: r["loss/total"] for r in read_metrics(place) if "loss/total" in r}
        for place in (finished.run_dir, folder)
    ]
    assert sorted(losses[0]) == sorted(losses[1]) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(losses[1].values()), list(losses[0].values()), rtol=1e-5)


def test_a_teacher_whose_weights_have_changed_is_refused(
    finished, load_config, tmp_path, monkeypatch
):
    teacher = api.export(str(finished.run_dir), tmp_path / "teacher")
    config = load_config(
        tmp_path,
        f"teacher={{source: {teacher}, dtype: float32}}",
        "student={random: {like: teacher, layers: 1}, compute_dtype: float32}",
        "eval.samples=0",
    )
    _break_off(config, monkeypatch, after=2)
    weights = teacher / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # one bit of one number, which stays finite
    weights.write_bytes(data)
    with pytest.raises(ConfigError, match="changed since this run began: teacher.weights"):
        api.resume(tmp_path / "run")
    data[-2] ^= 1
    weights.write_bytes(data)
    api.resume(tmp_path / "run")
