"""The READMEs: what README.md says to paste works, in order, in one fresh folder; the tree is true.

`python tests/test_readme.py` writes the tree of modules in jaxdistill/README.md anew, and the JSON
Schemas beside the recipes.
"""

import ast
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / folder / "README.md" for folder in ("", "configs", "benchmarks", "jaxdistill")]
README, TREE_PAGE = PAGES[0], PAGES[-1]
TREE = re.compile(r"(?<=^```\n)jaxdistill/\n.*?(?=^```)", re.DOTALL | re.MULTILINE)
NOT_PASTED = "# Not pasted by the test of this page"
# The first distillation takes a reader three minutes; a few of its steps go the same way.
SHORTER = r"""if [ "$*" = "init tiny" ]; then
  sed -i 's/steps: 300,/steps: 12,/; s/steps: 100,/steps: 12,/' tiny.yaml
fi
"""
# Without the suite's settings, under which programs compile fast and run slowly.
AS_USERS = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


def module_tree() -> str:
    """The package as its README shows it: every module with its first docstring line."""
    lines = ["jaxdistill/"]

    def visit(folder: pathlib.Path, depth: int) -> None:
        files = sorted(p for p in folder.glob("*.py") if p.name[0] != "_")
        folders = sorted(p for p in folder.iterdir() if (p / "__init__.py").exists())
        for path in sorted(files + folders):
            source = path if path.is_file() else path / "__init__.py"
            text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
            name = path.name if path.is_file() else path.name + "/"
            lines.append(f"{'  ' * depth}{name:<{26 - 2 * depth}} {text.splitlines()[0]}")
            if path.is_dir():
                visit(path, depth + 1)

    visit(ROOT / "jaxdistill", 1)
    return "\n".join(lines) + "\n"


def blocks(page: pathlib.Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of a page's code blocks, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if language in languages]


def pasted() -> list[tuple[str, str]]:
    """What somebody pastes who reads README.md from the top, without what takes minutes."""
    return [b for b in blocks(README, "bash", "python") if not b[1].startswith(NOT_PASTED)]


@pytest.fixture
def fresh(tmp_path):
    """A fresh folder, and the environment of a shell in which `jaxdistill` is this package."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "jaxdistill").write_text(
        f'#!/bin/sh\n"{sys.executable}" -m jaxdistill "$@" || exit $?\n{SHORTER}'
    )
    (tools / "jaxdistill").chmod(0o755)
    folder = tmp_path / "fresh"
    folder.mkdir()
    path = f"{tools}:{os.environ['PATH']}"
    return folder, {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **AS_USERS}


def test_the_tree_is_the_packages():
    written = TREE.search(TREE_PAGE.read_text())
    assert written, "jaxdistill/README.md has no tree"
    assert written[0] == module_tree(), "run: python tests/test_readme.py"


def test_pasted_top_to_bottom_everything_works(fresh):
    folder, environment = fresh
    languages = [language for language, _ in pasted()]
    assert languages.count("bash") >= 2
    assert languages.count("python") >= 3
    for language, text in pasted():
        command = {"bash": ["bash", "-e"], "python": [sys.executable, "-"]}[language]
        done = subprocess.run(
            command, input=text, cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert (folder / "student" / "config.json").is_file()
    assert (folder / "runs" / "python" / "report.html").is_file()


def arguments(shell: list[str], fresh: tuple, text: str) -> str:
    """What the commands of a block receive from a shell; they do nothing else."""
    folder, environment = fresh
    tool = folder.parent / "tools" / "jaxdistill"
    tool.write_text('#!/bin/sh\nprintf "<%s>" "$@"\necho\n')
    done = subprocess.run(
        shell, input=text, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return done.stdout


def test_zsh_passes_the_same_words(fresh):
    """zsh refuses a word with ? or * that matches no file, where bash passes it on."""
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("zsh is not installed")
    for _, text in [block for block in pasted() if block[0] == "bash"]:
        assert arguments([zsh, "-fe"], fresh, text) == arguments(["bash", "-e"], fresh, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_exist_and_no_shell_reads_them_as_patterns(page):
    from jaxdistill.cli.options import parser

    commands = [
        line
        for _, block in blocks(page, "bash")
        for line in block.splitlines()
        if line.startswith("jaxdistill ")
    ]
    assert commands or page.parent.name in ("benchmarks", "jaxdistill")
    for line in commands:
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
        assert not set("?*[]{}~!") & set(bare), f"{line}: zsh reads a pattern: quote it"
        parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.parent.name)
def test_code_of_the_other_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    for path in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", text):
        assert (page.parent / path).exists(), path


def test_the_front_door_is_short():
    assert len(README.read_text().splitlines()) <= 260


def test_every_recipe_and_every_result_is_named():
    configs, benchmarks = (ROOT / name for name in ("configs", "benchmarks"))
    text = (configs / "README.md").read_text()
    assert not [path.name for path in configs.glob("*.yaml") if f"({path.name})" not in text]
    text = (benchmarks / "README.md").read_text()
    results = (benchmarks / "results").glob("*.json")
    assert not [path.name for path in results if f"(results/{path.name})" not in text]


@pytest.mark.parametrize("kind", ["run", "workflow"])
def test_the_schemas_beside_the_recipes_are_those_of_the_code(kind):
    from jaxdistill.config import editor

    assert editor.file(kind).read_text() == editor.text(kind), "run: python tests/test_readme.py"


def test_the_picture_is_of_the_saved_numbers():
    import json

    from benchmarks import picture

    numbers = json.loads((picture.RESULTS / "methods_smollm2.json").read_text())
    assert (picture.RESULTS / "methods_smollm2.svg").read_text() == picture.draw(numbers)


if __name__ == "__main__":
    page = TREE_PAGE.read_text()
    TREE_PAGE.write_text(TREE.sub(lambda _: module_tree(), page, count=1))
    from jaxdistill.config import editor

    for kind in ("run", "workflow"):
        editor.file(kind).write_text(editor.text(kind))
