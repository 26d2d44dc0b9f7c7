"""Accuracy on tasks with one right answer, greedy and by vote: `jaxdistill eval --tasks`."""

import collections
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxdistill import whole_file
from jaxdistill.data.store import writing
from jaxdistill.engine.references import load_any
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.models import Model
from jaxdistill.reasoning import extract, prompts, rationales, tasks, votes
from jaxdistill.reasoning.asking import Answer, Job, Local, Settings, Teacher, room
from jaxdistill.reasoning.store import write_records
from jaxdistill.sharding import make_mesh

STYLES = ("plain", "zero_shot", "few_shot", "preamble", "predict", "chat")
VOTES = (1, 2, 3, 5, 10, 20, 30, 40, 50, 100)  # k of the curve, as far as there are samples


@dataclasses.dataclass(frozen=True)
class Ask:
    r"""How a task is put to a model.

    Attributes:
      style: `plain`: "Q: ...\nA:"; `zero_shot`: a published trigger, and a second question for the
        answer; `few_shot`: worked examples; `preamble`: a text in front; `predict`: the label task
        of Distilling Step-by-Step; `chat`: the user's turn.
      file: of worked examples or of the preamble.
      trigger: number of the zero-shot trigger.
      samples: drawn per question besides the greedy answer; 0: none.
      temperature: of those.
      max_new_tokens: longest answer.
      seed: of the draws.
      limit: only so many questions.
    """

    style: str = "plain"
    file: str | None = None
    trigger: int = 1
    samples: int = 0
    temperature: float = 0.7
    max_new_tokens: int = 128
    seed: int = 0
    limit: int | None = None


def evaluate(
    model: str | Model,
    names: Sequence[str],
    ask: Ask | None = None,
    *,
    folder: str | None = None,
    slots: int = 32,
    dtype: str = "float32",
    output: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """Accuracy of a model on tasks.

    Args:
      model: a loaded model, or any name `engine.load` understands.
      names: of tasks, see `reasoning.tasks`.
      ask: how they are put; None: plainly, greedy.
      folder: of published files.
      slots: answers that are written at a time.
      dtype: held and computed in.
      output: folder for every answer and for the numbers, or None.

    Returns:
      Per task: questions, greedy and unparsable shares with 95 % intervals, tokens, seconds; with
      samples also maj@k by k, pass@k by k, and their intervals. `not_asked` counts the
      questions that the model could not be asked, such as those longer than its context, with the
      reason of the first: they are among the unparsable.

    Raises:
      UserError: whatever cannot be used.
    """
    ask = Ask() if ask is None else ask
    _check(ask)
    loaded = [tasks.load(name, folder=folder, limit=ask.limit) for name in names]
    for task in loaded:
        unknown = next((item.id for item in task.items if not item.gold), None)
        if unknown is not None:
            raise DataError(f"task {task.name!r}: question {unknown!r} has no right answer")
    if output is not None:
        with writing(pathlib.Path(output)):  # now, and not after hours of answers
            pathlib.Path(output).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output).close()
    load = lambda name: load_any(name, dtype=dtype, mesh=make_mesh()).consume_per_layer()
    used = load(model) if isinstance(model, str) else model
    results = {}
    for task in loaded:
        began = time.monotonic()
        rows = _answers(used, task, ask, slots)
        results[task.name] = _measure(task, rows) | {"seconds": time.monotonic() - began}
        if output is not None:
            _write(pathlib.Path(output), task, rows, results)
    return results


def _check(ask: Ask) -> None:
    """Refuses settings that do not go together."""
    if ask.style not in STYLES:
        raise ConfigError(f"style {ask.style!r}: is not one of {', '.join(STYLES)}")
    if (ask.file is not None) != (ask.style in ("few_shot", "preamble")):
        raise ConfigError(
            f"style {ask.style}: a file belongs to few_shot and preamble, and only there"
        )
    if ask.samples < 0 or (ask.samples and ask.temperature <= 0):
        raise ConfigError(
            f"self-consistency: {ask.samples} samples at temperature {ask.temperature}: needs 0 or "
            "more samples, and a temperature above 0"
        )


@dataclasses.dataclass
class Row:
    """One question with what the model said; answers in canonical spelling."""

    item: tasks.Item
    gold: str | None
    greedy: str | None = None
    greedy_text: str = ""
    drawn: dict[int, str | None] = dataclasses.field(default_factory=dict)
    texts: dict[int, str] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    problem: str | None = None

    @property
    def votes(self) -> list[str | None]:
        """Answers of the samples in the order in which they were drawn."""
        return [self.drawn[number] for number in sorted(self.drawn)]


