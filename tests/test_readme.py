"""The README is the front door: its tree, its code and its commands are the project's."""

import ast
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def module_tree() -> str:
    """The package as the README shows it: every module with its first docstring line."""
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
    return "\n".join(lines)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_tree_is_the_packages():
    expected = module_tree()
    assert expected in README, f"put this into README.md:\n\n{expected}"


@pytest.mark.parametrize("code", [pytest.param(c, id=c.split("\n")[0]) for c in blocks("python")])
def test_code_runs_as_pasted(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_commands_exist():
    from jaxdistill.cli.options import parser

    commands = [
        shlex.split(line, comments=True)[1:]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("jaxdistill ")
    ]
    assert len(commands) > 5
    for words in commands:
        parser().parse_args(words)


def test_files_that_are_named_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
