"""The commands that run models: train, resume, eval, generate, export and report."""

import argparse
import os
import sys

from jaxdistill.cli.output import print_json, print_run, printable, stdout_is_json
from jaxdistill.errors import ConfigError


def train(arguments: argparse.Namespace) -> None:
    """Checks a configuration and runs it."""
    from jaxdistill import config
    from jaxdistill.config import preflight

    text = config.read(arguments.config)
    loaded = config.loads(text, arguments.config, arguments.overrides)
    errors = preflight.check(loaded)
    if errors:
        raise preflight.combine(errors)
    with stdout_is_json(arguments.json):
        from jaxdistill import engine

        result = engine.train(loaded, input_text=text, overrides=arguments.overrides)
    print_run(result, arguments.json)


def resume(arguments: argparse.Namespace) -> None:
    """Goes on with a run."""
    with stdout_is_json(arguments.json):
        from jaxdistill import engine

        result = engine.resume(arguments.run_dir)
    print_run(result, arguments.json)


def evaluate(arguments: argparse.Namespace) -> None:
    """Measures a model on data."""
    with stdout_is_json(arguments.json):
        from jaxdistill import engine

        metrics = engine.evaluate(
            arguments.model,
            teacher=arguments.teacher,
            data=arguments.data,
            format=arguments.format,
            loss_on=arguments.loss_on,
            seq_len=arguments.seq_len,
            batch_size=arguments.batch_size,
            max_rows=arguments.max_rows,
        )
    if arguments.json:
        return print_json(metrics)
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        print(f"{name:{width}}  {shown}")
    return None


def generate(arguments: argparse.Namespace) -> None:
    """Completes prompts, after loading has told on stderr what it has to tell."""
    prompts = arguments.prompt or [sys.stdin.read()]
    if not all(prompts):
        raise ConfigError("generate: the prompt is empty; give -p TEXT or text on standard input")
    with stdout_is_json(True):
        from jaxdistill import models

        model = models.load(arguments.model)
        texts = model.generate(
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
    if arguments.json:
        pairs = zip(prompts, texts, strict=True)
        return print_json([{"prompt": prompt, "text": text} for prompt, text in pairs])
    print("\n\n".join(printable(text) for text in texts))
    return None


def export(arguments: argparse.Namespace) -> None:
    """Writes a run's model as a folder."""
    with stdout_is_json(True):
        from jaxdistill import engine

        engine.export(arguments.model, arguments.output, dtype=arguments.dtype)
    print(f"wrote {arguments.output}")


def report(arguments: argparse.Namespace) -> None:
    """Writes the page about one or several runs."""
    from jaxdistill.report import html

    out = arguments.output
    if out is None:
        alone = len(arguments.run_dirs) == 1
        out = os.path.join(arguments.run_dirs[0], "report.html") if alone else "report.html"
    html.build(arguments.run_dirs, out)
    print(f"wrote {out}")
