"""The command line: every command, what it does, and which sections of options it takes."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jaxdistill
from jaxdistill import commands
from jaxdistill.cli import (
    bench,
    ckpt,
    completion,
    compress,
    data,
    derive,
    files,
    launch,
    reason,
    runs,
    teacher,
)
from jaxdistill.cli.sections import (
    AdaptersOnly,
    Clean,
    ClientKey,
    HarnessTasks,
    Launch,
    Listed,
    ModelArgument,
    NamedModels,
    OptionalFolder,
    OutputFile,
    OutputFolder,
    Pages,
    PromptTexts,
    Push,
    Recipe,
    Resume,
    Rollback,
    RunFile,
    RunFolder,
    Samples,
    Schema,
    Shell,
    StoredTeacher,
    SweepFile,
    TaskSource,
    WorkflowFile,
)
from jaxdistill.section import Section

EXIT_CODES = """exit codes:
  0 done              5 does not fit           9 cannot write
  2 configuration     6 no good checkpoint     75 asked to stop: `resume` goes on
  3 data              7 diverged               130 interrupted
  4 model/tokenizer   8 lost a process         141 nobody reads what it prints"""


@dataclass(frozen=True)
class Command:
    """A row of the command line.

    Attributes:
      name: what is typed, such as "train" or "ckpt ls".
      run: takes the parsed arguments; returns an exit code, or None for 0.
      about: one sentence.
      takes: its sections of options.
      json: whether --json prints one JSON value in place of text.
      lasts: whether its work is in files, or for others, and does not end when nobody reads what it
        prints; so it is, too, with whatever is given an --output.
      optional: required fields that something else may stand for here.
      title: section -> heading of its own in the help text.
      more: adds what no section can say.
    """

    name: str
    run: Callable[[argparse.Namespace], int | None]
    about: str
    takes: tuple[type[Section], ...] = ()
    json: bool = True
    lasts: bool = False
    optional: tuple[str, ...] = ()
    title: dict[type[Section], str] | None = None
    more: Callable[[argparse.ArgumentParser], None] | None = None


def _launched(parser: argparse.ArgumentParser) -> None:
    text = "train CONFIG [KEY=VALUE ...], or resume RUN_DIR"
    parser.add_argument("words", metavar="-- COMMAND", nargs=argparse.REMAINDER, help=text)


def _validated(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    text = 'say what a key means; "" lists the sections'
    what.add_argument("--explain", metavar="KEY", help=text)
    what.add_argument("--resolved", action="store_true", help="print it with every default")
    what.add_argument("--json", action="store_true", help="print one JSON value on stdout")


TASKS_TITLE = "tasks with a right answer, in place of --data"
COMMANDS = (
    Command(
        "plan",
        runs.plan,
        "Compile the step of a configuration for devices that need not be here, and say whether it "
        "fits, what it moves and how fast it can be at most.",
        (RunFile, commands.Plan),
    ),
    Command(
        "train", runs.train, "Train a student from a configuration file.", (RunFile,), lasts=True
    ),
    Command("resume", runs.resume, "Resume a run that was stopped.", (Resume,), lasts=True),
    Command(
        "sweep",
        runs.sweep,
        "Train at every combination of several values, one run after the other; resumes.",
        (SweepFile,),
        lasts=True,
    ),
    Command(
        "launch",
        launch.launch,
        "Run train or resume in several processes here.",
        (Launch,),
        lasts=True,
        json=False,
        more=_launched,
    ),
    Command("ckpt ls", ckpt.ls, "List them: step, time, size, metrics.", (RunFolder,)),
    Command(
        "ckpt verify",
        ckpt.verify,
        "Read every file against its checksum; exit 6 at damage.",
        (RunFolder,),
    ),
    Command(
        "ckpt rollback",
        ckpt.rollback,
        "Put the ones after STEP aside; resume starts from STEP.",
        (Rollback,),
        lasts=True,
        json=False,
    ),
    Command(
        "clean",
        ckpt.clean,
        "Say what of a run's folder may go, and with --yes remove it.",
        (Clean,),
        lasts=True,
    ),
    Command(
        "importance",
        compress.importance,
        "Measure what a model's units are worth.",
        (ModelArgument, commands.Importance, OutputFile),
        json=False,
    ),
    Command(
        "prune",
        compress.prune,
        "Cut a smaller model out of a model.",
        (ModelArgument, OutputFolder, commands.Prune, commands.Importance),
        optional=("data",),
        title={commands.Importance: "measuring importance first, in place of --importance"},
    ),
    Command(
        "quantize",
        compress.quantize,
        "Write a model folder in numbers of 8 or 4 bits.",
        (ModelArgument, OutputFolder, commands.Quantize),
        json=False,
    ),
    Command(
        "workflow",
        compress.workflow,
        "Run the steps of a workflow file that are due.",
        (WorkflowFile,),
        lasts=True,
        json=False,
    ),
    Command(
        "eval",
        runs.evaluate,
        "Measure a model on held-out data, or on tasks.",
        (ModelArgument, commands.Evaluate, TaskSource, commands.Tasks),
        optional=("data",),
        title={TaskSource: TASKS_TITLE, commands.Tasks: TASKS_TITLE},
    ),
    Command(
        "compare",
        compress.compare,
        "Measure several models together.",
        (NamedModels, commands.Compare, OptionalFolder),
    ),
    Command(
        "harness",
        compress.harness,
        "Run lm-eval's tasks on a model.",
        (ModelArgument, HarnessTasks, commands.Harness),
    ),
    Command(
        "generate",
        runs.generate,
        "Let a model complete prompts.",
        (ModelArgument, PromptTexts, commands.Generate),
    ),
    Command(
        "bench", bench.run, "Measure the losses on this device, beside other forms.", (bench.Bench,)
    ),
    Command(
        "teacher generate",
        reason.teacher_generate,
        "Ask a teacher for rationales, filtered, as training data.",
        (RunFile, Samples),
        lasts=True,
    ),
    Command(
        "teacher cache",
        teacher.cache,
        "Ask a teacher once about the texts of a run; teacher.cache learns from what it said.",
        (RunFile, commands.TeacherCache),
        lasts=True,
    ),
    Command(
        "teacher cache ls",
        teacher.ls,
        "Say what is stored, of whom, and how large it is.",
        (StoredTeacher,),
    ),
    Command(
        "teacher cache verify",
        teacher.verify,
        "Read every object, ask the teacher again, and print how far the answers are apart.",
        (StoredTeacher, commands.TeacherVerify),
    ),
    Command(
        "data align",
        data.align,
        "Show which tokens of two models spell the same bytes of a text.",
        (commands.Align,),
    ),
    Command(
        "serve",
        reason.serve,
        "Serve a model by OpenAI's protocol.",
        (ModelArgument, commands.Serve, ClientKey),
        lasts=True,
        json=False,
    ),
    Command(
        "export",
        runs.export,
        "Write a model folder that transformers opens.",
        (ModelArgument, OutputFolder, commands.Export, AdaptersOnly, Push),
        json=False,
    ),
    Command(
        "report",
        runs.report,
        "Write one HTML page about runs, or about a workflow.",
        (Pages,),
        lasts=True,
        json=False,
    ),
    Command(
        "validate",
        files.validate,
        "Check a configuration and the paths in it, training nothing.",
        (RunFile,),
        json=False,
        optional=("config",),
        more=_validated,
    ),
    Command("init", files.init, "Copy a recipe to start from.", (Recipe,), json=False),
    Command("ls", files.ls, "List recipes, methods and models, or runs.", (Listed,)),
    Command(
        "schema",
        files.schema,
        "Print the JSON Schema of a file, for editors.",
        (Schema,),
        json=False,
    ),
    Command(
        "completion",
        lambda arguments: print(completion.script(arguments.shell, parser())),
        "Print what makes a shell complete commands, options and settings.",
        (Shell,),
        json=False,
    ),
)
GROUPS = {
    "data": "Look at data as models see them.",
    "ckpt": "Look at a run's checkpoints, or go back to one.",
    "teacher": "Ask a teacher: rationales as training data, or what it says of given text.",
}


class _ArgumentParser(argparse.ArgumentParser):
    """Says which of the words that may stand somewhere was probably meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        from jaxdistill.config.keys import nearest  # as heavy as what an error may cost

        names = [str(choice) for choice in action.choices]
        best = nearest(str(value), names)
        hint = f"did you mean {best}?" if best else f"choose from {', '.join(names)}"
        raise argparse.ArgumentError(action, f"there is no {value!r}: {hint}")


