"""Tasks with a question, one right answer and a way to judge it: from local files or generated.

svamp  svamp_train  gsm8k  gsm8k_train  aqua  aqua_dev  bbh_NAME      published files
arithmetic?count=200&terms=3&digits=1&seed=0                          generated
gym:NAME?count=100&seed=0                                             reasoning-gym, an extra
FILE.jsonl?kind=number                                                objects with question, answer
"""

import dataclasses
import importlib
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxdistill.data.rules import text_problem
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.reasoning import extract, prompts, verifiers
from jaxdistill.safe import json_file

BBH = {
    "boolean_expressions": "text",
    "date_understanding": "choice",
    "multistep_arithmetic_two": "number",
    "navigate": "yes_no",
    "object_counting": "number",
    "word_sorting": "text",
}


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      id: names it within its task, whatever else is read.
      question: what is asked.
      gold: the right answer.
      rationale: a worked solution, where there is one.
    """

    id: str
    question: str
    gold: str
    rationale: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of questions of one kind.

    Attributes:
      name: as it was asked for.
      kind: of answer, of `extract.KINDS`.
      items: the questions.
      choices: letters of the options, for `choice`.
    """

    name: str
    kind: str
    items: tuple[Item, ...]
    choices: str = "ABCDE"

    def second_stage(self, prompt: str, rationale: str) -> str:
        """The second question of zero-shot CoT, which asks for the answer alone."""
        return prompts.second_stage(prompt, rationale, self.kind, self.choices)

    def verifier(self) -> verifiers.VerifierFunction:
        """Judges a completion by the task's kind of answer."""
        return verifiers.exact(self.kind, choices=self.choices)


def data_folder() -> pathlib.Path:
    """Where published files are looked for: $JAXDISTILL_DATA, else the folder `data`."""
    return pathlib.Path(os.environ.get("JAXDISTILL_DATA", "data"))


def load(name: str, *, folder: str | pathlib.Path | None = None, limit: int | None = None) -> Task:
    """Reads or makes a task.

    Args:
      name: see above.
      folder: where published files lie; None: `data_folder`.
      limit: only so many items, the first.

    Raises:
      ConfigError: for an unknown name or option.
      DataError: if its file is missing or damaged; says where it comes from.
    """
    base, _, query = name.partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    root = data_folder() if folder is None else pathlib.Path(folder)
    if base == "arithmetic":
        task = _arithmetic(name, options)
    elif base.startswith("gym:"):
        task = _gym(name, base.removeprefix("gym:"), options)
    elif base.endswith(".jsonl"):
        task = _own(name, pathlib.Path(base), options)
    else:
        reader = _published(base)
        if options:
            raise ConfigError(f"task {name!r}: {base} takes no options")
        task = dataclasses.replace(reader(root), name=name)
    if not task.items:
        raise DataError(f"task {name!r}: has no questions")
    return dataclasses.replace(task, items=task.items[:limit])


def _published(base: str) -> Callable[[pathlib.Path], Task]:
    readers: Mapping[str, Callable[[pathlib.Path], Task]] = {
        "svamp": lambda root: _svamp(root, "test"),
        "svamp_train": lambda root: _svamp(root, "train"),
        "gsm8k": lambda root: _gsm8k(root, "test"),
        "gsm8k_train": lambda root: _gsm8k(root, "train"),
        "aqua": lambda root: _aqua(root, "test"),
        "aqua_dev": lambda root: _aqua(root, "dev"),
        **{f"bbh_{one}": lambda root, one=one: _bbh(root, one) for one in BBH},
    }
    if base not in readers:
        raise ConfigError(
            f"task {base!r}: unknown; use one of {', '.join(readers)}, arithmetic, gym:NAME or a "
            ".jsonl file"
        )
    return readers[base]


def _read(path: pathlib.Path, source: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error.__class__.__name__}); put the file of {source} there, "
            "or set JAXDISTILL_DATA to the folder that has it"
        ) from error


def _lines(path: pathlib.Path, source: str) -> list[Any]:
    rows = []
    # `splitlines` would cut at U+2028 and others, which JSON allows within a text.
    for number, line in enumerate(_read(path, source).split("\n"), start=1):
        try:
            rows += [json_file.parse(line)] if line.strip() else []
        except ValueError as error:
            raise DataError(f"{path}:{number}: bad JSON: {str(error)[:200]}") from error
    return rows


def _fields(row: Any, names: tuple[str, ...], path: pathlib.Path, number: int) -> list[str]:
    for name in names:
        if not isinstance(row, dict) or not isinstance(row.get(name), str | int | float):
            raise DataError(f"{path}:{number}: field `{name}` must be a text or a number")
    texts = [str(row[name]) for name in names]
    for name, text in zip(names, texts, strict=True):
        if fault := text_problem(text):
            raise DataError(f"{path}:{number}: field `{name}` {fault}")
    return texts


def _svamp(root: pathlib.Path, split: str) -> Task:
    path = root / "dss" / "svamp" / f"svamp_{split}.json"
    items = []
    for number, row in enumerate(_lines(path, "google-research/distilling-step-by-step"), start=1):
        question, label = _fields(row, ("input", "label"), path, number)
        items.append(Item(f"{split}-{number}", question.replace("\n", ". "), label))
    return Task("svamp", "expression", tuple(items))


