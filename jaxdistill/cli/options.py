"""The command line: every command with its arguments."""

import argparse
from collections.abc import Callable
from typing import Any

import jaxdistill
from jaxdistill.cli import bench, ckpt, compress, files, launch, reason, runs
from jaxdistill.cli.values import fraction, natural, positive, temperature

EXIT_CODES = """exit codes:
  0 done              5 does not fit           9 cannot write
  2 configuration     6 no good checkpoint     75 asked to stop: `resume` goes on
  3 data              7 diverged               130 interrupted
  4 model/tokenizer   8 lost a process"""

RUN_REFERENCE = (
    "a model folder, a .gguf file, RUN_DIR, RUN_DIR@best, RUN_DIR@latest or RUN_DIR@STEP"
)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="jaxdistill",
        description="Distil language models in JAX.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"jaxdistill {jaxdistill.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        _add_plan,
        _add_train,
        _add_checkpoints,
        _add_compress,
        _add_quantize,
        _add_workflow,
        _add_measure,
        _add_reason,
        _add_results,
        _add_start,
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable, description: str) -> argparse.ArgumentParser:
    """A subcommand that knows its function and its own parser."""
    parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON value on stdout")


def _add_row_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq-len", metavar="TOKENS", type=positive, default=1024)
    parser.add_argument("--batch-size", metavar="ROWS", type=positive, default=8)


def _add_plan(commands: Any) -> None:
    plan = _command(
        commands,
        "plan",
        runs.plan,
        "Compile the step of a configuration for devices that need not be here, and say whether it "
        "fits, what it moves and how fast it can be at most.",
    )
    plan.add_argument("config", metavar="CONFIG", help="YAML file; weights and data are not read")
    plan.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as mesh.tensor=2")
    plan.add_argument(
        "--target",
        required=True,
        help="what to compile for: tpu:v5p:2x2x4 or tpu:v5e:4x4 (chips; needs the package libtpu), "
        "gpu:h100:8 (needs JAX's CUDA plugin, no GPU), or cpu:8",
    )
    plan.add_argument(
        "--tries",
        metavar="N",
        type=natural,
        default=8,
        help="how many changes to compile if it does not fit; default 8, 0 for none",
    )
    _add_json(plan)


def _add_train(commands: Any) -> None:
    train = _command(commands, "train", runs.train, "Train a student from a configuration file.")
    train.add_argument("config", metavar="CONFIG", help="YAML file; `jaxdistill init` writes one")
    train.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as train.steps=20")
    _add_json(train)
    resume = _command(commands, "resume", runs.resume, "Go on with a run that was stopped.")
    resume.add_argument("run_dir", metavar="RUN_DIR")
    _add_json(resume)
    _add_launch(commands)


def _add_launch(commands: Any) -> None:
    start = _command(
        commands, "launch", launch.launch, "Run train or resume in several processes here."
    )
    start.add_argument(
        "-n", dest="processes", metavar="N", type=positive, required=True, help="processes"
    )
    start.add_argument(
        "--devices-per-process",
        metavar="K",
        type=positive,
        default=1,
        help="process P has GPUs P * K to P * K + K - 1, or K CPU devices; default: 1",
    )
    start.add_argument(
        "--restart",
        metavar="R",
        type=natural,
        default=0,
        help="go on with the run up to R times after a process was lost; default: 0",
    )
    start.add_argument("--log-dir", metavar="DIR", help="keep what each process says there")
    start.add_argument(
        "words",
        metavar="-- COMMAND",
        nargs=argparse.REMAINDER,
        help="train CONFIG [KEY=VALUE ...], or resume RUN_DIR",
    )


def _add_checkpoints(commands: Any) -> None:
    text = "Look at a run's checkpoints, or go back to one."
    group = commands.add_parser("ckpt", help=text, description=text)
    below = group.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, run, said in (
        ("ls", ckpt.ls, "List them: step, time, size, metrics."),
        ("verify", ckpt.verify, "Read every file against its checksum; exit 6 at damage."),
        ("rollback", ckpt.rollback, "Put the ones after STEP aside; resume goes on from STEP."),
    ):
        parser = _command(below, name, run, said)
        parser.add_argument("run_dir", metavar="RUN_DIR")
        if name == "rollback":
            parser.add_argument("step", metavar="STEP", type=positive)
        else:
            _add_json(parser)


