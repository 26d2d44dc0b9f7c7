"""The commands about stored teachers: teacher cache, cache-ls and cache-verify."""

import argparse
from typing import Any

from jaxdistill import commands
from jaxdistill.cli.derive import read
from jaxdistill.cli.output import print_json, stdout_is_json


def cache(arguments: argparse.Namespace) -> None:
    """Asks a teacher about the texts of a run."""
    from jaxdistill import config

    options = read(commands.TeacherCache, arguments)
    loaded = config.load(arguments.config, arguments.overrides)
    with stdout_is_json(True):
        from jaxdistill import agree
        from jaxdistill.run import teacher_cache

        found = teacher_cache.capture(loaded, options)
    if not agree.leads():
        return None
    if arguments.json:
        return print_json(found)
    print(_line(found))
    if options.dry_run:
        print("nobody was asked: leave --dry-run out to do it")
    elif found["whole"]:
        print(f"next: teacher: {{cache: {found['place']}}}")
    else:
        print("other shards are not there yet: nothing can learn from it until they are")
    return None


def _line(found: dict[str, Any]) -> str:
    size = f"{found['bytes_per_token']} bytes a token, {found['bytes'] / 1e6:,.1f} MB"
    return (
        f"{found['place']}: {found['format']} ({found['dtype']}): {found['segments']:,} segments, "
        f"{found['positions']:,} positions, {size} before compression"
    )