class _TwoWordCommands(_ArgumentParser):
    """Takes the last two of a command's three words as one, which argparse cannot, and `help`.

    So `teacher cache ls DIR` stands beside `teacher cache CONFIG`, and `help train` for
    `train --help`.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if words[:1] == ["help"]:
            words = [*words[1:], "--help"]
        if " ".join(words[:3]) in {one.name for one in COMMANDS if one.name.count(" ") == 2}:
            words = [words[0], " ".join(words[1:3]), *words[3:]]
        return super().parse_known_args(words, namespace)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _TwoWordCommands(
        prog="jaxdistill",
        description="Distil language models in JAX.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"jaxdistill {jaxdistill.__version__}"
    parser.add_argument("--version", action="version", version=version)
    plain: Any = {"parser_class": _ArgumentParser}
    top: Any = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, **plain)
    groups: dict[str, Any] = {}
    for command in COMMANDS:
        first, _, more = command.name.partition(" ")
        group, name = (first, more) if more else ("", first)
        if group and group not in groups:
            outer = top.add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = outer.add_subparsers(dest="action", metavar="ACTION", required=True)
        _add(groups.get(group, top), name, command)
    return parser


def _add(commands: Any, name: str, command: Command) -> None:
    """One command with its options."""
    parser = commands.add_parser(name, help=command.about, description=command.about)
    parser.set_defaults(run=command.run, parser=parser, lasts=command.lasts)
    headings: dict[str, Any] = {}
    for section in command.takes:
        title = (command.title or {}).get(section)
        if title is not None and title not in headings:
            headings[title] = parser.add_argument_group(title)
        place = parser if title is None else headings[title]
        derive.add(place, section, command.optional)
    if command.json:
        parser.add_argument("--json", action="store_true", help="print one JSON value on stdout")
    if command.more is not None:
        command.more(parser)
