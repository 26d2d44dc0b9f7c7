"""The commands that run models: plan, train, resume, eval, generate, export and report."""

import argparse
import pathlib
import signal
import sys
from collections.abc import Collection, Sequence
from typing import Any

from jaxdistill import commands, errors
from jaxdistill.cli import reason
from jaxdistill.cli.derive import read
from jaxdistill.cli.output import print_json, print_run, printable, stdout_is_json
from jaxdistill.errors import ConfigError, FitError, ModelError, Preempted
from jaxdistill.train import stopping


def plan(arguments: argparse.Namespace) -> int:
    """Compiles the step for a target and prints what it asks of each device."""
    from jaxdistill import config
    from jaxdistill.plan import targets

    options = read(commands.Plan, arguments)
    targets.check(targets.parse(options.target))  # before anything heavy is imported
    loaded = config.load(arguments.config, arguments.overrides)
    with stdout_is_json(True):
        from jaxdistill import api
        from jaxdistill.plan import describe

        notice = lambda line: print(line, file=sys.stderr, flush=True)
        limits = {"tries": options.tries, "minutes": options.minutes}
        planned = api.plan(loaded, options.target, **limits, notice=notice)
    if arguments.json:
        print_json(planned)
    else:
        print(describe(planned))
    return 0 if planned["fits"] else FitError.exit_code


def train(arguments: argparse.Namespace) -> int:
    """Checks a configuration and runs it."""
    from jaxdistill import config
    from jaxdistill.config import preflight

    text = config.read(arguments.config)
    loaded = config.loads(text, arguments.config, arguments.overrides)
    errors.check(preflight.check(loaded))
    # From before the imports, which take seconds: a signal means the same at any moment.
    stop = stopping.Stop()
    try:
        with stopping.listening() as stop, stdout_is_json(arguments.json):
            from jaxdistill import api

            result = api.train(
                loaded, input_text=text, overrides=arguments.overrides, hooks=arguments.hooks
            )
    except Preempted:
        if stop.asked is None or (pathlib.Path(loaded.run.dir) / "RUN.json").exists():
            raise
        print(f"stopped: {stop.asked}: before the run began: start it again", file=sys.stderr)
        return 128 + signal.Signals[stop.asked]
    _print_run(result, arguments.json)
    return 0


def resume(arguments: argparse.Namespace) -> None:
    """Resumes a run."""
    with stopping.listening(), stdout_is_json(arguments.json):
        from jaxdistill import api

        result = api.resume(
            arguments.run_dir,
            arguments.overrides,
            from_start=arguments.from_start,
            hooks=arguments.hooks,
        )
    _print_run(result, arguments.json)


def sweep(arguments: argparse.Namespace) -> None:
    """Runs a configuration at every combination of the values that overrides list."""
    with stopping.listening(), stdout_is_json(arguments.json):
        from jaxdistill import api, report

        found = api.sweep(arguments.config, arguments.overrides, arguments.output)
        if not arguments.json and found["rows"]:
            print(report.comparison_table(found["rows"]))
    if arguments.json:
        return print_json(found)
    print(f"sweep folder: {found['dir']}")
    return None


def _print_run(result: Any, as_json: bool) -> None:
    """What a run left; of several processes one tells it."""
    from jaxdistill import agree

    if agree.leads():
        print_run(result, as_json)


# The tasks' answers are written batch_size at a time, by a model of dtype.
_OF_DATA = set(commands.Evaluate.model_fields) - {"data", "batch_size", "dtype"}
_OF_TASKS = {*commands.Tasks.model_fields, "task_data", "output"}


def _idle(arguments: argparse.Namespace, used: str, names: Collection[str]) -> None:
    """Refuses options without effect beside the one that is used."""
    for name in sorted(names):
        if getattr(arguments, name) != arguments.parser.get_default(name):
            option = name.replace("_", "-")
            raise ConfigError(f"eval: --{option}: has no effect with {used}: leave it out")