def _gsm8k(root: pathlib.Path, split: str) -> Task:
    path = root / "gsm8k" / f"{split}.jsonl"
    items = []
    for number, row in enumerate(_lines(path, "openai/grade-school-math"), start=1):
        question, solution = _fields(row, ("question", "answer"), path, number)
        rationale, _, gold = solution.partition("####")
        items.append(Item(f"{split}-{number}", question, gold.strip(), rationale.strip()))
    return Task("gsm8k", "number", tuple(items))


def _aqua(root: pathlib.Path, split: str) -> Task:
    path = root / "aqua" / f"{split}.json"
    items = []
    for number, row in enumerate(_lines(path, "google-deepmind/AQuA"), start=1):
        question, gold = _fields(row, ("question", "correct"), path, number)
        given = row.get("options", [])
        if not isinstance(given, list):
            raise DataError(f"{path}:{number}: field `options` must be a list")
        options = " ".join(f"({option}".replace(")", ") ", 1) for option in given)
        asked = f"{question} Answer Choices: {options}"
        items.append(Item(f"{split}-{number}", asked, gold, str(row.get("rationale", ""))))
    return Task("aqua", "choice", tuple(items))


def _bbh(root: pathlib.Path, name: str) -> Task:
    path = root / "bbh" / "bbh" / f"{name}.json"
    try:
        rows = json_file.parse(_read(path, "suzgunmirac/BIG-Bench-Hard"))["examples"]
        if not isinstance(rows, list):
            raise ValueError("`examples` is no list")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no BIG-Bench Hard file: {error}") from error
    items = []
    for number, row in enumerate(rows, start=1):
        question, gold = _fields(row, ("input", "target"), path, number)
        items.append(Item(f"{name}-{number}", question, gold))
    return Task(f"bbh_{name}", BBH[name], tuple(items), choices="ABCDEF")


def _own(name: str, path: pathlib.Path, options: dict[str, str]) -> Task:
    kind = options.pop("kind", "number")
    if options or kind not in extract.KINDS:
        raise ConfigError(f"task {name!r}: takes kind, one of {', '.join(extract.KINDS)}")
    items: dict[str, Item] = {}
    for number, row in enumerate(_lines(path, "your questions"), start=1):
        question, gold = _fields(row, ("question", "answer"), path, number)
        item = Item(str(row.get("id", number)), question, gold, str(row.get("rationale", "")))
        if item.id in items:
            raise DataError(f"{path}:{number}: id {item.id[:60]!r}: another question has it")
        if gold and not extract.is_answer(gold, kind):
            raise DataError(
                f"{path}:{number}: answer {gold[:60]!r}: no {kind}, so nothing could be right: "
                f"mend it, or name its kind, as in {path.name}?kind=text"
            )
        items[item.id] = item
    return Task(name, kind, tuple(items.values()))


def _numbers(name: str, options: dict[str, str], defaults: dict[str, int]) -> dict[str, int]:
    """Whole-number options over their defaults, each at least 0."""
    for key, value in options.items():
        if key not in defaults or not value.isascii() or not value.isdecimal() or len(value) > 9:
            raise ConfigError(
                f"task {name!r}: option {key}={value!r}: takes whole numbers for "
                f"{', '.join(defaults)}"
            )
    return defaults | {key: int(value) for key, value in options.items()}


def _arithmetic(name: str, options: dict[str, str]) -> Task:
    """Sums, differences and products of small numbers, worked from left to right."""
    sizes = _numbers(name, options, {"count": 200, "terms": 3, "digits": 1, "seed": 0})
    if not 2 <= sizes["terms"] <= 12 or not 1 <= sizes["digits"] <= 4 or sizes["count"] > 10**6:
        raise ConfigError(f"task {name!r}: terms must be 2 to 12, digits 1 to 4, count up to 1e6")
    rng = np.random.default_rng(sizes["seed"])
    items = []
    for number in range(sizes["count"]):
        terms = rng.integers(1, 10 ** sizes["digits"], sizes["terms"]).tolist()
        signs = rng.choice(["+", "-", "*"], sizes["terms"] - 1, p=[0.45, 0.4, 0.15]).tolist()
        value, text, steps = terms[0], str(terms[0]), []
        for sign, term in zip(signs, terms[1:], strict=True):
            result = {"+": value + term, "-": value - term, "*": value * term}[sign]
            steps.append(f"{value} {sign} {term} = {result}.")
            value, text = result, f"{text} {sign} {term}"
        question = f"Work from left to right: {text}"
        items.append(Item(f"{sizes['seed']}-{number}", question, str(value), " ".join(steps)))
    return Task(name, "number", tuple(items))


def _gym(name: str, dataset: str, options: dict[str, str]) -> Task:
    sizes = _numbers(name, options, {"count": 100, "seed": 0})
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ConfigError(
            f"task {name!r}: needs reasoning-gym, which is not installed: pip install "
            "'jaxdistill[gym]'"
        ) from error
    try:
        rows = list(gym.create_dataset(dataset, size=sizes["count"], seed=sizes["seed"]))
    except ValueError as error:
        raise ConfigError(f"task {name!r}: {error}") from error
    if any(row["answer"] is None for row in rows):
        raise ConfigError(
            f"task {name!r}: has questions with several right answers, and answers are judged by "
            "their one right spelling: take another dataset"
        )
    items = [
        Item(f"{dataset}-{number}", str(row["question"]), str(row["answer"]))
        for number, row in enumerate(rows)
    ]
    numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", item.gold, re.ASCII) for item in items)
    return Task(name, "number" if numbers else "text", tuple(items))
