"""The cache of compiled programs: where it lies, who decides, and who may write into it."""

import os
import pathlib
import subprocess
import sys

import pytest

from jaxdistill import compilation_cache

COMPILE = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
import jax
from jaxdistill import compilation_cache
for setting in sys.argv[1:]:
    compilation_cache.start(setting)
print(jax.config.jax_compilation_cache_dir)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 3 + 1)(1.0)
"""


def run(cache, *settings, **variables):
    """(folder JAX uses, what was said) of a process that compiles."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    environment = {**clean, "XDG_CACHE_HOME": str(cache), "HOME": str(cache / "home"), **variables}
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *settings],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr


def programs(folder):
    return len(list(pathlib.Path(folder).glob("*-cache")))


def test_it_is_on_by_default_private_and_said_once(tmp_path):
    folder, said = run(tmp_path, "auto")
    assert pathlib.Path(folder).parent == tmp_path / "jaxdistill" / "xla"
    assert pathlib.Path(folder).stat().st_mode & 0o777 == 0o700
    assert programs(folder) >= 1
    assert said.count("compiled programs are kept in") == 1
    again, said = run(tmp_path, "auto")
    assert (again, said) == (folder, "")


def test_a_key_moves_it_and_turns_it_off(tmp_path):
    assert run(tmp_path, "off")[0] == "None"
    assert run(tmp_path, "auto", "off")[0] == "None"
    moved, _ = run(tmp_path, "auto", str(tmp_path / "mine"))
    assert moved == str(tmp_path / "mine")
    assert programs(moved) >= 1
    assert not programs(tmp_path)


def test_jaxs_own_variables_win(tmp_path):
    own = str(tmp_path / "own")
    assert run(tmp_path, "auto", JAX_COMPILATION_CACHE_DIR=own)[0] == own
    assert run(tmp_path, "auto", JAX_ENABLE_COMPILATION_CACHE="0")[0] == "None"


def test_a_folder_that_others_can_write_is_not_used(tmp_path, caplog):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert compilation_cache._prepared(tmp_path / "open") is None
    assert "can be written by others" in caplog.text
    (tmp_path / "file").write_text("")
    assert compilation_cache._prepared(tmp_path / "file" / "below") is None


def test_the_oldest_programs_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 25)
    for i in range(4):
        (tmp_path / f"{i}-cache").write_bytes(bytes(10))
        os.utime(tmp_path / f"{i}-cache", (i, i))
    compilation_cache._trim(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["2-cache", "3-cache"]


@pytest.mark.parametrize(("platform", "below"), [("linux", ".cache"), ("darwin", "Library/Caches")])
def test_the_usual_places(tmp_path, monkeypatch, platform, below):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compilation_cache.default_folder().is_relative_to(tmp_path / below / "jaxdistill")