def evaluate(arguments: argparse.Namespace) -> None:
    """Measures a model on data, or on tasks with a right answer."""
    if (arguments.tasks is None) == (arguments.data is None):
        raise ConfigError(
            "eval: give --data, for perplexity, or --tasks, for accuracy; one of them"
        )
    if arguments.tasks is not None:
        _idle(arguments, "--tasks", _OF_DATA)
        return reason.evaluate_tasks(arguments)
    _idle(arguments, "--data", _OF_TASKS)
    options = read(commands.Evaluate, arguments)
    with stdout_is_json(arguments.json):
        from jaxdistill import api

        metrics = api.evaluate(arguments.model, options)
    if arguments.json:
        return print_json(metrics)
    metrics.pop("eval/reliability")  # bars of a diagram, for --json
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        print(f"{name:{width}}  {shown}")
    return None


def generate(arguments: argparse.Namespace) -> None:
    """Completes prompts, or answers them as the user's turn of a chat."""
    prompts = arguments.prompt or [sys.stdin.read()]
    if not all(prompts):
        raise ConfigError("generate: the prompt is empty: give -p TEXT or text on standard input")
    settings = read(commands.Generate, arguments).model_dump()
    with stdout_is_json(True):
        from jaxdistill import api

        model = api.load(arguments.model).consume_per_layer()
        if arguments.chat:
            ids = model.generate(_chat_tokens(model, prompts), **settings)
            texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        else:
            texts = model.generate(prompts, **settings)
    if arguments.json:
        pairs = zip(prompts, texts, strict=True)
        return print_json([{"prompt": prompt, "text": text} for prompt, text in pairs])
    print("\n\n".join(printable(str(text)) for text in texts))
    return None


def _chat_tokens(model: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt as the user's turn of a chat that the model is to go on with."""
    if model.tokenizer is None or not model.tokenizer.chat_template:
        raise ModelError(f"{model.source}: has no chat template: leave --chat out")
    from jaxdistill.data.prompting import Prompter

    prompter = Prompter(model.tokenizer)
    return [prompter.turns([{"role": "user", "content": prompt}]) for prompt in prompts]


def export(arguments: argparse.Namespace) -> None:
    """Writes a run's model as a folder."""
    options = read(commands.Export, arguments)
    with stdout_is_json(True):
        from jaxdistill import api
        from jaxdistill.formats import hub

        if arguments.push is not None:
            hub.check(arguments.push)
        if arguments.adapters and (options.dtype or options.format != "folder"):
            raise ConfigError(
                "--dtype, --format: adapters are written as they are trained: leave it out"
            )
        if arguments.adapters:
            path = api.export_adapters(arguments.model, arguments.output)
        else:
            path = api.export(arguments.model, arguments.output, options)
        aim = api.trained_for(arguments.model)
    print(f"wrote {path}")
    if aim is not None:
        print(
            f"trained to be {aim}: `jaxdistill quantize {arguments.model} -o FOLDER` writes it so"
        )
    if arguments.push is not None:
        print(f"uploaded: {hub.push(path, arguments.push)}")


def report(arguments: argparse.Namespace) -> None:
    """Writes the page about runs, about a workflow or a comparison, or about answers to tasks."""
    from jaxdistill.report import html, story, sweep

    if len(arguments.run_dirs) == 1 and sweep.is_sweep(arguments.run_dirs[0]):
        print(f"wrote {sweep.write(arguments.run_dirs[0], arguments.output)}")
        return
    if all((pathlib.Path(folder) / "tasks.json").is_file() for folder in arguments.run_dirs):
        from jaxdistill.report import answers

        print(f"wrote {answers.write_answers(arguments.run_dirs, arguments.output)}")
        return
    if len(arguments.run_dirs) == 1 and story.is_story(arguments.run_dirs[0]):
        print(f"wrote {story.write_story(arguments.run_dirs[0], arguments.output)}")
        return
    print(f"wrote {html.build(arguments.run_dirs, arguments.output)}")