def _add_compress(commands: Any) -> None:
    score = _command(
        commands, "importance", compress.importance, "Measure what a model's units are worth."
    )
    score.add_argument("model", metavar="MODEL", help=RUN_REFERENCE)
    _add_calibration(score, required=True)
    score.add_argument("-o", "--output", metavar="FILE", required=True)
    prune = _command(commands, "prune", compress.prune, "Cut a smaller model out of a model.")
    prune.add_argument("model", metavar="MODEL", help=RUN_REFERENCE)
    prune.add_argument("-o", "--output", metavar="DIR", required=True)
    for name in ("layers", "embed", "mlp", "heads", "kv-heads", "experts"):
        prune.add_argument(f"--{name}", metavar="N", type=positive, help="how many stay")
    prune.add_argument("--parameters", metavar="BUDGET", help="such as 60%% or 80M, for sizes")
    prune.add_argument("--memory", metavar="BUDGET", help="of bfloat16 weights: 4GiB or 50%%")
    prune.add_argument(
        "--latency", metavar="BUDGET", help="of a token of one row, measured here: 12ms or 60%%"
    )
    prune.add_argument(
        "--axes", metavar="AXIS", nargs="+", default=("embed", "mlp"), help="shrink for a budget"
    )
    prune.add_argument(
        "--by",
        choices=("influence", "loss", "range", "range_loss"),
        default="range",
        help="how layers are chosen; default: those in a row that change the hidden states least",
    )
    prune.add_argument("--importance", metavar="FILE", help="measured before, for any size")
    prune.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the model's")
    _add_calibration(prune, required=False)
    _add_json(prune)


def _add_quantize(commands: Any) -> None:
    quantize = _command(
        commands, "quantize", compress.quantize, "Write a model folder in 8-bit or 4-bit numbers."
    )
    quantize.add_argument("model", metavar="MODEL", help=RUN_REFERENCE)
    quantize.add_argument("-o", "--output", metavar="DIR", required=True)
    quantize.add_argument(
        "--scheme",
        choices=("int8", "int4", "int8_dynamic"),
        default="int8",
        help="int8 and int4 round the weights of the layers, int8_dynamic their inputs too",
    )
    quantize.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of everything else; default: as trained"
    )


def _add_workflow(commands: Any) -> None:
    flow = _command(
        commands, "workflow", compress.workflow, "Run the steps of a workflow file that are due."
    )
    flow.add_argument("file", metavar="FILE", help="YAML; see configs/compress_smollm2.yaml")
    flow.add_argument("--from", dest="start", metavar="STEP", help="run this step and all after it")
    flow.add_argument("--dry-run", action="store_true", help="only say what would be done")


def _add_calibration(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--data",
        metavar="PATH",
        action="append",
        default=None,
        required=required,
        help="calibration text; may be given several times",
    )
    parser.add_argument("--rows", metavar="ROWS", type=positive, default=1024)
    _add_row_sizes(parser)
    parser.add_argument(
        "--without",
        metavar="N",
        type=positive,
        nargs="+",
        default=(),
        help="also measure the loss without N layers in a row, wherever they are",
    )


def _add_measure(commands: Any) -> None:
    evaluate = _command(commands, "eval", runs.evaluate, "Measure a model on held-out data.")
    evaluate.add_argument("model", metavar="MODEL", help=RUN_REFERENCE)
    evaluate.add_argument("--teacher", metavar="MODEL", help="measure agreement with this model")
    evaluate.add_argument(
        "--data", metavar="PATH", action="append", help="may be given several times"
    )
    _add_tasks(evaluate)
    evaluate.add_argument(
        "--format", choices=("auto", "text", "messages", "completion"), default="auto"
    )
    evaluate.add_argument("--loss-on", choices=("all", "completion", "assistant"), default="all")
    _add_row_sizes(evaluate)
    evaluate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    evaluate.add_argument("--max-rows", metavar="ROWS", type=positive, help="default: all")
    _add_json(evaluate)
    compare = _command(commands, "compare", compress.compare, "Measure several models together.")
    compare.add_argument("models", metavar="NAME=MODEL", nargs="+", help="one name twice: seeds")
    compare.add_argument("--teacher", metavar="MODEL", help="measure agreement with this model")
    compare.add_argument("--data", metavar="PATH", action="append", required=True)
    compare.add_argument(
        "--questions", metavar="FILE", help="multiple choice; `texts` makes it out of the data"
    )
    compare.add_argument("-p", "--prompt", metavar="TEXT", action="append", default=[])
    _add_row_sizes(compare)
    compare.add_argument("--max-rows", metavar="ROWS", type=positive, help="default: all")
    compare.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    compare.add_argument("--no-speed", action="store_true", help="leave latencies out")
    compare.add_argument(
        "-o", "--output", metavar="DIR", help="also write its numbers and a page there"
    )
    _add_json(compare)
    harness = _command(commands, "harness", compress.harness, "Run lm-eval's tasks on a model.")
    harness.add_argument("model", metavar="MODEL", help=RUN_REFERENCE)
    harness.add_argument("--tasks", metavar="TASK", nargs="+", required=True)
    harness.add_argument("--limit", metavar="N", type=positive, help="documents of each task")
    harness.add_argument("--num-fewshot", metavar="N", type=natural)
    harness.add_argument("--batch-size", metavar="ROWS", type=positive, default=8)
    _add_json(harness)
    _add_generate(commands)
    measured = _command(
        commands, "bench", bench.run, "Measure the losses on this device, beside other forms."
    )
    bench.add(measured)
    _add_json(measured)


