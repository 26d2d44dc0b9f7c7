"""`extends`: the rules of merging, places of errors in two files, bounds, what `init` writes."""

import os
import pathlib
import re

import jsonschema
import pytest

from jaxdistill import config
from jaxdistill.config import editor, inherit, workflow
from jaxdistill.errors import ConfigError

RECIPES = [
    pytest.param(path, id=name)
    for name, path in inherit.recipes().items()
    if not workflow.is_workflow(path.read_text())
]

BASE = """\
teacher: {source: big, dtype: float32}
student:
  from: teacher
  layers: [0, 1]
data:
  train: [{path: a.jsonl}, {path: b.jsonl}]
  eval: [{path: c.jsonl}]
  seq_len: 64
method: {name: kd, alpha: 0.2, temperature: 3.0}
optimizer: {lr: 1e-4, schedule: cosine}
train: {steps: 100, batch_size: 4, eval_every: null}
checkpoint: {every: {steps: 20}, keep: {latest: 3}}
"""


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """Loads a text that extends BASE, from another folder than the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text(BASE)

    def load(text, overrides=()):
        (tmp_path / "deep" / "mine.yaml").write_text(f"extends: ./base.yaml\n{text}")
        return config.load("deep/mine.yaml", overrides)

    return load


def errors(load, *arguments):
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return str(caught.value).splitlines()


def test_sections_merge_key_by_key_and_lists_are_replaced(extended):
    loaded = extended(
        "data: {train: [{path: d.jsonl}]}\ntrain: {steps: 7}\ncheckpoint: {every: {minutes: 3}}"
    )
    assert [source.path for source in loaded.data.train] == ["d.jsonl"]
    assert (loaded.data.seq_len, loaded.data.eval[0].path) == (64, "c.jsonl")
    assert (loaded.train.steps, loaded.train.batch_size, loaded.train.eval_every) == (7, 4, None)
    assert (loaded.checkpoint.every.steps, loaded.checkpoint.every.minutes) == (20, 3.0)
    assert loaded.checkpoint.keep.latest == 3


def test_another_method_replaces_the_section_and_the_same_merges(extended):
    assert extended("method: {name: taid}").method.alpha != 0.2
    assert not hasattr(extended("method: {name: taid}").method, "temperature")
    for text in ("method: {alpha: 0.5}", "method: {name: kd, alpha: 0.5}"):
        assert extended(text).method.temperature == 3.0
        assert extended(text).method.alpha == 0.5


def test_another_model_replaces_the_section_and_the_same_choice_merges(extended):
    student = extended("student: {source: small}").student
    assert (student.source, student.from_, student.layers) == ("small", None, None)
    assert extended("student: {from: teacher, every: 2, layers: null}").student.every == 2
    assert extended("student: {compute_dtype: bfloat16}").student.layers == (0, 1)
    assert extended("teacher: {source: other}").teacher.dtype == "float32"


def test_null_is_a_value_and_removes_a_section(extended):
    assert extended("optimizer: null").optimizer == config.Config.model_fields[
        "optimizer"
    ].get_default(call_default_factory=True)
    assert extended("train: {batch_size: null}\n" and "train: {steps: 9}").train.eval_every is None
    sft = "method: {name: sft}\nstudent: {source: s}\ntokenizer: {from: student}\nteacher: null"
    assert extended(sft).teacher is None


def test_overrides_come_last(extended):
    assert extended("train: {steps: 7}", ["train.steps=8", "data.train.1.path=x"]).train.steps == 8


def test_a_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = config.loads("extends: quickstart\ntrain: {steps: 3}")
    whole = config.load(inherit.recipes()["quickstart"])
    assert loaded == whole.model_copy(update={"train": loaded.train})
    assert loaded.train == whole.train.model_copy(update={"steps": 3})
    assert "extends" not in config.dump(loaded)
    assert config.loads(config.dump(loaded)) == loaded


def test_errors_point_into_the_file_and_line_that_they_are_about(extended, tmp_path):
    (tmp_path / "deep" / "base.yaml").write_text(BASE.replace("seq_len: 64", "seq_len: 1"))
    found = errors(extended, "optimizer: {lr: 20}\ntrain:\n  stesp: 3")
    assert [line.split(": ")[0] for line in found] == [
        "deep/mine.yaml:2:13",
        "deep/mine.yaml:4:3",
        "deep/base.yaml:8:3",
    ]
    assert 'did you mean "steps"?' in found[1]
    found = errors(extended, "data: {seq_len: 2}\nmethod: {name: kd, skew: 1}", ["train.steps=x"])
    assert [re.split(r": (?=\w+\.)", line)[0] for line in found] == [
        "deep/mine.yaml:3:20",
        'override "train.steps=x"',
    ]


def test_a_fault_of_the_bases_text_is_told_with_its_file(extended, tmp_path):
    (tmp_path / "deep" / "base.yaml").write_text(BASE + "seed: [1\n")
    assert errors(extended, "seed: 3")[0].startswith("deep/base.yaml:14:1: not valid YAML")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("./absent.yaml", "cannot read this configuration: No such file"),
        ("quikstart", 'is no recipe; did you mean "quickstart"?'),
        ("'a b'", "is no recipe; `jaxdistill ls recipes` lists them"),
        ("[quickstart]", "must be a recipe's name or a path"),
        ("''", "must be a recipe's name or a path"),
        ("./", "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        ("compress_smollm2", "is a workflow"),
        ("./conf.yaml", "a circle: conf.yaml -> conf.yaml"),
    ],
)
def test_a_base_that_cannot_be_used(tmp_path, monkeypatch, wanted, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf.yaml").write_text(text := f"seed: 3\nextends: {wanted}\n")
    (line,) = errors(config.loads, text, "conf.yaml")
    assert line.startswith("conf.yaml:2:1: extends = ")
    assert message in line


def test_a_circle_and_a_long_chain_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.yaml").write_text("extends: ./b.yaml\n")
    pathlib.Path("b.yaml").write_text("extends: ./a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in errors(config.load, "a.yaml")[0]
    for i in range(30):
        pathlib.Path(f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    assert "more than 8 files extend one another" in errors(config.load, "0.yaml")[0]
    pathlib.Path("7.yaml").write_text(BASE)
    assert config.load("0.yaml") == config.loads(BASE)


def test_an_override_cannot_extend():
    found = errors(config.loads, BASE, "conf.yaml", ["extends=quickstart"])
    assert found == ['override "extends=quickstart": extends belongs into the file']


@pytest.mark.parametrize("path", RECIPES)
def test_init_writes_a_whole_file(path):
    text = inherit.flattened(path)
    assert "extends:" not in text
    assert config.loads(text) == config.load(path)
    head = re.match(r"(#.*\n)+", path.read_text())[0]
    assert text.startswith(head)


def test_a_whole_file_keeps_the_comments_of_both():
    text = inherit.flattened(inherit.recipes()["taid"])
    assert "the paper's step size" in text
    assert "leaving out 12 to 19" in text
    assert text.count("\nmethod:") == 1


def test_a_sections_key_is_known_to_explain_and_schema():
    assert config.explain("extends").startswith("extends: text\n")
    schema = editor.json_schema()
    assert "extends" in schema["properties"]
    assert {"required": ["extends"]} in schema["anyOf"]
    assert "extends" not in config.Config.model_fields


def test_the_schema_takes_files_that_leave_things_to_their_base():
    check = jsonschema.Draft202012Validator(editor.json_schema()).is_valid
    assert check({"extends": "quickstart", "method": {"alpha": 0.5}, "train": {"batch_size": 8}})
    assert not check({"train": {"steps": 8}})
    assert not check({"extends": "quickstart", "train": {"stesp": 8}})


def test_hostile_bases_are_bounded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = "a: &a [1, 2]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n"
        for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
    pathlib.Path("bomb.yaml").write_text(bomb)
    pathlib.Path("mine.yaml").write_text("extends: bomb.yaml\n")
    assert any("aliases make this too large" in line for line in errors(config.load, "mine.yaml"))
    with open("huge.yaml", "wb") as file:
        file.truncate(10**12)
    pathlib.Path("mine.yaml").write_text("extends: huge.yaml\n")
    assert any("larger than 256 KiB" in line for line in errors(config.load, "mine.yaml"))
    os.mkfifo("pipe.yaml")
    pathlib.Path("mine.yaml").write_text("extends: pipe.yaml\n")
    assert any("not a regular file" in line for line in errors(config.load, "mine.yaml"))
