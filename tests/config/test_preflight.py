import json
import os

import pytest

from jaxdistill import config, errors, rules
from jaxdistill.config import model_files, preflight
from jaxdistill.errors import ConfigError, DataError, MismatchError, ModelError

LLAMA = {"model_type": "llama", "num_hidden_layers": 4, "max_position_embeddings": 64}


def tokenizer(*words, added=("<end>",)):
    return {
        "model": {"vocab": {word: i for i, word in enumerate(words)}},
        "added_tokens": [{"id": len(words) + i, "content": word} for i, word in enumerate(added)],
    }


def model_folder(path, shape=LLAMA, words=None, weights="model.safetensors"):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(shape))
    if weights:
        (path / weights).write_bytes(b"")
    if words:
        (path / "tokenizer.json").write_text(json.dumps(words))
    return path


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder with everything a run needs, as the current directory."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "big", words=tokenizer("a", "b"))
    longer = LLAMA | {"max_position_embeddings": 128}
    model_folder(tmp_path / "small", longer, tokenizer("a", "b"))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    return tmp_path


TEXT = """\
teacher: {source: big}
student: {source: small}
data:
  train: [{path: a.jsonl}]
  eval: [{path: b.jsonl}]
  seq_len: 64
method: {name: kd}
train: {steps: 100}
"""


def check(*overrides):
    return preflight.check(config.loads(TEXT, overrides=overrides))


def test_a_complete_run_has_no_errors(base):
    assert check() == []


def test_a_teacher_that_reads_its_own_tokens_has_rows_of_its_own_length(base):
    model_folder(base / "stranger", words=tokenizer("x", "y"))
    given = ["teacher.source=stranger", "tokenizer.from=student", "data.seq_len=100"]
    assert check(*given, "method={name: alm, teacher_seq_len: 64}") == []
    (error,) = check(*given, "method={name: alm, teacher_seq_len: 65}")
    assert "made for 64 positions" in str(error)
    assert any("none of the tokenizer's" in str(error) for error in check(*given))


@pytest.mark.parametrize(
    ("override", "kind", "words"),
    [
        ("data.train.0.path=c.jsonl", DataError, 'data.train.0.path = "c.jsonl": no such file'),
        ("data.eval.0.path=big", DataError, "is a folder"),
        ("data.eval.0.path=data.bin", DataError, "cannot be read: use .jsonl"),
        ("data.eval.0.path=empty.txt", DataError, "the file is empty"),
        ('data.eval.0.path="python:docs?split=test"', DataError, "python:docs?split=train"),
        ("data.seq_len=65", ConfigError, "made for 64 positions"),
        ("teacher.source=bigger", ModelError, "no such file or folder"),
        ("teacher.source=org/name", ModelError, "security.allow_network: true"),
        ("teacher.source=a.jsonl", ModelError, "no model folder and no .gguf"),
        ("teacher.source=nothing", ModelError, "holds no config.json"),
        ("teacher.source=pickled", ModelError, "can run code when it is read"),
        ("teacher.source=broken", ModelError, "config.json: is not JSON"),
        ("teacher.source=list", ModelError, "must hold a JSON object"),
        (
            "teacher.source=other",
            MismatchError,
            "none of the tokenizer's ordinary tokens (different",
        ),
        ("teacher.source=package:no_such_package/x.gguf", ModelError, "is not installed"),
        ("teacher.source=package:jaxdistill/../../x", ModelError, "has no file"),
        ("teacher.source=package:jaxdistill", ModelError, "write it as package:NAME/FILE"),
        ("student={from: teacher, layers: [0, 4]}", ConfigError, "the teacher's layers are 0 to 3"),
        ("student={random: {like: nowhere}}", ModelError, "student.random.like"),
        ("tokenizer.from=nowhere", ModelError, "tokenizer.from"),
        ("run.dir=held", ConfigError, "jaxdistill resume held"),
        ("run.dir=big", ConfigError, "is not empty and holds no run"),
        ("run.dir=a.jsonl", ConfigError, "is a file"),
        ("run.dir=gs://bucket/run", ConfigError, "run.dir = gs://bucket/run: gs:// is no folder"),
        ("mesh={fsdp: 1, context: 3}", ConfigError, "must be a multiple of 2 * mesh.context = 6"),
        ("tokenizer={from: tokens, rows: 2}", ConfigError, "tokenizer.rows = 2: the tokenizer has"),
        (
            "student={random: {like: small, vocab_size: 2}}",
            ModelError,
            "student: its embedding has 2 rows, but the tokenizer's ids reach 2",
        ),
        (
            "student={random: {layers: 1, embed: 8, mlp: 8, heads: 2, vocab_size: 2}}",
            ModelError,
            "student: its embedding has 2 rows",
        ),
    ],
)
def test_what_is_found(base, override, kind, words):
    (base / "nothing").mkdir()
    (base / "held").mkdir()
    (base / "held" / "RUN.json").write_text("{}")
    (base / "data.bin").write_text("x")
    (base / "empty.txt").write_text("")
    model_folder(base / "pickled", weights="pytorch_model.bin")
    model_folder(base / "list", shape=[])
    model_folder(base / "other", words=tokenizer("c", "d"))
    model_folder(base / "tokens", {}, tokenizer("a", "b"), weights=None)
    for name in ("other", "small"):  # nothing but their content tells the two apart
        os.utime(base / name / "tokenizer.json", (1, 1))
    model_folder(base / "broken")
    (base / "broken" / "config.json").write_text("{" * 100_000)
    errors = check(override)
    assert [type(error) for error in errors] == [kind], errors
    assert words in str(errors[0])


