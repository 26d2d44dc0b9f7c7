"""The hostile corpus is refused whole: with a message, without memory, without a canary."""

import ast
import json
import os
import pathlib
import pickle
import socket

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdistill import models
from jaxdistill.errors import ModelError
from jaxdistill.formats import shards
from jaxdistill.formats.tokenizer_files import folder_tokenizer
from tests import hostile

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture(autouse=True)
def bounded():
    """Refusing takes no memory, whatever this process has needed before.

    The peak of a process is that of its life: the kernel is asked to begin anew.
    """
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < 500_000


def memory(field):
    """KiB of this process, now (VmRSS) or at most (VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def test_the_bound_sees_what_was_taken_and_given_back():
    before = memory("VmRSS")
    taken = bytearray(b"x" * (100 << 20))
    del taken
    assert memory("VmHWM") - before > 90 << 10


def refused(call, *arguments, words=None):
    with pytest.raises(ModelError, match=words) as caught:
        call(*arguments)
    message = str(caught.value)
    assert len(message) < 2000 and "Traceback" not in message
    return message


def test_the_sound_folder_is_read(tmp_path):
    model = models.load(hostile.folder(tmp_path / "model"))
    assert model.config.layers == 1 and model.tokenizer("a")["input_ids"] == [1]


@pytest.mark.parametrize("name", hostile.SAFETENSORS)
def test_safetensors(tmp_path, name):
    folder = hostile.folder(tmp_path / "model")
    (folder / shards.SINGLE).write_bytes(hostile.SAFETENSORS[name])
    assert str(folder) in refused(models.load, folder)


@pytest.mark.parametrize("name", hostile.GGUF)
def test_gguf(tmp_path, name):
    pytest.importorskip("gguf", reason="needs the package gguf (the extra quickstart)")
    path = tmp_path / "model.gguf"
    path.write_bytes(hostile.GGUF[name])
    assert len(hostile.GGUF[name]) < 500
    assert str(path) in refused(models.load, path)


@pytest.mark.parametrize("name", hostile.CONFIGS)
def test_config_json(tmp_path, name):
    folder = hostile.folder(tmp_path / "model")
    hostile.write_json(folder / "config.json", hostile.CONFIGS[name])
    assert "config.json" in refused(models.load, folder)
    refused(models.spec, folder)


@pytest.mark.parametrize("file", hostile.INDEX_FILES, ids=str)
def test_index_entries_that_leave_the_folder(tmp_path, file):
    folder = hostile.folder(tmp_path / "model")
    (folder / shards.SINGLE).rename(tmp_path / "outside.safetensors")
    hostile.write_json(folder / shards.INDEX, {"weight_map": {"a": file}})
    refused(models.load, folder, words="must be the plain name")


@pytest.mark.parametrize("name", hostile.TOKENIZERS)
def test_tokenizer_json(tmp_path, name):
    folder = hostile.folder(tmp_path / "model")
    hostile.write_json(folder / "tokenizer.json", hostile.TOKENIZERS[name])
    refused(
        folder_tokenizer,
        folder,
        words="tokenizer cannot be loaded|is not JSON|must hold a JSON|ids must be from 0",
    )


_A, _X = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}


def _template(single, pair=(), ids=1):
    known = {"x": {"id": "x", "ids": [1] * ids, "tokens": ["x"] * ids}}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": list(pair),
        "special_tokens": known,
    }


def _padding(**fields):
    return {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    } | fields


def _nested(depth):
    made = _template([_A])
    for _ in range(depth):
        made = {"type": "Sequence", "processors": [made]}
    return made


def test_what_usual_tokenizers_put_around_a_text_is_read(tmp_path):
    folder = hostile.folder(tmp_path / "m")
    usual = {
        "post_processor": {"type": "Sequence", "processors": [_template([_X, _A, _X])]},
        "padding": _padding(strategy={"Fixed": 128}),
        "truncation": {
            "max_length": 384, "stride": 128, "strategy": "LongestFirst", "direction": "Right",
        },
    }  # fmt: skip
    hostile.write_json(folder / "tokenizer.json", hostile.TOKENIZER | usual)
    assert folder_tokenizer(folder)("a")["input_ids"] == [1, 1, 1]


def _replacing(letter, by):
    return {"type": "Replace", "pattern": {"String": letter}, "content": by}


def _words(**fields):
    return {
        "type": "WordPiece",
        "vocab": {"<unk>": 0, "a": 1, "##a": 2},
        "unk_token": "<unk>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 1000,
    } | fields


def test_a_usual_word_piece_is_read(tmp_path):
    folder = hostile.folder(tmp_path / "m")
    hostile.write_json(folder / "tokenizer.json", hostile.TOKENIZER | {"model": _words()})
    assert folder_tokenizer(folder)("aaa")["input_ids"] == [1, 2, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": _replacing("a", "x" * 300)}, "normalizer: Replace makes up to 300"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [_replacing("a", "x" * 6), _replacing("x", "y" * 6)],
                }
            },
            "makes up to 36 characters of one",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 99}}, "Prepend makes up to 99"),
        ({"decoder": _replacing("a", "x" * 300)}, "decoder: Replace makes up to 300"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}}, "has the id 429496"),
        ({"model": {"type": "BPE", "vocab": {"a" * 20_000: 0}, "merges": []}}, "20000 characters"),
        ({"added_tokens": [{"content": "a", "id": 2**31, "special": True}]}, "has the id 21474"),
        ({"post_processor": _template([_A, *[_X] * 100])}, "puts 100 tokens around a text"),
        ({"post_processor": _template([_A, _X], ids=5000)}, "puts 5000 tokens around a text"),
        ({"post_processor": _template([_A, _A])}, "a text that stands there 2 times"),
        (
            {
                "post_processor": {
                    "type": "Sequence",
                    "processors": [_template([_X, _A], ids=40), _template([_A, _X], ids=40)],
                }
            },
            "puts 80 tokens around a text",
        ),
        ({"post_processor": _template([_A], pair=[_A, *[_X] * 70])}, "puts 70 tokens"),
        ({"padding": _padding(strategy={"Fixed": 2**30})}, "fills every text up to 1073741824"),
        ({"padding": _padding(pad_to_multiple_of=2**30)}, "pad_to_multiple_of fills every text"),
        ({"padding": _padding(pad_id=2**31)}, "has the id 21474"),
        ({"padding": _padding(pad_token="a" * 20_000)}, "20000 characters"),
        (
            {
                "truncation": {
                    "max_length": 1000,
                    "stride": 999,
                    "strategy": "LongestFirst",
                    "direction": "Right",
                }
            },
            "pieces of 1000 tokens overlap in 999",
        ),
        ({"model": _words(max_input_chars_per_word=10**9)}, "per_word is 1000000000: at most 1000"),
        ({"model": _words(max_input_chars_per_word=1001)}, "per_word is 1001: at most 1000"),
        ({"model": _words(continuing_subword_prefix="#" * 17)}, "subword_prefix has 17 characters"),
        (
            {"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "x" * 99}},
            "end_of_word_suffix has 99 characters",
        ),
        (
            {
                "model": {
                    "type": "Unigram",
                    "unk_id": 0,
                    "vocab": [["<unk>", 0.0], ["a" * 1001, -1]],
                }
            },
            "the piece 'a.* has 1001 characters: at most 1000",
        ),
        ({"post_processor": _nested(2000)}, "nested too deeply|cannot be loaded|is not JSON"),
    ],
)
def test_a_tokenizer_that_makes_much_of_little_is_refused(tmp_path, change, words):
    folder = hostile.folder(tmp_path / "m")
    hostile.write_json(folder / "tokenizer.json", hostile.TOKENIZER | change)
    refused(folder_tokenizer, folder, words=words)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "pipe", "socket", "loop"])
def test_files_that_are_none_or_lie_elsewhere(tmp_path, monkeypatch, name, target):
    folder = hostile.folder(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    if target == "pipe":
        os.mkfifo(folder / name)
    elif target == "socket":
        monkeypatch.chdir(folder)  # for a socket's path has room for 107 bytes
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    else:
        (folder / name).symlink_to(name if target == "loop" else target)
    refused(models.load, folder)
    if name != "model.safetensors":
        refused(models.spec, folder)


def test_links_inside_the_folder_and_into_the_hubs_cache_are_read(tmp_path):
    cache = tmp_path / "models--org--name"
    folder = hostile.folder(cache / "snapshots" / "0123")
    (cache / "blobs").mkdir()
    (folder / shards.SINGLE).rename(cache / "blobs" / "abcd")
    (folder / shards.SINGLE).symlink_to("../../blobs/abcd")
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    assert models.load(folder).config.layers == 1


def test_oversized_files_are_not_read(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", shards.INDEX):
        folder = hostile.folder(tmp_path / name)
        with (folder / name).open("wb") as file:
            file.truncate(10**12)  # sparse: it takes no room
        refused(models.load, folder, words="larger than 100000000 bytes")


@pytest.fixture
def coded(tmp_path, canary, monkeypatch):
    """A folder full of code, and nobody who would answer a question."""

    def asked(prompt=""):
        raise AssertionError(f"asked on stdin: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    folder = hostile.folder(tmp_path / "model")
    names = ["evil.py", "modeling_llama.py", "configuration_llama.py", "__init__.py"]
    for name in [*names, "conftest.py", "setup.py"]:
        (folder / name).write_text(hostile.code(canary))
    return folder


def test_code_of_a_folder_is_not_run_by_itself(coded):
    assert models.load(coded).config.layers == 1


def test_code_that_a_supported_model_asks_for_is_not_run(coded, tmp_path):
    config = hostile.CONFIG | {"auto_map": hostile.auto_map("evil")}
    words = {"auto_map": hostile.auto_map("evil"), "tokenizer_class": "PreTrainedTokenizerFast"}
    hostile.write_json(coded / "config.json", config)
    hostile.write_json(coded / "tokenizer_config.json", words)
    model = models.load(coded)
    assert model.config.family == "llama" and model.logits(np.array([[0, 1]])).shape == (1, 2, 16)
    assert type(model.tokenizer).__module__.startswith("transformers.")
    assert model.tokenizer("a")["input_ids"] == [1]
    assert model.tokenizer.name_or_path == str(coded)
    written = models.save(model, tmp_path / "written")
    assert not list(written.glob("*.py"))
    for file in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((written / file).read_text())


def test_code_that_another_model_needs_is_not_run(coded):
    config = hostile.CONFIG | {"model_type": "evil", "auto_map": hostile.auto_map("evil")}
    hostile.write_json(coded / "config.json", config)
    words = r"model_type: \"evil\" is not supported \(auto_map: it needs Python code"
    refused(models.load, coded, words=words)
    refused(models.spec, coded, words=words)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "Evil"},
        {},
        {"tokenizer_class": "PreTrainedTokenizerFast", "without": "tokenizer.json"},
    ],
)
def test_code_that_a_tokenizer_needs_is_not_run(coded, settings):
    (coded / settings.pop("without", "generation_config.json")).unlink(missing_ok=True)
    settings["auto_map"] = hostile.auto_map("evil")
    hostile.write_json(coded / "tokenizer_config.json", settings)
    refused(models.load, coded, words="auto_map: asks for Python code")


@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoProcessor", "AutoModelForCausalLM", 3])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_tokenizer_class_is_no_door_to_another_reader(coded, file, name):
    """transformers would take any attribute of its own, and some of them ask to run code."""
    config = hostile.CONFIG | {"auto_map": hostile.auto_map("evil")}
    contents = {"config.json": config, "tokenizer_config.json": {}}
    contents[file]["tokenizer_class"] = name
    for where, content in contents.items():
        hostile.write_json(coded / where, content)
    refused(models.load, coded, words="is no tokenizer of transformers'")


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_file", "/etc/passwd"), ("tokenizer_file", "../x.json"), ("gguf_file", "/x.gguf")],
)
def test_settings_of_a_tokenizer_cannot_name_files_elsewhere(tmp_path, field, value):
    folder = hostile.folder(tmp_path / "model")
    hostile.write_json(folder / "tokenizer_config.json", {field: value})
    refused(models.load, folder, words=f"{field}: .*must be the plain name")
    hostile.write_json(folder / "tokenizer_config.json", {"init_inputs": [value]})
    refused(models.load, folder, words="init_inputs")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", shards.SINGLE])
def test_pickles_are_never_read(tmp_path, canary, name):
    folder = hostile.folder(tmp_path / "model")
    (folder / shards.SINGLE).unlink()
    (folder / name).write_bytes(pickle.dumps(hostile.Canary(canary)))
    refused(models.load, folder)


def test_importance_and_data_are_no_pickles(tmp_path, canary):
    from jaxdistill.compress import importance
    from jaxdistill.data import arrays, store
    from jaxdistill.errors import UserError

    path = tmp_path / "scores.safetensors"
    path.write_bytes(pickle.dumps(hostile.Canary(canary)))
    with pytest.raises(UserError):
        importance.load(path)
    for name in {**store.ROWS, **store.TOKENS}:
        np.save(tmp_path / f"{name}.npy", np.array([hostile.Canary(canary)]), allow_pickle=True)
    store.seal(tmp_path, {})
    for read in (lambda: arrays.of_rows(tmp_path, []), lambda: arrays.of_shards([tmp_path])):
        with pytest.raises(UserError, match="holds object"):
            read()


def test_a_tensor_of_another_size_than_the_configuration_is_refused(tmp_path):
    folder = hostile.folder(tmp_path / "model")
    save_file({"model.norm.weight": np.ones(3, np.float32)}, folder / shards.SINGLE)
    refused(models.load, folder, words="missing")


FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch",
}
# Timed beside ours in processes of their own, which read no file but arrays that they are given.
PEERS = {
    "jaxdistill/bench/liger_worker.py: torch",
    "jaxdistill/bench/peer_logprobs_worker.py: torch",
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"}


def _complaints(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            yield from (n for n in names if n.split(".")[0] in FORBIDDEN_MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in FORBIDDEN_NAMES | FORBIDDEN_CALLS:
            yield name
        options = {one.arg: ast.unparse(one.value) for one in node.keywords}
        if name.endswith((".load", ".read_array")) and name.split(".")[0] in ("np", "numpy"):
            if options.get("allow_pickle") != "False":
                yield f"{name} without allow_pickle=False"
        wrong = {"allow_pickle": "False", "trust_remote_code": "False", "shell": "False"}
        yield from (f"{key}={options[key]}" for key, value in wrong.items()
                    if options.get(key, value) != value)  # fmt: skip
        if name.endswith("from_pretrained") and options.get("trust_remote_code") != "False":
            yield f"{name} without trust_remote_code=False"


def test_the_package_has_no_way_to_run_what_it_reads():
    files = sorted((REPOSITORY / "jaxdistill").rglob("*.py"))
    assert len(files) > 100
    found = {
        f"{path.relative_to(REPOSITORY)}: {complaint}"
        for path in files
        for complaint in _complaints(ast.parse(path.read_text()))
    }
    assert found == PEERS


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import loads", "import torch.nn", "eval('1')", "exec(x)",
        "np.load(f)", "numpy.load(f, allow_pickle=True)", "yaml.load(t, Loader=L)",
        "AutoTokenizer.from_pretrained(x)", "A.from_pretrained(x, trust_remote_code=flag)",
        "subprocess.run(c, shell=True)", "os.system(c)",
    ],
)  # fmt: skip
def test_the_lint_sees(line):
    assert list(_complaints(ast.parse(line)))


def test_the_corpus_is_json_where_it_says_so():
    json.dumps(hostile.CONFIG)
