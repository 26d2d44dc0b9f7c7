"""A stored teacher: captured once, learned from in the same step, with the same numbers."""

import contextlib
import dataclasses
import io

import jax
import numpy as np
import pytest

from jaxdistill import api, cli, commands, methods
from jaxdistill.data.feed import CorpusFeed
from jaxdistill.data.teacher_cache import parts
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import ConfigError, DataError, MismatchError
from jaxdistill.evaluate.held_out import HeldOut
from jaxdistill.methods import signals
from jaxdistill.run import (
    identity,
    participants,
    run_table,
    setup,
    states,
    stored,
    teacher_cache,
    teacher_verify,
    texts,
)
from jaxdistill.run.folder import RunDir
from jaxdistill.train.step import place
from tests.also import also

# A student of its own, so that a stored teacher needs no weights.
STUDENT = "student={random: {layers: 1, embed: 32, mlp: 48, heads: 4}, compute_dtype: float32}"
FIXED = "method={name: kd, alpha: 0.3, temperature: 2.0}"
SMALL = (STUDENT, FIXED, "tokenizer.from=bytes")


@pytest.fixture(scope="module")
def captured(load_config, tmp_path_factory):
    """(format, options) -> the place of what was captured; each once."""
    made: dict = {}

    def get(name: str, **options) -> str:
        key = (name, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("captured")
            section = commands.TeacherCache(output=str(folder / "c"), format=name, **options)
            assert teacher_cache.capture(load_config(folder, *SMALL), section)["whole"]
            made[key] = str(folder / "c")
        return made[key]

    return get


def exact(captured):
    return captured("hidden", dtype="float32")


def dense(captured):
    """Every token of 257, and T = 2 as the method has it."""
    return captured("topk", dtype="float32", k=257, temperatures=(2.0,))


def curve(config, steps: int) -> np.ndarray:
    """[steps, 2] of loss and gradient norm, of a configuration's own step and feed, on a device."""
    mesh = setup.mesh_of(config, jax.devices()[:1])  # captured on all of them
    models = participants.shapes_of(config, mesh)
    data = texts.data_of(config.data, models.tokenizer)
    data = models.teaching.beside(data, models.tokenizer)
    models = participants.load_models(config, models, mesh)
    method = setup.method_of(config, models)
    state = states.create(config, models.student, method.objective, method.tx, mesh)
    params = method.asked.params
    step = setup.compile_step(config, method, state, params, mesh, check_kernels=False)
    feed = CorpusFeed(
        data["train"], batch_size=config.train.batch_size, seed=config.seed, left_out=list
    )
    row, found = 0, []
    for _ in range(steps):
        span, batch = feed.next(row, None)
        row = span.end_row
        state, means = step(state, params, place(batch, mesh))
        found.append([float(means[n].value) for n in ("loss/total", "optim/grad_norm")])
    return np.asarray(found)


@pytest.fixture(scope="module")
def online(load_config, tmp_path_factory) -> np.ndarray:
    return curve(load_config(tmp_path_factory.mktemp("online"), *SMALL), 20)


@pytest.mark.parametrize("make", [exact, *also(dense)])
def test_a_stored_teacher_trains_as_the_one_that_runs(
    make, captured, online, load_config, tmp_path
):
    teacher = f"teacher={{cache: {make(captured)}}}"
    config = load_config(tmp_path, STUDENT, FIXED, teacher, "tokenizer.from=teacher")
    np.testing.assert_allclose(curve(config, 20), online, rtol=1e-6)


def test_the_teachers_row_of_a_runs_table_comes_from_its_hidden_states(
    captured, load_config, tmp_path
):
    # Packed otherwise than it was captured, on another mesh.
    config = load_config(
        tmp_path, *SMALL, "data.packing=none", f"teacher={{cache: {exact(captured)}}}"
    )
    mesh = setup.mesh_of(config, jax.devices()[:1])
    models = participants.shapes_of(config, mesh)
    data = texts.data_of(config.data, models.tokenizer)
    rows = models.teaching.beside(data, models.tokenizer)["eval"]
    models = participants.load_models(config, models, mesh)
    (tmp_path / "kept").mkdir()
    kept = RunDir(tmp_path / "kept", {})
    table = run_table.RunTable(
        kept,
        models,
        setup.method_of(config, models),
        HeldOut(rows, 8, None, mesh, "eval"),
        student=config.student,
        speaks=config.eval,
        seed=config.seed,
    )
    table.add_teacher()
    (row,) = table.rows
    assert row["name"] == "teacher" and row["scored_tokens_per_second"] is None
    assert row["parameters"] == 4 * (32 * 32 * 3 + 3 * 32 * 48 + 64) + 257 * 32 + 32
    live, total, count = the_teacher(load_config, tmp_path), 0.0, 0
    for index in range(len(rows)):
        one = rows[index]
        logits = np.asarray(live.logits(one["tokens"][None], one["segment_ids"][None]))[0]
        wide = logits.astype(np.float64)
        logp = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
        total -= logp[np.arange(32), one["targets"]][one["mask"]].sum()
        count += one["mask"].sum()
    assert row["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
    # What a run goes on with is that store's teacher and no other.
    assert "teacher.cache" in identity.fingerprints(config.settings(), models, data)


def test_verify_asks_the_teacher_again(captured, load_config, tmp_path):
    live = the_teacher(load_config, tmp_path)
    again = teacher_verify.verify(exact(captured), live, 5)
    assert again["weights"] == "same" and again["kl_max"] < 1e-9
    few = teacher_verify.verify(captured("topk", k=3), live, 5)
    assert 0 <= few["kl_mean"] <= few["kl_max"] < 1e-4  # float16
    assert 0 < few["kept_mass"]["min"] < few["kept_mass"]["max"] < 1
    other = dataclasses.replace(live, params=jax.tree.map(lambda a: a * 1.01, live.params))
    told = teacher_verify.verify(exact(captured), other, 5)
    assert told["weights"] == "other" and told["kl_max"] > 1e-6
    text = capsys_of(exact(captured))
    assert "hidden (float32)" in text and "positions" in text


def capsys_of(place: str) -> str:
    """What `teacher cache ls` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["teacher", "cache", "ls", place]) == 0
    return out.getvalue()


def the_teacher(load_config, folder):
    """The teacher itself."""
    config = load_config(folder / "live", *SMALL)
    mesh = setup.mesh_of(config)
    return participants.shapes_of(config, mesh).teaching.loaded(mesh).model


REFUSED = {
    "{name: taid}": "hidden",
    "{name: ctkd}": "hidden",
    "{name: jsd}": "hidden",
    "{name: akl}": "hidden",
    "{name: kd, temperature: {schedule: linear, start: 1.0, end: 2.0}}": "hidden",
    "{name: kd, temperature: 3.0}": "--temperatures 3.0",
    "{name: minilm, teacher_layer: 2}": "without teacher.cache",
    "{name: hidden}": "without teacher.cache",
    "{name: ted, layers: 2}": "without teacher.cache",
}


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_needs_more_than_is_stored_is_refused(
    method, captured, load_config, tmp_path
):
    config = load_config(
        tmp_path, STUDENT, "tokenizer.from=bytes", f"method={method}",
        f"teacher={{cache: {dense(captured)}}}",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=REFUSED[method]):
        api.train(config)
    assert not (tmp_path / "run").exists()


def test_every_method_has_its_row_in_the_table():
    for name, method in methods.METHODS.items():
        options = method.options.model_construct(
            **{
                n: f.get_default(call_default_factory=True)
                for n, f in method.options.model_fields.items()
            }
        )
        assert method.reads(options) in signals.TABLE, name
    for reads, holds in signals.TABLE.items():
        for form in ("hidden", "topk", "sampled"):
            assert (signals.problem("m", reads, form) is None) == (form in holds)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (("data.seq_len=16",), DataError, "captured with data.seq_len = 32, here it is 16"),
        (("teacher.dtype=bfloat16",), MismatchError, "teacher.dtype: 'float32' there, 'bfloat16'"),
        (("teacher.random.layers=2",), MismatchError, "teacher.config: "),
        (("checkpoint.best_metric=eval/kl_t1",), ConfigError, "reads whole rows"),
    ],
)
def test_another_teacher_or_other_text_is_refused_by_its_name(
    overrides, error, words, captured, load_config, tmp_path
):
    place = dense(captured)
    config = load_config(tmp_path, *SMALL, f"teacher.cache={place}", *overrides)
    with pytest.raises(error, match=words):
        api.train(config)
    assert not (tmp_path / "run").exists()


def test_a_cut_student_needs_the_weights_and_they_are_those_that_were_asked(
    captured, load_config, tmp_path
):
    place = exact(captured)
    with pytest.raises(ConfigError, match="has no weights to cut it out of"):
        load_config(tmp_path, "student={from: teacher}", f"teacher={{cache: {place}}}")
    with pytest.raises(MismatchError, match="teacher.weights"):
        stored.check_weights(place, "0" * 64)
    # With the weights named it is cut out of them, and the teacher takes no part.
    config = load_config(tmp_path, "student={from: teacher, every: 2}", f"teacher.cache={place}")
    mesh = setup.mesh_of(config, jax.devices()[:1])
    models = participants.load_models(config, participants.shapes_of(config, mesh), mesh)
    assert models.teacher is None and models.student.config.layers == 2
    whole = the_teacher(load_config, tmp_path).params["layers"]
    kept = models.student.params["layers"]
    for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs[::2])


def test_shards_together_are_the_whole_and_a_dry_run_asks_nobody(
    captured, load_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(parts, "BYTES", 1 << 15)  # several parts
    config = load_config(tmp_path, *SMALL)
    ask = lambda **options: teacher_cache.capture(
        config, commands.TeacherCache(output=str(tmp_path / "c"), **options)
    )
    told = ask(dry_run=True)
    assert told["bytes_per_token"] == 64 and not (tmp_path / "c").exists()
    with Objects(str(tmp_path / "c")).alone("1-of-2"):
        with pytest.raises(ConfigError, match="is being written by process"):
            ask(shard="1/2")
    first, second = ask(shard="1/2"), ask(shard="2/2")
    assert (first["whole"], second["whole"]) == (False, True)
    store = Store(str(tmp_path / "c"))
    assert len(store) == told["segments"] and len(store.content["parts"]) > 2
    alone = commands.TeacherCache(output=str(tmp_path / "d"))
    teacher_cache.capture(config, alone)
    assert files(tmp_path / "c") == files(tmp_path / "d")
    assert ask()["segments"] == 0  # nothing is lacking, nobody is asked


def files(place) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def test_drawn_tokens_train_and_every_epoch_has_its_draw(captured, load_config, tmp_path):
    place = captured("sampled", k=20, draws=2)
    told = teacher_verify.verify(place, the_teacher(load_config, tmp_path), 5)
    assert abs(told["cross_entropy_gap"]) < 5 * told["standard_error"]
    config = load_config(
        tmp_path, STUDENT, "tokenizer.from=bytes", "method={name: kd, alpha: 0.3}",
        f"teacher={{cache: {place}}}",
    )  # fmt: skip
    mesh = setup.mesh_of(config)
    models = participants.shapes_of(config, mesh)
    method = setup.method_of(config, models)
    state = states.abstract(config, models.student.config, method.objective, method.tx, mesh)
    batch = setup.abstract_batch_of(config, mesh, method.asked)
    assert batch.teacher["ids"].shape == (8, 32, 20, 2)  # of one draw
    with jax.set_mesh(mesh):
        _, means = jax.eval_shape(setup.make_step(config, method), state, {}, batch)
    assert {"teacher/kept_mass", "loss/kl_t1"} <= set(means) and "agree/top1" not in means
