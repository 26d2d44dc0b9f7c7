"""Checks after reading say where in the file, or in which override, their key stands."""

import pytest

from jaxdistill import api, config
from jaxdistill.config import preflight
from jaxdistill.errors import ConfigError, DataError, UserError

TEXT = """
version: 1
run: {{dir: {folder}/run}}
teacher: {{random: {{layers: 2, embed: 8, mlp: 8, heads: 1}}}}
student: {{from: teacher, every: 2}}
tokenizer: {{from: bytes}}
data:
  train:
    - {{path: {folder}/gone.txt}}
  eval: [{{path: {folder}/there.txt}}]
  seq_len: 16
method: {{name: kd}}
train:
  steps: 4
  batch_size: 12
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "there.txt").write_text("some words")
    text = TEXT.format(folder=tmp_path)
    return lambda *overrides: config.loads(text, "my.yaml", overrides)


def test_a_missing_file_is_reported_with_its_line(load):
    (error,) = preflight.check(load())
    assert isinstance(error, DataError)
    assert str(error).startswith("my.yaml:9:8: data.train.0.path = ")


def test_what_came_from_an_override_is_reported_with_it(load, tmp_path):
    (error,) = preflight.check(load(f"data.train.0.path={tmp_path}/lost.txt"))
    assert str(error).startswith('override "data.train.0.path=') and "my.yaml" not in str(error)


def test_a_start_says_where_its_rules_are_broken(load, tmp_path):
    (tmp_path / "other.txt").write_text("other words")
    loaded = load(f"data.train.0.path={tmp_path}/other.txt", "eval.batch_size=8")
    with pytest.raises(ConfigError, match=r"(?m)^my\.yaml:15:3: train\.batch_size: "):
        api.train(loaded)
    assert not (tmp_path / "run").exists()


def test_where_it_stands_is_no_part_of_what_it_says(load, tmp_path):
    loaded = load()
    assert config.loads(config.dump(loaded)) == loaded
    changed = loaded.model_copy(update={"seed": 5})
    assert changed.written.of(("train", "steps")) == "my.yaml:14:3"
    assert changed.written.of(("data", "train", 0, "path")) == "my.yaml:9:8"
    assert changed.written.of(("optimizer",)) is None


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("train.steps = 4: no", "my.yaml:14:3: train.steps = 4: no"),
        ("train.log_every: no", "my.yaml:13:1: train.log_every: no"),
        ("optimizer.lr: no", "optimizer.lr: no"),
        ("a run: no", "a run: no"),
        ("my.yaml:14:3: train.steps = 4: no", "my.yaml:14:3: train.steps = 4: no"),
        ("first\ndata.seq_len: no", "first\nmy.yaml:11:3: data.seq_len: no"),
    ],
)
def test_lines_that_begin_with_a_key_get_its_place(load, message, told):
    error = UserError(message)
    with pytest.raises(UserError) as caught, load().written.told():
        raise error
    assert caught.value is error and str(error) == told
