"""The commands: what is typed becomes a call, an exit code, and at most one message of error."""

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence

from jaxdistill import compilation_cache
from jaxdistill.cli import streams
from jaxdistill.cli.launch import die_with_launcher
from jaxdistill.cli.options import parser
from jaxdistill.cli.output import narration, printable
from jaxdistill.errors import ConfigError, LostProcessError, Preempted, StorageError, UserError
from jaxdistill.safe.redact import redact
from jaxdistill.train import stopping
from jaxdistill.train.hooks import NO_HOOKS, Hooks

# What JAX says of a platform without its plugin or its device.
_NO_PLATFORM = re.compile(r"(?:initialize backend|Unknown backend:?|backend) '(\w+)'")
# Everything heavy is imported inside the command that needs it: `--help`, `ls`, `init` and
# `validate` start in a fraction of a second.
_LIGHT = (*("ckpt", "clean", "completion", "init", "launch", "ls", "report", "schema", "validate"),)
# Whether these keep compiled programs is for their configuration to say, or not worth while.
_OWN_CACHE = ("bench", "plan", "resume", "sweep", "train", "workflow")


def main(argv: Sequence[str] | None = None, *, hooks: Hooks = NO_HOOKS) -> int:
    """Runs one command and returns its exit code; `hooks` are for `train` and `resume`.

    Where nobody reads what a command prints, it ends with 141, and on a full disk with 9, unless
    its work is elsewhere.
    """
    die_with_launcher()
    streams.stand_in()
    with streams.surviving("stderr"):
        try:
            return _ended(argv, hooks)
        finally:
            streams.settle()


def _ended(argv: Sequence[str] | None, hooks: Hooks) -> int:
    """One command, and what its end means."""
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv), hooks)
        sys.stdout.flush()
        return code
    except UserError as error:
        lines = printable(redact(str(error))).splitlines()
        head = f"error: {len(lines)} problems\n" if len(lines) > 1 else "error: "
        print(head + "\n".join(lines), file=sys.stderr)
        if isinstance(error, LostProcessError):
            sys.stderr.flush()
            os._exit(error.exit_code)  # at its end JAX would wait for the one that is gone
        return error.exit_code
    except Preempted as stop:
        if argv is None:
            stopping.end_quietly()
        print(f"stopped: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has gone
        if not streams.has_no_reader(sys.stdout):
            raise
        return 141
    except (RuntimeError, AssertionError) as error:
        platform = _missing_platform(error)
        if platform is None:
            raise
        print(
            f"error: JAX has no platform {platform!r} that works here (JAX_PLATFORMS = "
            f"{os.environ.get('JAX_PLATFORMS', '')!r})\ninstall its plugin, such as "
            "`pip install 'jax[cuda13]'`, or unset JAX_PLATFORMS",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            print(f"error: output cannot be written: {error.strerror}", file=sys.stderr)
            return StorageError.exit_code
        if error.filename is None:
            raise
        # A file that no command foresaw to be out of reach; its name is all there is to say.
        print(f"error: {printable(str(error.filename))}: {error.strerror}", file=sys.stderr)
        return StorageError.exit_code


def _missing_platform(error: Exception) -> str | None:
    """The platform that JAX was told to use and cannot, by its error; None: it is another error."""
    if isinstance(error, RuntimeError):
        match = _NO_PLATFORM.search(str(error))
        return match[1] if match else None
    # Of a CUDA without a GPU JAX says nothing, but asserts that another platform is left.
    told = os.environ.get("JAX_PLATFORMS")
    where = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return told if told and where[-1].endswith("xla_bridge.py") else None


def _run(words: list[str], hooks: Hooks) -> int:
    try:
        arguments = parse(words)
    except SystemExit:  # of --help, too, whose text may be waiting
        sys.stdout.flush()
        raise
    arguments.hooks = hooks
    lasts = arguments.lasts or getattr(arguments, "output", None) not in (None, "-")
    with streams.surviving(*(("stdout",) if lasts else ())), narration() as log:
        if arguments.command not in _LIGHT:
            log.info("jaxdistill %s: loading JAX", arguments.command)
            if arguments.command not in _OWN_CACHE:
                compilation_cache.start()
        return arguments.run(arguments) or 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of one command; overrides may stand before and after other options."""
    # argparse gives a `*` argument only the words before the first option: overrides that follow
    # one come back as extras.
    arguments, extras = parser().parse_known_args(argv)
    if extras and "overrides" in arguments:
        words = [word for word in extras if not word.startswith("-")]
        arguments.overrides = [*arguments.overrides, *words]
        extras = [word for word in extras if word.startswith("-")]
    if extras:
        arguments.parser.error(f"unrecognized arguments: {' '.join(extras)}")
    return arguments
