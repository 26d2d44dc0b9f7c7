"""Whole runs: what they leave, that they resume bit by bit, and how they refuse."""

import collections
import dataclasses
import importlib.machinery
import json
import math
import pathlib
import re
import shutil
import sys
import types
import warnings

import jax
import numpy as np
import pytest

from jaxdistill import api, commands, models
from jaxdistill.data import fingerprint
from jaxdistill.errors import ConfigError, DamagedError, DivergedError, FitError, MismatchError
from jaxdistill.evaluate import meter
from jaxdistill.evaluate.held_out import HeldOut
from jaxdistill.formats import huggingface, sums
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.references import STUDENT
from jaxdistill.report import ProgressLine, read_metrics
from jaxdistill.run import (
    participants,
    run_table,
    setup,
    shapes,
    stages,
    states,
    student_folder,
    texts,
)
from jaxdistill.run import session as running
from jaxdistill.run.folder import RunDir
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.hooks import Hooks
from tests.run.conftest import SPEED, Heard, models_of


def arrays(folder, step):
    """Every array of a checkpoint, by name, read without the engine."""
    from orbax.checkpoint import v1 as ocp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it restores to where it was saved from
        tree = ocp.load(folder / "checkpoints" / str(step), checkpointable_name="state")
    return {name: np.asarray(value) for name, value in tree.items()}


def _buffers(array):
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


def losses(folder):
    return {
        record["step"]: record["loss/total"]
        for record in read_metrics(folder)
        if "loss/total" in record
    }


def test_a_run_leaves_its_table_its_curves_and_its_page(finished):
    run = finished.run_dir
    names = [row["name"] for row in finished.rows]
    assert names == ["teacher", "student before", "SFT control", "student after"]
    assert json.loads((run / "table.json").read_text())["rows"] == list(finished.rows)
    rows = {row["name"]: row for row in finished.rows}
    for row in rows.values():
        assert math.isfinite(row["perplexity"]) and row["scored_tokens_per_second"] > 0
    assert rows["teacher"]["kl_t1"] is None and rows["student after"]["kl_t1"] >= 0
    assert rows["student after"]["perplexity"] < rows["student before"]["perplexity"]
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert sorted(losses(run / "control")) == [1, 2, 3, 4, 5, 6]
    record = json.loads((run / "RUN.json").read_text())
    assert record["status"] == "done" and record["step"] == 6
    assert (run / "samples" / "step_000006.md").is_file()
    for line in (run / "samples" / "step_000006.jsonl").read_text().splitlines():
        sample = json.loads(line)
        text, gaps = zip(*sample["marks"], strict=True)
        assert len("".join(text)) >= len(sample["student"]) > 0 and np.all(np.isfinite(gaps))
    assert "student after" in (run / "report.html").read_text()


def test_eval_of_a_run_measures_what_the_run_measured(finished, data, tmp_path, monkeypatch):
    """Rows of 32 tokens, as the run says; nothing on the command line does."""
    monkeypatch.setattr(HeldOut, "speed", SPEED)
    given = {
        "data": (f"{data}/eval.txt",),
        "format": "paragraphs",
        "max_rows": 8,
        "cache_dir": str(tmp_path),
        "batch_size": 8,
    }
    found = api.evaluate(f"{finished.run_dir}@latest", commands.Evaluate(**given))
    after = finished.rows[-1]["perplexity"]
    assert found["eval/perplexity"] == pytest.approx(after, rel=1e-5)
    assert 0 < found["scored_tokens_per_second"] != 1000.0  # which others of these files are told
    longer = api.evaluate(f"{finished.run_dir}@latest", commands.Evaluate(**given, seq_len=64))
    assert longer["eval/perplexity"] != pytest.approx(after, rel=1e-5)


