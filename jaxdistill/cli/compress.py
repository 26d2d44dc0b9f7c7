"""The commands that make models smaller and compare them: prune, quantize, compare, workflow."""

import argparse

from jaxdistill import commands
from jaxdistill.cli.derive import read
from jaxdistill.cli.output import print_json, stdout_is_json
from jaxdistill.errors import ConfigError


def importance(arguments: argparse.Namespace) -> None:
    """Measures importance and writes it to a file."""
    options = read(commands.Importance, arguments)
    with stdout_is_json(True):
        from jaxdistill import api
        from jaxdistill.compress import importance as scores

        measured = api.importance(arguments.model, options)
        path = scores.save(measured, arguments.output)
    print(f"wrote {path}: {measured.facts['rows']} rows, {measured.facts['tokens']} tokens")
    influence = ", ".join(f"{value:.3f}" for value in measured.influence)
    print(f"block influence by layer: {influence}")


def prune(arguments: argparse.Namespace) -> None:
    """Writes a pruned model as a folder."""
    options = read(commands.Prune, arguments)
    calibration = read(commands.Importance, arguments) if arguments.data else None
    with stdout_is_json(True):
        from jaxdistill import api

        folder = api.prune(arguments.model, arguments.output, options, calibration)
        note = api.pruning_note(folder)
    if arguments.json:
        return print_json({"folder": folder, **note})
    if sparsity := note.get("sparsity"):
        zeros = f"{note['zeros']:.2%} of its layers' weights are 0"
        print(f"wrote {folder}: {sparsity} by {note['by']}: {zeros}")
        print("the files are dense: the package compressed-tensors reads no sparse format any more")
        return None
    before, after = note["parameters"]
    print(f"wrote {folder}: {after:,} of {before:,} parameters ({after / before:.1%})")
    print(f"layers kept: {', '.join(map(str, note['layers']))}")
    if took := note.get("decode_us"):
        print(f"a token in {took['after'] / 1e3:.3g} ms, before in {took['before'] / 1e3:.3g} ms")
    return None


def quantize(arguments: argparse.Namespace) -> None:
    """Writes a quantised model as a folder."""
    options = read(commands.Quantize, arguments)
    with stdout_is_json(True):
        from jaxdistill import api

        wanted = api.quantization_of(arguments.model, options)
        path = api.quantize(arguments.model, arguments.output, options)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    print(f"wrote {path}: {wanted}, {size:,} bytes of weights")


def compare(arguments: argparse.Namespace) -> None:
    """Measures models and prints their table."""
    named = []
    for word in arguments.models:
        name, equals, source = word.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"{word!r}: write NAME=MODEL, such as student=runs/tiny@best")
        named.append((name, source))
    options = read(commands.Compare, arguments)
    with stdout_is_json(True):
        from jaxdistill import api, report

        result = api.compare_models(
            named,
            options,
            out=arguments.output,
        )
        page = report.write_story(arguments.output) if arguments.output else None
    if arguments.json:
        return print_json(result)
    print(f"on {result['held_out']}")
    print(report.comparison_table(result["rows"]))
    if page is not None:
        print(f"wrote {page}")
    return None


def harness(arguments: argparse.Namespace) -> None:
    """Runs tasks of lm-eval and prints their metrics."""
    with stdout_is_json(True):
        from jaxdistill import api

        results = api.harness(
            arguments.model,
            arguments.tasks,
            read(commands.Harness, arguments),
        )
    if arguments.json:
        return print_json(results)
    for task, metrics in results.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                print(f"{task:24} {name:32} {value:.4f}")
    return None


def workflow(arguments: argparse.Namespace) -> None:
    """Runs a workflow, or says what it would do."""
    from jaxdistill import api

    if not arguments.dry_run:
        api.run_workflow(arguments.file, start=arguments.start)
        return
    for one in api.workflow_plan(arguments.file, arguments.start):
        print(f"{one.action:6}  {one.step.name} ({one.step.kind}): {one.why}")
