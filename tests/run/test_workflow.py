"""A whole workflow on tiny models: its steps, what is skipped, what is made again, its page."""

import json
import os

import numpy as np
import pytest

from jaxdistill import api, cli, models
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.report import ProgressLine, write_story
from jaxdistill.run import workflow as workflows

pytest.importorskip("qwix", reason="needs qwix (pip install 'jaxdistill[quant]')")

pytestmark = pytest.mark.usefixtures("plain_runs")

FILE = """
version: 1
name: tiny
dir: {folder}/out
base:
  data:
    train: [{{path: {data}/train.txt, format: paragraphs}}]
    eval: [{{path: {data}/eval.txt, format: paragraphs}}]
    seq_len: 32
    cache_dir: {data}/cache
  tokenizer: {{from: student}}
  optimizer: {{lr: 1e-2, warmup: 1, weight_decay: 0.0}}
  train: {{steps: 2, batch_size: 8, eval_every: null, log_every: 1}}
  checkpoint: {{every: {{steps: 1}}}}
  logging: {{progress: none, tensorboard: false}}
  eval: {{max_rows: 8, samples: 0}}
steps:
  - name: correct
    kind: train
    config:
      student: {{source: {teacher}, compute_dtype: float32}}
      method: {{name: sft}}
  - name: scores
    kind: importance
    model: "${{correct}}@latest"
    data: [{data}/train.txt]
    rows: 8
    seq_len: 32
    without: [1]
  - name: cut
    kind: prune
    model: "${{correct}}@latest"
    importance: "${{scores}}"
    mlp: 64
    layers: 2
  - name: sft
    kind: train
    config: {{student: {{source: "${{cut}}", compute_dtype: float32}}, method: {{name: sft}}}}
  - name: kd
    kind: train
    seeds: [1, 2]
    config:
      teacher: {{source: "${{correct}}@latest", dtype: float32}}
      student: {{source: "${{cut}}", compute_dtype: float32}}
      method: {{name: kd, alpha: 0.0}}
  - {{name: int8, kind: quantize, model: "${{kd}}@latest", scheme: int8}}
  - name: table
    kind: compare
    teacher: "${{correct}}@latest"
    models: {{pruned: "${{cut}}", SFT: "${{sft}}@latest", KD: "${{kd}}@latest", int8: "${{int8}}"}}
    contrast: [KD, SFT]
    data: [{data}/eval.txt]
    seq_len: 32
    prompts: ["the <b>quick"]
    repeats: 2
    prompt_tokens: 8
    new_tokens: 2
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from jaxdistill.models.byte_tokenizer import byte_tokenizer

    shape = models.DecoderConfig("llama", 259, 32, 128, 3, 4, 2, 8)
    return models.save(
        models.random(shape, tokenizer=byte_tokenizer()), tmp_path_factory.mktemp("t") / "model"
    )


@pytest.fixture(scope="module")
def flow(teacher, data, tmp_path_factory):
    """The file of a workflow that has run once."""
    folder = tmp_path_factory.mktemp("flow")
    file = folder / "flow.yaml"
    file.write_text(FILE.format(folder=folder, data=data, teacher=teacher))
    notices = []
    api.run_workflow(file, notice=notices.append)
    assert sum("not run yet" in text for text in notices) == 7
    return file


def actions(file, start=None):
    return {one.step.name: one.action for one in api.workflow_plan(file, start)}


def state(file):
    return json.loads((file.parent / "out" / "workflow.json").read_text())


def test_everything_is_there(flow):
    out = flow.parent / "out"
    small = models.load(out / "cut")
    assert (small.config.layers, small.config.mlp) == (2, 64)
    assert models.load(out / "int8").params["layers"]["mlp"]["up"]["kernel"].values.dtype == "int8"
    rows = json.loads((out / "table" / "comparison.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["pruned", "SFT", "KD", "int8"]
    assert [row["seeds"] for row in rows] == [1, 1, 2, 1] and rows[2]["spread"]["kl_t1"] >= 0
    assert all(step["status"] == "done" for step in state(flow)["steps"].values())


def test_the_page_tells_the_story_and_loads_nothing(flow):
    page = (flow.parent / "out" / "report.html").read_text()
    for words in ("KL to the teacher: KD", "Layer importance", "Reliability", "±", "correct"):
        assert words in page, words
    assert (
        page.count("<svg") >= 3
        and "<script" not in page
        and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    )
    assert "the <b>quick" not in page and "the &lt;b&gt;quick" in page


def test_a_second_run_does_nothing(flow):
    before = {p: os.stat(p).st_mtime_ns for p in (flow.parent / "out").rglob("*.safetensors")}
    notices = []
    api.run_workflow(flow, notice=notices.append)
    assert sum("unchanged" in text for text in notices) == 7
    for path, time in before.items():
        assert os.stat(path).st_mtime_ns == time


def test_what_is_due_follows_from_what_changed(flow, tmp_path, data):
    text = flow.read_text()
    changed = tmp_path / "changed.yaml"
    changed.write_text(text.replace("scheme: int8}", "scheme: int8_dynamic}"))
    assert {n for n, a in actions(changed).items() if a != "skip"} == {"int8", "table"}
    below = tmp_path / "more" / "deep" / "a.txt"
    below.parent.mkdir(parents=True)
    for name in (f"{tmp_path}/more", f"{tmp_path}/more/*/*.txt", f"{below}?kind=number"):
        below.write_text("one")
        before = workflows._identity(name)
        assert before == workflows._identity(name) is not None
        below.write_text("two")
        assert workflows._identity(name) != before, name
    changed.write_text(text.replace("layers: 2", "layers: 1"))
    due = {"cut", "sft", "kd", "int8", "table"}
    assert {n for n, a in actions(changed).items() if a != "skip"} == due
    assert {n for n, a in actions(flow, "kd").items() if a != "skip"} == {"kd", "int8", "table"}
    with pytest.raises(ConfigError, match="--from colour: no such step"):
        actions(flow, "colour")
    # A file that a step names is part of its identity.
    held_out = data / "eval.txt"
    whole = held_out.read_text()
    held_out.write_text(whole + "\n\none more.")
    try:
        assert actions(flow)["table"] == "run" and actions(flow)["scores"] == "run"
    finally:
        held_out.write_text(whole)
    assert set(actions(flow).values()) == {"skip"}


def test_a_stopped_step_goes_on_and_nothing_is_lost(teacher, data, tmp_path, monkeypatch):
    file = tmp_path / "flow.yaml"
    text = FILE.format(folder=tmp_path, data=data, teacher=teacher)
    steps = text.index("  - name: scores")
    file.write_text(text[:steps])
    step = ProgressLine.step

    def stop(self, number, scalars):
        step(self, number, scalars)
        if number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressLine, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        api.run_workflow(file)
    monkeypatch.undo()
    assert state(file)["steps"]["correct"]["status"] == "stopped"
    assert actions(file) == {"correct": "resume"}
    write_story(tmp_path / "out")  # a page can be made at any time
    api.run_workflow(file)
    record = json.loads((tmp_path / "out" / "correct" / "RUN.json").read_text())
    assert record["status"] == "done" and len(record["attempts"]) == 2
    # A changed step makes room: the old output stays, aside.
    file.write_text(text[:steps].replace("steps: 2,", "steps: 3,"))
    api.run_workflow(file)
    assert (tmp_path / "out" / "replaced" / "correct-1" / "RUN.json").is_file()
    assert json.loads((tmp_path / "out" / "correct" / "RUN.json").read_text())["step"] == 3


def test_a_failed_step_keeps_those_before_it(teacher, data, tmp_path, capsys):
    file = tmp_path / "flow.yaml"
    text = FILE.format(folder=tmp_path, data=data, teacher=teacher)
    file.write_text(text.replace("    rows: 8\n", "    rows: 80000\n"))
    assert cli.main(["workflow", str(file)]) == 3
    assert "80000 are wanted" in capsys.readouterr().err
    assert actions(file)["correct"] == "skip" and actions(file)["scores"] == "run"


def test_a_dry_run_changes_nothing(teacher, data, tmp_path, capsys):
    file = tmp_path / "flow.yaml"
    file.write_text(FILE.format(folder=tmp_path, data=data, teacher=teacher))
    assert cli.main(["workflow", str(file), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(line.startswith("run ") for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kind: quantize", "kind: quantise", "must be one of train, generate, importance"),
        ("scheme: int8}", "shceme: int8}", 'did you mean "scheme"'),
        ('model: "${{kd}}@latest"', 'model: "${{kdd}}@latest"', "is no earlier step"),
        ("name: int8, kind", "name: kd, kind", "is the name of an earlier step"),
        ("contrast: [KD, SFT]", "contrast: [KD, other]", "is none of the models"),
        ("alpha: 0.0", "alpha: 2.0", "step kd: method.alpha = 2.0"),
        ("mlp: 64", "mlp: 0", "greater than or equal to 1"),
        ("version: 1", "version: 2", "less than or equal to 1"),
    ],
)
def test_mistakes_are_told_before_anything_runs(teacher, data, tmp_path, old, new, words):
    assert old in FILE
    file = tmp_path / "flow.yaml"
    file.write_text(FILE.replace(old, new).format(folder=tmp_path, data=data, teacher=teacher))
    with pytest.raises(ConfigError, match=words):
        api.workflow_plan(file)
    assert not (tmp_path / "out").exists()


def test_damaged_and_missing_state_is_told(flow, tmp_path):
    with pytest.raises(DataError, match="holds no workflow"):
        write_story(tmp_path)
    file = flow.parent / "out" / "workflow.json"
    kept = file.read_text()
    file.write_text(kept[:40])
    with pytest.raises(ConfigError, match="is damaged"):
        workflows.plan(flow)
    file.write_text(kept)


def test_an_output_that_is_gone_is_made_again_and_so_is_what_uses_it(flow):
    out = flow.parent / "out"
    (out / "cut").rename(out / "elsewhere")
    try:
        due = {name for name, action in actions(flow).items() if action != "skip"}
        assert due == {"cut", "sft", "kd", "int8", "table"}
    finally:
        (out / "elsewhere").rename(out / "cut")


GENERATE = """
version: 1
name: asking
dir: {folder}/out
steps:
  - name: asked
    kind: generate
    config:
      teacher: {{source: "{teacher}", dtype: float32}}
      task: {folder}/questions.jsonl
      prompt: {{style: plain}}
      sampling: {{samples: 1, max_new_tokens: 4}}
      forms: [sequence_kd]
  - name: taught
    kind: train
    config:
      student: {{source: "{teacher}", compute_dtype: float32}}
      tokenizer: {{from: student}}
      data:
        train: [{{path: "${{asked}}/train_sequence_kd.jsonl"}}]
        eval: [{{path: {data}/eval.txt, format: paragraphs}}]
        seq_len: 32
        cache_dir: {data}/cache
      method: {{name: sft}}
      train: {{steps: 1, batch_size: 2, eval_every: null}}
      logging: {{progress: none, tensorboard: false}}
      eval: {{max_rows: 4, samples: 0}}
