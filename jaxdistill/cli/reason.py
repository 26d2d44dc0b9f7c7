"""The commands of reasoning: teacher generate, serve, and eval on tasks."""

import argparse
import os
from typing import Any

from jaxdistill import commands
from jaxdistill.cli.derive import read
from jaxdistill.cli.output import print_json, stdout_is_json
from jaxdistill.errors import ConfigError
from jaxdistill.safe.redact import learn


def teacher_generate(arguments: argparse.Namespace) -> None:
    """Asks a teacher for rationales."""
    from jaxdistill.config import generation

    config = generation.load(
        arguments.config,
        [
            *arguments.overrides,
            *([f"sampling.samples={arguments.samples}"] if arguments.samples else []),
        ],
    )
    with stdout_is_json(True):
        from jaxdistill.run import teacher_generate

        written = teacher_generate.generate(config)
    if arguments.json:
        return print_json(written)
    if config.augment is not None:
        return _print_augmented(written)
    print(
        f"{written['samples']} samples of {written['questions']} questions: "
        f"{written['parsed']} parsed, {written['correct']} correct, "
        f"{sum(written['failed'].values())} failed"
    )
    for form, file in written["files"].items():
        dropped = ", ".join(f"{count} {why}" for why, count in file["dropped"].items())
        print(f"wrote {file['path']}: {file['samples']} samples ({form}); dropped: {dropped or 0}")
    return None


def _print_augmented(found: dict[str, Any]) -> None:
    spent = ", ".join(f"{name} {value:g}" for name, value in found["spent"].items())
    print(f"wrote {found['path']}: {found['records']} records of {found['seeds']}; spent: {spent}")
    for kind, row in found["kinds"].items():
        dropped = ", ".join(f"{count} {why}" for why, count in row["dropped"].items())
        print(f"  {kind:12} {row['records']:6} {row['share']:6.1%}; dropped: {dropped or 0}")


def serve(arguments: argparse.Namespace) -> None:
    """Serves a model."""
    options = read(commands.Serve, arguments)
    key = os.environ.get(arguments.key_env) if arguments.key_env else None
    if arguments.key_env and not key:
        raise ConfigError(
            f"serve: --key-env {arguments.key_env}: the variable is not set: export it, or leave "
            "the option out to serve without a key"
        )
    from jaxdistill import serve as server

    learn(key or "")
    server.serve(arguments.model, options, key=key)


def evaluate_tasks(arguments: argparse.Namespace) -> None:
    """Measures accuracy on tasks."""
    options = read(commands.Tasks, arguments)
    with stdout_is_json(True):
        from jaxdistill.evaluate import accuracy

        accuracies = accuracy.evaluate(
            arguments.model,
            arguments.tasks,
            options,
            folder=arguments.task_data,
            slots=max(arguments.batch_size, 1),
            dtype=arguments.dtype,
            output=arguments.output,
        )
    if arguments.json:
        return print_json(accuracies)
    for name, row in accuracies.items():
        print(f"{name}: {row['questions']} questions, {row['tokens']} tokens")
        _print_share("greedy", row["greedy"])
        _print_share("unparsable", row["unparsable"])
        if count := row["not_asked"]["questions"]:
            print(f"  {count} of them could not be asked: {row['not_asked']['reason']}")
        for label in ("maj_at", "pass_at"):
            for k, share in row.get(label, {}).items():
                _print_share(f"{label.replace('_at', '@')}{k}", share)
    return None


def _print_share(name: str, share: dict[str, float]) -> None:
    print(f"  {name:12} {share['value']:6.1%}  [{share['low']:.1%}, {share['high']:.1%}]")