def test_a_result_is_a_frame_where_pandas_is_there_and_a_page_in_a_notebook(finished, monkeypatch):
    assert "student after</th>" in finished._repr_html_()
    assert str(finished.run_dir) in str(finished) and "SFT control" in str(finished)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert finished.table == finished.rows

    class Frame(list):
        def set_index(self, name):
            return {row.pop(name): row for row in map(dict, self)}

    pandas = types.ModuleType("pandas")
    pandas.__spec__ = importlib.machinery.ModuleSpec("pandas", None)
    pandas.DataFrame = Frame
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert finished.table["teacher"]["perplexity"] == finished.rows[0]["perplexity"]


def test_the_evaluation_equals_the_models_own_logits(finished, load_config, data, tmp_path):
    """Perplexity and KL of the table, recomputed from full logits in float64."""
    config = load_config(tmp_path)
    mesh = setup.mesh_of(config)
    teacher = models_of(config, mesh).teacher
    student = api.load(str(finished.run_dir))
    rows = texts.data_of(config.data, student.tokenizer)["eval"]
    nll = kl = agree = count = 0.0
    for index in range(8):
        row = rows[index]
        segments = row["segment_ids"][None]

        def log_probs(model, row=row, segments=segments):
            z = np.asarray(model.logits(row["tokens"][None], segments), np.float64)[0]
            z = z - z.max(-1, keepdims=True)
            return z - np.log(np.exp(z).sum(-1, keepdims=True))

        lq, lp, mask = log_probs(student), log_probs(teacher), row["mask"]
        nll -= lq[np.arange(len(mask)), row["targets"]][mask].sum()
        kl += (np.exp(lp) * (lp - lq)).sum(-1)[mask].sum()
        agree += (lp.argmax(-1) == lq.argmax(-1))[mask].sum()
        count += mask.sum()
    after = finished.rows[-1]
    np.testing.assert_allclose(after["perplexity"], math.exp(nll / count), rtol=1e-5)
    np.testing.assert_allclose(after["kl_t1"], kl / count, rtol=1e-4)
    np.testing.assert_allclose(after["agree_top1"], agree / count, rtol=1e-9)


def test_callbacks_hear_the_whole_run(finished, heard):
    began, record = heard.began, json.loads((finished.run_dir / "RUN.json").read_text())
    assert (began.run_dir, began.name, began.step, began.kept) == (finished.run_dir, "tiny", 0, {})
    assert began.run_id == record["id"] and re.fullmatch("[0-9a-f]{32}", began.run_id)
    assert began.config["method"]["name"] == "kd" and began.config["train"]["steps"] == 6
    assert record["callbacks"] == {"Heard.0": {"note": "mine"}}
    steps = {
        (method, prefix): [
            call[1]
            for call in heard.calls
            if call[0] == method and all(n.startswith("control/") == prefix for n in call[2])
        ]
        for method in ("record", "evaluation")
        for prefix in (False, True)
    }
    assert steps["record", False] == steps["record", True] == [1, 2, 3, 4, 5, 6]
    assert steps["evaluation", False] == [3, 6] and steps["evaluation", True] == [6]
    assert [call[1:] for call in heard.calls if call[0] == "samples"] == [(3, 2), (6, 2)]
    saved = [call[1:] for call in heard.calls if call[0] == "checkpoint"]
    folders = finished.run_dir / "checkpoints", finished.run_dir / "control" / "checkpoints"
    assert saved == [(step, folder / str(step)) for folder in folders for step in (1, 3, 6)]
    assert (heard.ended.status, heard.ended.reason) == ("done", None)
    assert list(heard.ended.table) == list(finished.rows)


@pytest.mark.floor
def test_an_interrupted_run_resumes_to_the_same_bits(finished, load_config, tmp_path, monkeypatch):
    config = load_config(tmp_path)
    step = ProgressLine.step

    def stop_after_four(self, number, scalars):
        step(self, number, scalars)
        if number == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "step", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        api.train(config)
    folder = tmp_path / "run"
    assert json.loads((folder / "RUN.json").read_text())["status"] == "stopped"
    monkeypatch.undo()
    heard = Heard()
    api.resume(folder, callbacks=[heard])
    assert heard.began.step == 3 and heard.ended.status == "done"
    assert [call[1] for call in heard.calls if call[0] == "record"] == [4, 5, 6]
    whole = arrays(finished.run_dir, 6)
    again = arrays(folder, 6)
    assert whole.keys() == again.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name], err_msg=name)
    assert losses(folder) == losses(finished.run_dir)