"""


def test_a_model_is_asked_and_another_learns_from_it(teacher, data, tmp_path):
    lines = [json.dumps({"question": f"{n} + 1", "answer": str(n + 1)}) for n in range(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "flow.yaml"
    path.write_text(GENERATE.format(folder=tmp_path, teacher=teacher, data=data))
    api.run_workflow(path, notice=lambda text: None)
    state = json.loads((tmp_path / "out" / "workflow.json").read_text())["steps"]
    assert [state[name]["status"] for name in ("asked", "taught")] == ["done", "done"]
    assert state["asked"]["found"]["samples"] == 3
    assert [one.action for one in workflows.plan(path)] == ["skip", "skip"]
    path.write_text(path.read_text().replace("samples: 1,", "samples: 2,"))
    assert [one.action for one in workflows.plan(path)] == ["run", "run"]
    path.write_text(path.read_text().replace("forms:", "output: x\n      forms:"))
    with pytest.raises(ConfigError, match="the step's own folder"):
        workflows.plan(path)


SPARSE = """
dir: {folder}/out
steps:
  - name: scores
    kind: importance
    model: {teacher}
    data: [{data}/train.txt]
    rows: 8
    seq_len: 32
  - {{name: plain, kind: sparsify, model: {teacher}, sparsity: "2:4"}}
  - {{name: wanda, kind: sparsify, model: {teacher}, sparsity: "2:4", importance: "${{scores}}"}}
  - {{name: rounded, kind: quantize, model: "${{wanda}}", scheme: int8}}
