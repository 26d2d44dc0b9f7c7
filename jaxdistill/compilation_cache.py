"""JAX's cache of compiled programs on disk: on by default, in the user's own cache folder."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import stat
import sys

log = logging.getLogger(__name__)

MAX_BYTES = 4 * 2**30
# A user who sets one of these has decided.
_JAX_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def start(setting: str = "auto") -> None:
    """Turns the cache on or off for this process; several processes may share a folder.

    JAX's own variables win, and so does a folder that the program has set before.

    Args:
      setting: auto, off, or a folder.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if any(name in os.environ for name in _JAX_VARIABLES):
        return
    usual = default_folder()
    current = jax.config.jax_compilation_cache_dir
    if current is not None and current != str(usual):
        return
    folder = usual if setting == "auto" else pathlib.Path(setting).expanduser()
    wanted = None if setting == "off" else _prepared(folder)
    if wanted != current:
        if current is not None:
            compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", wanted)
    if wanted and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def default_folder() -> pathlib.Path:
    """The folder in the user's cache: one for each version of JAX and kind of processor."""
    home = pathlib.Path("~").expanduser()
    usual = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or usual)
    return cache / "jaxdistill" / "xla" / f"{importlib.metadata.version('jax')}-{_processor()}"


def _processor() -> str:
    """A short name of this processor: compiled code must not travel to another one."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = f"{platform.machine()} {platform.processor()} {features}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _prepared(folder: pathlib.Path) -> str | None:
    """The folder, made and trimmed; None, with a warning, where its programs cannot be trusted.

    Whoever can write into the folder can run code here, so it must be this user's alone.
    """
    try:
        if not folder.exists():
            folder.mkdir(parents=True, mode=0o700)
            log.info(
                "compiled programs are kept in %s (run.compilation_cache: off keeps none)", folder
            )
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            log.warning("no compilation cache: %s can be written by others: chmod 700 it", folder)
            return None
        with contextlib.suppress(FileNotFoundError):  # another process trims it too
            _trim(folder)
    except OSError as error:
        log.warning("no compilation cache: %s: %s", folder, error.strerror)
        return None
    return str(folder)


def _trim(folder: pathlib.Path) -> None:
    """Deletes the oldest programs beyond MAX_BYTES; a reader that misses one compiles anew."""
    entries = [(file, file.stat()) for file in folder.iterdir() if file.is_file()]
    total = sum(found.st_size for _, found in entries)
    for file, found in sorted(entries, key=lambda entry: entry[1].st_mtime):
        if total <= MAX_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= found.st_size
