"""The commands about stored teachers: teacher cache, with its ls and verify."""

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

        written = teacher_cache.capture(loaded, options)
    if not agree.leads():
        return None
    if arguments.json:
        return print_json(written)
    print(_line(written))
    if options.dry_run:
        print("nobody was asked: leave --dry-run out to do it")
    elif written["whole"]:
        given = f"{{cache: {written['place']}}}"
        of = f"teachers: {{{options.teacher}: {given}}}" if options.teacher else f"teacher: {given}"
        print(f"next: {of}")
    else:
        print("other shards are not there yet: nothing can learn from it until they are")
    return None


def _line(found: dict[str, Any]) -> str:
    size = f"{found['bytes_per_token']} bytes a token, {found['bytes'] / 1e6:,.1f} MB"
    return (
        f"{found['place']}: {found['format']} ({found['dtype']}): {found['segments']:,} segments, "
        f"{found['positions']:,} positions, {size} before compression"
    )


def ls(arguments: argparse.Namespace) -> None:
    """Says what a store holds."""
    from jaxdistill.data.teacher_cache import catalog

    facts = catalog.describe(arguments.place)
    if arguments.json:
        return print_json(facts)
    identity, notes, form = facts["identity"], facts["notes"], facts["identity"]["format"]
    print(f"{facts['place']}: {form['name']} ({form['dtype']})")
    for name in ("k", "temperatures", "draws"):
        if form[name]:
            print(f"  {name:<22}{form[name]}")
    for name, value in {**notes, **identity}.items():
        if name != "format":
            print(f"  {name:<22}{catalog.short(value)}")
    if facts["whole"]:
        each = facts["bytes"] / max(1, facts["positions"])
        print(f"  {'segments':<22}{facts['segments']:,}")
        print(f"  {'positions':<22}{facts['positions']:,}")
        print(f"  {'bytes':<22}{facts['bytes']:,} ({each:.1f} a position, all objects)")
    else:
        print(f"  {'parts':<22}{facts['parts']}: the capture has not ended")
    return None


def verify(arguments: argparse.Namespace) -> None:
    """Asks the teacher again."""
    options = read(commands.TeacherVerify, arguments)
    with stdout_is_json(True):
        from jaxdistill.run import teacher_verify

        facts = teacher_verify.verify(arguments.place, options.teacher, options.segments)
    if arguments.json:
        return print_json(facts)
    print(f"{facts['segments']} segments, {facts['positions']} positions: every object is whole")
    print(f"weights: {facts['weights']}")
    for name in ("kl_mean", "kl_max", "cross_entropy_gap", "standard_error"):
        if name in facts:
            print(f"{name:<20}{facts[name]:.6g}")
    for name in ("kept_mass", "entropy"):
        shares = ", ".join(f"{share} {value:.4g}" for share, value in facts.get(name, {}).items())
        print(f"{name:<20}{shares}") if shares else None
    return None