@pytest.mark.parametrize(
    "override",
    [
        "teacher.source=weights.gguf",
        "teacher.source=held",
        "teacher.source=held@best",
        "teacher.source=padded",
        "teacher.source=sharded",
        "teacher.source=package:jaxdistill/__init__.gguf",
        "tokenizer.from=words",
        "run.dir=fresh",
        'data.train=[{path: "python:docs"}]',
        "security.allow_network=true",
    ],
)
def test_what_is_accepted(base, override, monkeypatch):
    (base / "weights.gguf").write_bytes(b"")
    (base / "held").mkdir()
    (base / "held" / "RUN.json").write_text("{}")
    (base / "words").mkdir()
    (base / "words" / "tokenizer.json").write_text(json.dumps(tokenizer("a", "b")))
    (base / "fresh").mkdir()
    # Rows of padding change the shape and not the vocabulary.
    model_folder(base / "padded", LLAMA | {"vocab_size": 128}, tokenizer("a", "b"))
    model_folder(base / "sharded", weights="model.safetensors.index.json")
    monkeypatch.setattr(
        model_files, "package_file", lambda source: base / "weights.gguf", raising=True
    )
    assert check(override) == []


def test_a_hub_name_passes_when_it_may_be_downloaded_or_is_in_the_cache(base, monkeypatch):
    assert check("teacher.source=org/name", "security.allow_network=true") == []
    assert len(check("teacher.source=hf:org/name")) == 1
    (base / "cache" / "models--org--name").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(base / "cache"))
    assert check("teacher.source=hf:org/name") == []


def test_package_files_are_found_without_importing_the_package(base, monkeypatch):
    package = base / "loud"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "model.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(str(base))
    assert model_files.package_file("package:loud/model.gguf") == package / "model.gguf"
    with pytest.raises(ModelError, match="has no file"):
        model_files.package_file("package:loud/../a.jsonl")


def test_a_long_path_is_an_error_and_no_crash(base):
    assert [type(error) for error in check(f"teacher.source={'x' * 1000}")] == [ModelError]
    assert [type(error) for error in check(f"data.train.0.path={'x' * 1000}")] == [DataError]


def test_what_a_start_would_refuse_of_the_shapes_is_said_already(base):
    """The sentences are those of `rules`, which a start asks with the loaded models."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 12}
    shape = LLAMA | sizes | {"vocab_size": 2}
    model_folder(base / "odd", shape, tokenizer("a", "b"))
    found = check("teacher.source=odd", "mesh={fsdp: 4, tensor: 2}", "train.batch_size=8")
    expected = [
        *rules.tensor_axis(2, "teacher", {"heads": 6, "kv_heads": 3, "mlp": 12}),
        *rules.head_rows("teacher", 2, 3),
    ]
    places = ['override "mesh={fsdp: 4, tensor: 2}"', "<text>:1:1"]
    told = [f"{place}: {error}" for place, error in zip(places, expected, strict=True)]
    assert [str(error) for error in found] == told
    assert "kv_heads = 3: take one of 1, 3, 6" in str(expected[0])


def test_the_mesh_fits_models_that_are_made_from_numbers(base):
    """Heads of a random student, of one that is like the teacher, and of one that is pruned."""
    (base / "scores").write_bytes(b"")
    groups = LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 16}
    model_folder(base / "even", groups, tokenizer("a", "b"))
    for student, sizes in {
        "{random: {layers: 1, embed: 12, mlp: 16, heads: 6}}": {"heads": 6, "kv_heads": 6},
        "{random: {like: teacher, heads: 4}}": {"heads": 4},
        "{from: teacher, prune: {importance: scores, kv_heads: 2, heads: 4}}": {"heads": 4},
    }.items():
        mesh = "mesh={fsdp: 1, tensor: 8}"
        [error] = check("teacher.source=even", mesh, f"student={student}")
        assert "mesh.tensor = 8 does not divide the student's " in str(error)
        assert all(f"{name} = {size}" in str(error) for name, size in sizes.items()), error
        assert check("teacher.source=even", f"student={student}") == []


def test_the_expert_axis_has_experts_to_divide(base):
    """Of all models whose small files tell; of the others a start does."""
    mesh = "mesh={fsdp: 1, expert: 2}"
    (none,) = rules.expert_axis(2, 1, {})
    random = "student={random: {layers: 1, embed: 12, mlp: 16, heads: 6}}"
    for student in ([], [random], ["student={from: teacher, layers: [0]}"]):
        [error] = check(mesh, *student)
        assert str(none) in str(error)
    routed = LLAMA | {"model_type": "qwen3_moe", "num_experts": 7, "num_experts_per_tok": 2}
    model_folder(base / "routed", routed, tokenizer("a", "b"))
    (wrong,) = rules.expert_axis(2, 1, {"teacher": 7})
    [error] = check(mesh, "teacher.source=routed")
    assert str(wrong) in str(error)
    assert (
        check(
            "mesh={fsdp: 1, expert: 7}",
            "train.batch_size=7",
            "eval.batch_size=7",
            "teacher.source=routed",
        )
        == []
    )
    (base / "x.gguf").write_bytes(b"")
    (alone,) = rules.expert_axis(2, 1, {}, where="teacher.mesh")
    [error] = check("teacher.mesh={expert: 2}")
    assert str(alone) in str(error)
    assert check(mesh, "teacher.source=x.gguf") == []
    assert check(mesh, "student={random: {like: x.gguf, layers: 1}}") == []


def test_exceptions_to_a_scheme_match_a_projection(base):
    """By the rule that a start asks: of each model's own family."""
    gpt2 = LLAMA | {"model_type": "gpt2"}
    model_folder(base / "plain", gpt2, tokenizer("a", "b"))
    given = "{{scheme: int8, exceptions: [mlp.{}=none]}}"
    llama = [f"attention.{name}" for name in ("query", "key", "value", "out")]
    llama += [f"mlp.{name}" for name in ("gate", "up", "down")]
    (wrong,) = rules.exceptions_match("teacher.quantize", ["mlp.dawn"], "llama", llama)
    [error] = check(f"teacher.quantize={given.format('dawn')}")
    assert str(wrong) in str(error)
    random = "student={random: {layers: 1, embed: 12, mlp: 16, heads: 6}}"
    for student in ([], [random]):
        [error] = check(*student, f"student.quantize={given.format('dawn')}")
        assert "student.quantize.exceptions: 'mlp.dawn' matches no projection" in str(error)
    assert check(f"teacher.quantize={given.format('*')}") == []
    [error] = check(f"teacher.quantize={given.format('gate')}", "teacher.source=plain")
    assert "'mlp.gate' matches no projection: a gpt2 model has" in str(error)