def test_resuming_a_finished_run_trains_and_measures_nothing(finished, capsys, monkeypatch):
    before = arrays(finished.run_dir, 6)
    records = (finished.run_dir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(run_table.RunTable, "_measure", None)
    again = api.resume(finished.run_dir)
    assert "is finished, all 6 steps" in capsys.readouterr().err
    assert (finished.run_dir / "metrics.jsonl").read_bytes() == records
    for name, value in arrays(finished.run_dir, 6).items():
        np.testing.assert_array_equal(value, before[name])
    assert again.rows == finished.rows
    assert again.metrics == pytest.approx(finished.metrics)


def _copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished.run_dir, tmp_path / "copy"))


@pytest.mark.parametrize("part", ["", "control"])
def test_a_finished_run_without_checkpoints_is_not_begun_anew(finished, tmp_path, part):
    run = _copy(finished, tmp_path)
    if part == "control":  # as in a run that was killed while its control was trained
        record = json.loads((run / "RUN.json").read_text())
        saved = record["saved"] | {"control": 1}
        (run / "RUN.json").write_text(json.dumps(record | {"saved": saved}))
    else:
        shutil.rmtree(run / "checkpoints")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "LOCK"}
    with pytest.raises(DamagedError, match="from step 1 on.*--from-start"):
        api.resume(run)
    assert {p: p.read_bytes() for p in before} == before


def test_a_resumed_run_stays_where_it_is_and_never_goes_back_by_itself(finished, tmp_path):
    run = _copy(finished, tmp_path)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "LOCK"}
    for override, words in (
        ("train.steps=3", "the run has come to step 6: to go back"),
        ("run.dir=elsewhere", "stays where it is"),
        ("train.steps=many", "train.steps"),
    ):
        with pytest.raises(ConfigError, match=words):
            api.resume(run, [override])
        assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("override", ["optimizer.lr=0.5", "train.batch_size=16"])
def test_a_finished_run_does_not_take_settings_that_no_step_would_use(finished, tmp_path, override):
    """Else its configuration, and its control, would be those of another training."""
    run = _copy(finished, tmp_path)
    names = "config.resolved.yaml", "fingerprints.json", "table.json", "metrics.jsonl"
    before = {name: (run / name).read_bytes() for name in names}
    with pytest.raises(ConfigError, match=f"none would use the new {override.partition('=')[0]}"):
        api.resume(run, [override])
    assert {name: (run / name).read_bytes() for name in names} == before
    assert json.loads((run / "RUN.json").read_text())["status"] == "done"


def test_random_models_end_their_texts_and_are_as_wide_as_told(load_config, tmp_path):
    random = "{random: {layers: 2, embed: 32, mlp: 48, heads: 4, initializer_range: 0.125}}"
    for config in (load_config(tmp_path), load_config(tmp_path, f"student={random}")):
        made = models_of(config, setup.mesh_of(config))
        ends = (made.tokenizer.eos_token_id,)
        assert made.teacher.config.eos_ids == made.student.config.eos_ids == ends
    assert np.std(made.student.params["embedding"]) == pytest.approx(0.125, rel=0.05)
    assert np.std(made.teacher.params["embedding"]) == pytest.approx(0.02, rel=0.05)


