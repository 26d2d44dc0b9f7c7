"""The commands that need no JAX: ls, init, validate and schema."""

import argparse
import math
from collections.abc import Callable, Collection

from jaxdistill.cli.output import print_json, printable
from jaxdistill.errors import ConfigError, StorageError, UserError, check, combined


def ls(arguments: argparse.Namespace) -> None:
    """Lists what there is, with one line on each."""
    if arguments.kind == "runs":
        return _ls_runs(arguments)
    names = {kind: LISTS[kind]() for kind in ([arguments.kind] if arguments.kind else LISTS)}
    if arguments.json:
        return print_json(names)
    for kind, entries in names.items():
        print(f"{kind}:")
        width = max(map(len, entries), default=0)
        for name, description in entries.items():
            print(f"  {name:{width}}  {description}")
    return None


def _ls_runs(arguments: argparse.Namespace) -> None:
    """Lists runs: state, method, result, and with --diff what sets them apart."""
    from jaxdistill.cli import run_list

    runs = run_list.found(arguments.folder)
    if arguments.json:
        listing: dict[str, object] = {"runs": [run_list.summary(run) for run in runs]}
        return print_json(listing | {"differences": run_list.differences(runs)})
    if not runs:
        return print(f"{arguments.folder}: holds no runs")
    return print(printable(run_list.page(runs, arguments.diff)))


def init(arguments: argparse.Namespace) -> None:
    """Copies a recipe, with what it extends written out."""
    from jaxdistill.config import editor, inherit, workflow

    files = inherit.recipes()
    if arguments.recipe not in files:
        raise ConfigError(
            f"{arguments.recipe!r} is no recipe{_near(arguments.recipe, files)}; `jaxdistill ls "
            "recipes` lists them"
        )
    text = editor.with_modeline(inherit.flattened(files[arguments.recipe]))
    out = arguments.output or f"{arguments.recipe}.yaml"
    if out == "-":
        return print(text, end="")
    try:
        with open(out, "w" if arguments.force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{out}: exists already; --force overwrites it") from None
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror}") from None
    command = "workflow" if workflow.is_workflow(text) else "train"
    print(f"wrote {out}; next: jaxdistill {command} {out}")
    return None


def validate(arguments: argparse.Namespace) -> int:
    """Checks a configuration, or tells about keys."""
    from jaxdistill import config
    from jaxdistill.config import preflight, syntax, workflow

    if arguments.explain is not None:
        print(config.explain(arguments.explain))
        return 0
    if arguments.config is None:
        raise ConfigError("validate: give a configuration file, or --explain KEY")
    wrong: list[UserError] = []
    text = devices = ""
    notes: list[str] = []
    try:
        if workflow.is_workflow(config.read(arguments.config)):
            if arguments.overrides:
                raise ConfigError(
                    f"{arguments.overrides[0]}: {arguments.config} is a workflow, whose steps have "
                    "overrides of their own: change the file"
                )
            text = syntax.dump(workflow.load(arguments.config).model_dump(mode="json"))
        else:
            loaded = config.load(arguments.config, arguments.overrides)
            wrong, notes = preflight.check(loaded), preflight.notes(loaded)
            text = config.dump(loaded)
            own = None if loaded.teacher is None else loaded.teacher.mesh
            devices = _devices(loaded.mesh.sizes, 0 if own is None else own.devices)
    except ConfigError as error:
        wrong = [error]
    if arguments.json:
        lines = [line for error in wrong for line in str(error).splitlines()]
        print_json({"ok": not wrong, "errors": lines, "notes": notes})
        error = combined(wrong)
        return error.exit_code if error else 0
    check(wrong)
    ok = f"{arguments.config}: ok{devices}"
    print(text.rstrip() if arguments.resolved else "\n".join([*notes, ok]))
    return 0


def schema(arguments: argparse.Namespace) -> None:
    """Prints the JSON Schema of a kind of file."""
    from jaxdistill.config import editor

    print(editor.text(arguments.kind), end="")


def _devices(sizes: Collection[int], teachers: int) -> str:
    """What is left to the start: to count devices takes JAX, and often another machine."""
    count = math.prod(sizes) + teachers
    if -1 in sizes or count == 1:
        return ""
    return f" (for exactly {count} devices, which are counted at the start)"


# The families that jaxdistill.models reads and writes; a test compares the two, because importing
# that module would take seconds.
MODELS = {
    "llama": "Llama 2, 3, 3.1 and 3.2, SmolLM, SmolLM2, TinyLlama",
    "mistral": "Mistral 7B, with its sliding window",
    "qwen2": "Qwen 2 and 2.5",
    "qwen3": "Qwen 3",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2, with its soft caps and alternating windows",
    "gemma3_text": "Gemma 3 1B and the text part of the others' folders",
    "phi3": "Phi-3, Phi-4 and Phi-4-mini, with longrope",
    "gpt2": "GPT-2, DistilGPT-2",
    "gpt_neox": "Pythia, GPT-NeoX",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3, with its windows",
    "smollm3": "SmolLM3, some of whose layers have no positions",
    "granite": "Granite 3 and 4 (dense), with its multipliers",
    "ministral": "Ministral 8B",
    "arcee": "Arcee AFM, its MLP without a gate",
    "glm4": "GLM-4 (0414)",
    "mixtral": "Mixtral, its experts routed without drops",
    "qwen3_moe": "Qwen 3 30B-A3B and other mixtures of experts",
}


def _recipes() -> dict[str, str]:
    """Recipe name -> the first line of its head, below the one for editors."""
    from jaxdistill.config import inherit

    heads = {}
    for name, file in inherit.recipes().items():
        lines = file.read_text(encoding="utf-8").splitlines()
        heads[name] = lines[1].lstrip("# ").strip()
    return heads


def _methods() -> dict[str, str]:
    """Method name -> how far it has come, and what it is."""
    from jaxdistill.methods import METHODS

    return {
        name: f"[{'measured' if method.measured else 'exact'}] {method.options.__doc__}"
        for name, method in METHODS.items()
    }


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": _recipes,
    "methods": _methods,
    "models": lambda: MODELS,
}


def _near(name: str, names: Collection[str]) -> str:
    from jaxdistill.config import keys

    best = keys.nearest(name, names)
    return f'; did you mean "{best}"?' if best else ""