def test_models_are_compared_with_the_tokenizer_that_is_named(base):
    """As a start does it: each of them, under its name."""
    model_folder(base / "tokens", {}, tokenizer("c", "d"), weights=None)
    found = check("tokenizer={from: tokens}")
    assert [str(error).partition(" has ")[0] for error in found] == [
        "teacher (big): its vocabulary",
        "student (small): its vocabulary",
    ]


def test_notes_say_how_vocabularies_go_together(base):
    assert preflight.notes(config.loads(TEXT)) == []
    model_folder(base / "longer", words=tokenizer("a", "b", added=("<end>", "<x>")))
    [note] = preflight.notes(config.loads(TEXT, overrides=("teacher.source=longer",)))
    assert note == (
        "student: vocabulary: shared: 3 of 4 tokens are shared; the tokenizer's alone, masked: 0 "
        "ordinary and 1 control tokens"
    )
    assert check("teacher.source=longer") == []


def test_the_byte_tokenizer_has_as_many_tokens_as_is_assumed(base):
    from jaxdistill.models.byte_tokenizer import byte_tokenizer
    from jaxdistill.models.vocabulary import vocabulary_size

    assert vocabulary_size(byte_tokenizer()) == preflight._BYTES
    student = "student={random: {layers: 1, embed: 8, mlp: 8, heads: 2, vocab_size: 256}}"
    [error] = check(student, "tokenizer={from: bytes}")
    assert "has 256 rows, but the tokenizer's ids reach 256" in str(error)


def test_several_errors_become_one_with_the_smallest_exit_code():
    error = errors.combined([ModelError("m"), DataError("d"), ModelError("n")])
    assert isinstance(error, DataError)
    assert str(error) == "m\nd\nn"


def test_the_training_file_under_another_name_is_no_held_out_data(base):
    (base / "link.jsonl").symlink_to(base / "a.jsonl")
    (base / "copy.jsonl").write_bytes((base / "a.jsonl").read_bytes())
    (base / "data").mkdir()
    (base / "data/b.jsonl").write_bytes((base / "a.jsonl").read_bytes())
    for path in ("./a.jsonl", base / "a.jsonl", "link.jsonl", "copy.jsonl", "data", '"*y.jsonl"'):
        [error] = check(f"data.eval.0.path={path}")
        assert 'is "a.jsonl" of data.train again' in str(error) and "fraction" in str(error)
    assert check("data.eval={fraction: 0.1}") == []


def test_data_that_needs_more_than_a_file(base):
    [error] = check("data.chat_template=none.jinja")
    assert "data.chat_template" in str(error) and "no such file" in str(error)
    [error] = check('data.train.0.path="hf:org/name"')
    assert "security.allow_network: true" in str(error)
    assert check('data.train.0.path="hf:org/name"', "security.allow_network=true") == []