"""


def test_a_model_becomes_sparse_and_is_rounded_after(teacher, data, tmp_path):
    file = tmp_path / "flow.yaml"
    file.write_text(SPARSE.format(folder=tmp_path, teacher=teacher, data=data))
    api.run_workflow(file)
    kernels = {}
    for name in ("plain", "wanda"):
        params = models.load(tmp_path / "out" / name, tokenizer=False).params
        kernels[name] = np.asarray(params["layers"]["mlp"]["up"]["kernel"])
        layers, inputs, outputs = kernels[name].shape
        groups = kernels[name].reshape(layers, inputs // 4, 4, outputs)
        np.testing.assert_array_equal((groups == 0).sum(2), 2)
    assert not np.array_equal(*kernels.values()), "the scores count"
    held = models.load(tmp_path / "out" / "rounded", tokenizer=False).params
    values = held["layers"]["mlp"]["up"]["kernel"].values
    assert np.all(np.asarray(values)[kernels["wanda"] == 0] == 0)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{name: a, kind: prune, model: m, importance: i, sparsity: 50%}", "kind: sparsify"),
        ("{name: a, kind: sparsify, model: m}", "sparsity"),
        ("{name: a, kind: sparsify, model: m, sparsity: 3:4}", "sparsity"),
        ("{name: a, kind: sparsify, model: m, sparsity: 50%, mlp: 8}", "leaves sizes as they are"),
    ],
)
def test_smaller_and_sparse_are_two_steps(step, words, tmp_path):
    file = tmp_path / "flow.yaml"
    file.write_text(f"dir: {tmp_path}/out\nsteps: [{step}]\n")
    with pytest.raises(ConfigError, match=words):
        workflows.Runner(file)
