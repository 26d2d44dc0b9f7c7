import os
import pty
import select
import shutil
import subprocess
import time

import pytest

from jaxdistill.cli import completion, options

pytestmark = pytest.mark.floor


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Shell -> the file of its script."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        (folder / shell).write_text(completion.script(shell, options.parser()))
    return {shell: folder / shell for shell in ("bash", "zsh", "fish")}


def in_bash(script, line, folder):
    """What bash offers at the end of a line, which it splits at blanks and at "="."""
    words = line.replace("=", " = ").split()
    words += [""] if line.endswith((" ", "=")) else []
    if line.endswith("="):
        words = words[:-1]  # bash has the sign itself as the word that is typed
    listed = " ".join(f"'{word}'" for word in words)
    code = (
        f"source '{script}'; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; "
        "_jaxdistill; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, cwd=folder, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


LINES = [
    ("jaxdistill tr", ["train"]),
    ("jaxdistill teacher ", ["generate", "cache"]),
    ("jaxdistill teacher cache ", ["ls", "verify"]),
    ("jaxdistill ckpt ro", ["rollback"]),
    ("jaxdistill ls ", ["recipes", "methods", "models", "runs"]),
    ("jaxdistill init quickstart", ["quickstart", "quickstart_30min"]),
    ("jaxdistill schema ", ["run", "workflow", "generate"]),
    ("jaxdistill train --j", ["--json"]),
    ("jaxdistill export --format ", ["folder", "gguf"]),
    ("jaxdistill export --format=g", ["gguf"]),
    ("jaxdistill train a.yaml method.name=distillm", ["distillm", "distillm2"]),
    ("jaxdistill train a.yaml data.loss_on=", ["all", "completion", "assistant"]),
    ("jaxdistill train a.yaml optimizer.clip", ["optimizer.clip_norm="]),
    ("jaxdistill train --json a.yaml train.ste", ["train.steps="]),
    ("jaxdistill validate --explain train.ste", ["train.steps"]),
    ("jaxdistill train ", []),  # a file: bash's own completion
    ("jaxdistill export --output ", []),
]


@pytest.mark.parametrize(("line", "offered"), LINES)
def test_bash_offers(scripts, tmp_path, line, offered):
    found = in_bash(scripts["bash"], line, tmp_path)
    assert found == offered or (len(offered) > 2 and set(found) >= set(offered))


def test_fish_offers(scripts, tmp_path):
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("fish is not installed")
    (tmp_path / "of_the_folder.yaml").touch()
    for line, offered in LINES:
        done = subprocess.run(
            [fish, "--no-config", "-c", f"source {scripts['fish']}; complete -C '{line}'"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"HOME": str(tmp_path)},
            check=True,
        )
        assert done.stderr == ""
        *_, typed = line.split(" ")
        found = {one.removeprefix(typed[: typed.rfind("=") + 1]) for one in done.stdout.split()}
        if offered:
            assert found == set(offered) or (len(offered) > 2 and found >= set(offered)), line
        else:
            assert "of_the_folder.yaml" in found, line


def test_zsh_completes(scripts, tmp_path):
    """A shell as a person has it: keys are typed, and what it writes is read."""
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("zsh is not installed")
    terminal, inner = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "PS1": "> "}
    shell = subprocess.Popen(
        [zsh, "-fi"],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
    )
    os.close(inner)
    try:
        load = f"autoload -U compinit; compinit -D; source '{scripts['zsh']}'; echo rea''dy\n"
        os.write(terminal, load.encode())
        assert "ready" in until(terminal, "ready")
        for typed, word in (
            (b"jaxdistill trai\tx.yaml", "<train><x.yaml>"),
            (b"jaxdistill train x.yaml optimizer.cl\t1.5", "<optimizer.clip_norm=1.5>"),
            (b"jaxdistill train x.yaml method.name=to\t", "<method.name=total_variation>"),
        ):
            os.write(terminal, typed + b"\x01printf '<%s>' \n")  # printf goes to the line's front
            assert word in until(terminal, word)
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


def until(terminal, text):
    """What a terminal shows, up to a text or for 30 s."""
    seen, end = "", time.monotonic() + 30
    while text not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 65536).decode(errors="replace")
    return seen


def test_every_command_is_offered(scripts, tmp_path):
    for command in options.COMMANDS:
        *before, last = command.name.split()
        line = " ".join(["jaxdistill", *before, ""])
        assert last in in_bash(scripts["bash"], line, tmp_path), command.name