def _add_generate(commands: Any) -> None:
    generate = _command(commands, "generate", runs.generate, "Let a model complete prompts.")
    generate.add_argument("model", metavar="MODEL", help=RUN_REFERENCE)
    generate.add_argument(
        "-p", "--prompt", metavar="TEXT", action="append", help="default: standard input"
    )
    generate.add_argument(
        "--chat", action="store_true", help="the prompt is the user's turn of a chat"
    )
    generate.add_argument("--max-new-tokens", metavar="N", type=positive, default=128)
    generate.add_argument(
        "--temperature", metavar="T", type=temperature, default=0.0, help="default 0: greedy"
    )
    generate.add_argument("--top-k", metavar="K", type=positive)
    generate.add_argument("--top-p", metavar="P", type=fraction)
    generate.add_argument("--min-p", metavar="P", type=fraction)
    generate.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="ends an answer; several may"
    )
    generate.add_argument("--seed", type=natural, default=0)
    _add_json(generate)


def _add_tasks(evaluate: argparse.ArgumentParser) -> None:
    """Options of `eval --tasks`."""
    about = evaluate.add_argument_group("tasks with a right answer, in place of --data")
    about.add_argument(
        "--tasks", metavar="TASK", nargs="+", help="such as svamp gsm8k aqua bbh_navigate"
    )
    about.add_argument(
        "--task-data", metavar="DIR", help="published files; default: as $JAXDISTILL_DATA"
    )
    about.add_argument(
        "--style", default="plain", help="plain, zero_shot, few_shot, predict, chat ..."
    )
    about.add_argument("--exemplars", metavar="FILE", help="worked examples, or the preamble")
    about.add_argument("--self-consistency", metavar="K", type=natural, default=0, help="votes")
    about.add_argument("--temperature", metavar="T", type=temperature, default=0.7, help="of votes")
    about.add_argument("--max-new-tokens", metavar="N", type=positive, default=128)
    about.add_argument("--limit", metavar="N", type=positive, help="questions of each task")
    about.add_argument("--seed", type=natural, default=0)
    about.add_argument("-o", "--output", metavar="DIR", help="write every answer there")


def _add_reason(commands: Any) -> None:
    text = "Let a teacher explain: rationales, filtered, as training data."
    teacher = commands.add_parser("teacher", help=text, description=text)
    below = teacher.add_subparsers(dest="action", metavar="ACTION", required=True)
    ask = _command(below, "generate", reason.teacher_generate, text)
    ask.add_argument("config", metavar="CONFIG", help="YAML file: teacher, task, prompt, sampling")
    ask.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="such as limit=100")
    ask.add_argument(
        "-n", "--samples", metavar="N", type=positive, help="answers per question; default: as set"
    )
    _add_json(ask)
    serve = _command(commands, "serve", reason.serve, "Serve a model by OpenAI's protocol.")
    serve.add_argument("model", metavar="MODEL", help=RUN_REFERENCE)
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    serve.add_argument("--port", type=natural, default=8000, help="0 takes a free one")
    serve.add_argument("--slots", metavar="ROWS", type=positive, default=32, help="at a time")
    serve.add_argument("--length", metavar="TOKENS", type=positive, help="prompt and answer")
    serve.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    serve.add_argument("--key-env", metavar="NAME", help="variable with the key clients must send")


def _add_results(commands: Any) -> None:
    export = _command(
        commands, "export", runs.export, "Write a model folder that transformers opens."
    )
    export.add_argument("model", metavar="RUN", help=RUN_REFERENCE)
    export.add_argument("-o", "--output", metavar="DIR", required=True)
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as trained")
    export.add_argument(
        "--adapters",
        action="store_true",
        help="the LoRA adapters alone, in the format of the package peft; default: merged",
    )
    report = _command(
        commands, "report", runs.report, "Write one HTML page about runs, or about a workflow."
    )
    report.add_argument("run_dirs", metavar="RUN_DIR", nargs="+")
    report.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="default: report.html in the run folder, comparison.html for several",
    )


def _add_start(commands: Any) -> None:
    validate = _command(
        commands,
        "validate",
        files.validate,
        "Check a configuration and the paths in it, training nothing.",
    )
    validate.add_argument("config", metavar="CONFIG", nargs="?")
    validate.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    what = validate.add_mutually_exclusive_group()
    what.add_argument("--schema", action="store_true", help="print the JSON schema, for editors")
    what.add_argument(
        "--explain", metavar="KEY", help='say what a key means; "" lists the sections'
    )
    what.add_argument("--resolved", action="store_true", help="print it with every default")
    what.add_argument("--json", action="store_true", help="print one JSON value on stdout")
    init = _command(commands, "init", files.init, "Copy a recipe to start from.")
    init.add_argument("recipe", metavar="RECIPE", help="`jaxdistill ls recipes` lists them")
    init.add_argument(
        "-o", "--output", metavar="FILE", help="default: RECIPE.yaml; - is standard output"
    )
    init.add_argument("--force", action="store_true", help="overwrite the file")
    ls = _command(commands, "ls", files.ls, "List recipes, methods and models.")
    ls.add_argument("kind", choices=tuple(files.LISTS), nargs="?")
    _add_json(ls)