def test_the_student_begins_as_the_layers_it_keeps(load_config, tmp_path):
    config = load_config(tmp_path)
    made = models_of(config, setup.mesh_of(config))
    assert made.student.config.layers == 2
    pairs = zip(
        jax.tree.leaves(made.student.params["layers"]),
        jax.tree.leaves(made.teacher.params["layers"]),
        strict=True,
    )
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs[np.array([0, 2])])
    np.testing.assert_array_equal(
        made.student.params["embedding"], made.teacher.params["embedding"]
    )
    assert _buffers(made.student.params["embedding"]).isdisjoint(
        _buffers(made.teacher.params["embedding"])
    )


def test_a_student_keeps_how_its_teacher_is_drawn_from(load_config, tmp_path):
    """Also one that is read from a folder; a random one has nothing to keep."""
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    shape = models.DecoderConfig("llama", 259, 32, 48, 4, 4, 2, 8)
    made = models.random(shape, tokenizer=byte_tokenizer())
    source = models.save(dataclasses.replace(made, generation=settings), tmp_path / "model")
    ways = {
        "{from: teacher, every: 2}": settings,
        f"{{source: {source}}}": settings,
        "{random: {like: teacher, layers: 1}}": {},
    }
    for number, (student, expected) in enumerate(ways.items()):
        config = load_config(tmp_path, f"teacher={{source: {source}}}", f"student={student}")
        parts = participants.shapes_of(config, setup.make_mesh(fsdp=-1))
        run = RunDir(tmp_path / str(number), {})
        student_folder.keep(run, parts, states.adapters_of(config.student))
        assert huggingface.folder_generation(run.path / STUDENT) == expected
        assert parts.student.generation == expected


def test_an_exported_run_opens_with_equal_logits(finished, tmp_path):
    out = api.export(f"{finished.run_dir}@latest", tmp_path / "out")
    tokens = np.arange(20)[None] % 250
    exported, trained = models.load(out), api.load(str(finished.run_dir))
    jax.tree.map(np.testing.assert_array_equal, exported.params, jax.device_get(trained.params))
    # One of them lies on eight devices, whose sums are added in another order.
    np.testing.assert_allclose(exported.logits(tokens), trained.logits(tokens), atol=2e-6)
    assert exported.tokenizer("abc")["input_ids"] == trained.tokenizer("abc")["input_ids"]


def test_eval_measures_a_run_against_a_teacher(finished, data):
    run = str(finished.run_dir)
    text = commands.Evaluate(
        data=[f"{data}/eval.txt"], format="paragraphs", seq_len=32, cache_dir=f"{data}/cache"
    )
    alone = api.evaluate(run, text)
    against = api.evaluate(run, text, teacher=run)
    assert "eval/kl_t1" not in alone
    np.testing.assert_allclose(against["eval/kl_t1"], 0, atol=1e-6)
    assert against["eval/agree_top1"] == 1
    np.testing.assert_allclose(alone["eval/perplexity"], against["eval/perplexity"], rtol=1e-6)


def test_a_run_folder_in_use_is_left_as_it_is(finished, load_config):
    before = (finished.run_dir / "RUN.json").read_bytes()
    config = load_config(finished.run_dir.parent)
    with pytest.raises(ConfigError, match="jaxdistill resume"):
        api.train(config)
    assert (finished.run_dir / "RUN.json").read_bytes() == before


def test_two_processes_cannot_hold_one_run(finished):
    run = running.RunDir.open(finished.run_dir)
    with run.held(), pytest.raises(ConfigError, match="being written by process"):
        api.resume(finished.run_dir)


def test_changed_data_is_refused_on_resume(load_config, data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy, ignore=shutil.ignore_patterns("cache"))
    config = load_config(tmp_path, f"data.train=[{{path: {copy}/train.txt, format: paragraphs}}]")
    folder = api.train(config).run_dir
    (copy / "train.txt").write_text((copy / "train.txt").read_text() + "!")
    with pytest.raises(ConfigError, match=r"data\.train"):
        api.resume(folder)