def _answers(model: Model, task: tasks.Task, ask: Ask, slots: int) -> list[Row]:
    """Every question, greedy and drawn, through one engine."""
    rows = {i.id: Row(i, extract.canonical(i.gold, task.kind)) for i in task.items}
    put = _put(ask, task)
    asked = {item.id: put(item.question) for item in task.items}
    greedy = Settings(ask.max_new_tokens, stop=("\nQ:",))
    drawn = dataclasses.replace(greedy, temperature=ask.temperature, seed=ask.seed)
    jobs = collections.deque(Job(i.id, asked[i.id], greedy, tag=(i.id, -1)) for i in task.items)
    if ask.samples:
        jobs.extend(Job(i.id, asked[i.id], drawn, 0, ask.samples, (i.id, 0)) for i in task.items)
    chat = ask.style == "chat"
    longest = ask.max_new_tokens + (64 if chat else 0)
    second = prompts.second_stage("", "", task.kind, task.choices)
    length = room(model, list(asked.values()), longest, second)
    teacher = Local(model, length=length, slots=slots, chat=chat)
    shown, done, total = time.monotonic(), 0, len(rows) * (1 + ask.samples)
    for answer, found, problem in _parsed(teacher, jobs, task, ask):
        name, place = answer.job.tag
        row, done = rows[name], done + 1
        row.tokens += answer.tokens
        row.problem = row.problem or problem
        if place < 0:
            row.greedy, row.greedy_text = found, answer.text
        else:
            row.drawn[answer.sample], row.texts[answer.sample] = found, answer.text
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            print(f"{task.name}: {done} of {total} answers", file=sys.stderr)
    return list(rows.values())


def _parsed(
    teacher: Teacher, jobs: collections.deque[Job], task: tasks.Task, ask: Ask
) -> Iterator[tuple[Answer, str | None, str | None]]:
    """Answers, what was found in them, and why one could not be asked for.

    Zero-shot asks a second time before it looks.
    """
    kind, choices = task.kind, task.choices
    for answer in teacher.ask(jobs):
        problem = answer.reason if answer.failed else None
        before = answer.job.tag if isinstance(answer.job.tag, Answer) else None
        if before is not None:
            text = f"{prompts.FEW_SHOT_TRIGGER} {answer.text}"
            found = None if answer.failed else extract.answer(text, kind, choices=choices)
            yield before, extract.canonical(found, kind), problem
        elif ask.style == "zero_shot" and not answer.failed:
            second = prompts.second_stage(answer.job.prompt, answer.text, kind, choices)
            brief = Settings(prompts.ANSWER_TOKENS, stop=("\n",))
            jobs.appendleft(Job(answer.job.id, second, brief, answer.sample, 1, answer))
        else:
            found = None if answer.failed else extract.answer(answer.text, kind, choices=choices)
            yield answer, extract.canonical(found, kind), problem


def _put(ask: Ask, task: tasks.Task) -> Any:
    """How a question becomes a prompt."""
    if ask.style == "zero_shot":
        return lambda question: prompts.zero_shot_cot(question, ask.trigger)
    if ask.style == "few_shot":
        shown = prompts.load_exemplars(str(ask.file))
        return lambda question: prompts.few_shot_cot(question, shown)
    if ask.style == "preamble":
        text = prompts.load_preamble(str(ask.file))
        return lambda question: prompts.with_preamble(text, question)
    if ask.style == "predict":
        return lambda question: rationales.PREDICT + question
    return (lambda question: question) if ask.style == "chat" else prompts.plain


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    low, high = votes.wilson(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "low": low, "high": high}


def _mean(values: np.ndarray) -> dict[str, Any]:
    if np.isin(values, (0.0, 1.0)).all():  # yes or no, of which a bootstrap may see one side alone
        return _share((values == 1.0).tolist())
    low, high = votes.bootstrap(values)
    return {"value": float(values.mean()), "low": low, "high": high}


def _right(answer: str | None, gold: str | None) -> bool:
    return answer is not None and answer == gold


def _measure(task: tasks.Task, rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers of one task."""
    problems = [row.problem for row in rows if row.problem]
    found: dict[str, Any] = {
        "questions": len(rows),
        "greedy": _share([_right(row.greedy, row.gold) for row in rows]),
        "unparsable": _share([row.greedy is None for row in rows]),
        "not_asked": {"questions": len(problems), "reason": next(iter(problems), None)},
        "tokens": sum(row.tokens for row in rows),
    }
    count = min(len(row.drawn) for row in rows)
    if not count:
        return found
    golds = [row.gold for row in rows]
    drawn = [row.votes for row in rows]
    hits = [sum(_right(a, row.gold) for a in row.votes) for row in rows]
    sizes = sorted({k for k in (*VOTES, count) if k <= count})
    passed = lambda k: np.asarray([votes.pass_at_k(count, hit, k) for hit in hits])
    found["unparsable_drawn"] = sum(a is None for row in drawn for a in row) / (count * len(rows))
    found["maj_at"] = {k: _mean(votes.maj_at_k(drawn, golds, k)) for k in sizes}
    found["pass_at"] = {k: _mean(passed(k)) for k in sizes}
    return found


def _write(folder: pathlib.Path, task: tasks.Task, rows: Sequence[Row], results: Any) -> None:
    """Every answer of a task, and the numbers so far."""
    name = "".join(letter if letter.isalnum() else "_" for letter in task.name)
    write_records(
        folder / f"answers_{name}.jsonl",
        [
            {
                "id": row.item.id,
                "question": row.item.question,
                "gold": row.item.gold,
                "answer": row.greedy,
                "correct": _right(row.greedy, row.gold),
                "problem": row.problem,
                "text": row.greedy_text,
                "votes": row.votes,
                "texts": [row.texts[number] for number in sorted(row.texts)],
            }
            for row in rows
        ],
    )
    text = json.dumps(results, indent=2, ensure_ascii=False)
    with writing(folder):
        whole_file.write_text(folder / "tasks.json", text + "\n")