def test_other_vocabularies_are_refused_before_anything_is_written(
    finished, load_config, tmp_path, tmp_path_factory
):
    other = api.export(str(finished.run_dir), tmp_path_factory.mktemp("other") / "model")
    (other / sums.FILE).unlink()
    words = json.loads((other / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["q"], vocab["z"] = vocab["z"], vocab["q"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    config = load_config(
        tmp_path,
        f"teacher={{source: {finished.run_dir}, dtype: float32}}",
        f"student={{source: {other}}}",
        "tokenizer.from=teacher",
    )
    with pytest.raises(
        MismatchError,
        match=r"student: \d+ of \d+ tokens of data.train \(.*'q'.*tokenizer.from: student",
    ):
        api.train(config)
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_model_was_made_for_are_refused(finished, load_config, tmp_path):
    config = load_config(
        tmp_path, f"teacher={{source: {finished.run_dir}, dtype: float32}}", "data.seq_len=4096"
    )
    with pytest.raises(ConfigError, match="made for 2048 positions"):
        api.train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mesh.fsdp=1"], "does not divide the 8 devices"),
        (["train.batch_size=12"], r"of mesh.data \* mesh.fsdp \* mesh.expert \(8\)"),
        (["student={from: teacher, layers: [1, 7]}"], "layers"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    load_config, tmp_path, overrides, words
):
    with pytest.raises(ConfigError, match=words):
        api.train(load_config(tmp_path, *overrides))
    assert not (tmp_path / "run").exists()


def test_a_device_without_room_ends_the_run_in_one_message(load_config, tmp_path):
    class Full(Hooks):
        def at(self, point):
            if point == "step.before":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with pytest.raises(FitError, match="memory of a device is full.*micro_batches"):
        api.train(load_config(tmp_path), hooks=Full())
    record = json.loads((tmp_path / "run" / "RUN.json").read_text())
    assert record["status"] == "failed"
    assert "memory of a device is full" in json.dumps(record)


def test_numbers_that_stay_bad_end_the_run_and_keep_the_last_checkpoint(
    load_config, tmp_path, monkeypatch
):
    original = stages.Staged._params

    def poisoned(step, stage):
        return jax.tree.map(lambda leaf: leaf * np.nan, original(step, stage))

    config = load_config(tmp_path, "guards.nonfinite.max_consecutive=2", "train.eval_every=null")
    monkeypatch.setattr(stages.Staged, "_params", poisoned)
    with pytest.raises(
        DivergedError, match=r"step 1 \(rows 32 to 39\).*2 rollbacks are spent"
    ) as error:
        api.train(config)
    assert error.value.exit_code == 7
    record = json.loads((tmp_path / "run" / "RUN.json").read_text())
    assert record["status"] == "failed" and "rows 32" in record["exit_reason"]


def test_checkpoints_hold_everything_that_moves(finished):
    with Checkpoints(finished.run_dir / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1, 3, 6]
    names = set(arrays(finished.run_dir, 6))
    for part in ("step", "key", "skipped"):
        assert part in names
    assert any("params/student" in name for name in names)
    assert any("temperature" in name for name in names), "knobs are optimizer state"
    assert not any("teacher" in name for name in names)


def test_a_run_reads_shapes_and_data_once_and_compiles_its_evaluation_once(
    load_config, tmp_path, monkeypatch
):
    calls = collections.Counter()
    made, make_step = [], meter.make_step

    def counted(name, function):
        def call(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(shapes, "of", counted("shapes", shapes.of))
    monkeypatch.setattr(fingerprint, "fingerprint", counted("data", fingerprint.fingerprint))
    monkeypatch.setattr(
        meter, "make_step", lambda *parts: made.append(make_step(*parts)) or made[-1]
    )
    loaded = load_config(tmp_path, "train.steps=1", "optimizer.warmup=0", "train.eval_every=null")
    api.train(loaded)
    assert calls == {"shapes": 1, "data": 2}  # training and held-out rows
    # Before the first step the temperature is a number, behind it an array of the state.
    assert [program._cache_size() for program in made] == [1]
