"""Accuracy on tasks with one right answer, greedy and by vote: `jaxdistill eval --tasks`."""

import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdistill.commands import Tasks
from jaxdistill.data.store import writing
from jaxdistill.errors import DataError
from jaxdistill.models import Model
from jaxdistill.reasoning import asking, extract, prompts, rationales, tasks, votes
from jaxdistill.reasoning.asking import Job, Reply, SamplingParams
from jaxdistill.reasoning.store import write_records
from jaxdistill.references import load_any
from jaxdistill.safe import whole_file
from jaxdistill.sharding import make_mesh

STYLES = (*prompts.STYLES, "predict", "chat")
VOTES = (1, 2, 3, 5, 10, 20, 30, 40, 50, 100)  # k of the curve, as far as there are samples


def evaluate(
    model: str | Model,
    names: Sequence[str],
    options: Tasks | None = None,
    *,
    folder: str | None = None,
    slots: int = 32,
    dtype: str = "float32",
    output: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """Accuracy of a model on tasks.

    Args:
      model: a loaded model, or any name `references.load_any` understands.
      names: of tasks, see `reasoning.tasks`.
      options: how they are put; None: plainly, greedy.
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
    options = options or Tasks()
    loaded = [tasks.load(name, folder=folder, limit=options.limit) for name in names]
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
        rows = _answers(used, task, options, slots)
        results[task.name] = _measure(task, rows) | {"seconds": time.monotonic() - began}
        if output is not None:
            _write(pathlib.Path(output), task, rows, results)
    return results


@dataclasses.dataclass
class Outcome:
    """One question with the model's answers in canonical spelling."""

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


def _answers(model: Model, task: tasks.Task, options: Tasks, slots: int) -> list[Outcome]:
    """Every question, greedy and drawn, through one engine."""
    rows = {i.id: Outcome(i, extract.canonical(i.gold, task.kind)) for i in task.items}
    template = _template(options)
    asked = {item.id: template(item.question) for item in task.items}
    greedy = SamplingParams(options.max_new_tokens, stop=("\nQ:",))
    drawn = dataclasses.replace(greedy, temperature=options.temperature, seed=options.seed)
    jobs = [Job(name, prompt, greedy, tag=(name, -1)) for name, prompt in asked.items()]
    if options.self_consistency:
        jobs += [
            Job(n, prompt, drawn, 0, options.self_consistency, (n, 0))
            for n, prompt in asked.items()
        ]
    respondent = asking.open_local(
        model, list(asked.values()), options.max_new_tokens, task.second_stage,
        slots=slots, chat=options.style == "chat",
    )  # fmt: skip
    second = task.second_stage if options.style == "zero_shot" else None
    due, total = asking.every(asking.PROGRESS_SECONDS), len(rows) * (1 + options.self_consistency)
    for done, reply in enumerate(asking.ask(respondent, jobs, second), start=1):
        answer, parsed = reply.answer, _parsed(reply, task)
        name, place = answer.job.tag
        row = rows[name]
        row.tokens += answer.tokens
        row.problem = row.problem or reply.problem
        if place < 0:
            row.greedy, row.greedy_text = parsed, answer.text
        else:
            row.drawn[answer.sample], row.texts[answer.sample] = parsed, answer.text
        if due():
            print(f"{task.name}: {done} of {total} answers", file=sys.stderr)
    return list(rows.values())


def _parsed(reply: Reply, task: tasks.Task) -> str | None:
    """The answer of a reply in canonical spelling; in two stages that of the second."""
    if reply.problem is not None:
        return None
    text = reply.answer.text
    if reply.second is not None:
        text = f"{prompts.FEW_SHOT_TRIGGER} {reply.second.text}"
    return extract.canonical(extract.answer(text, task.kind, choices=task.choices), task.kind)


def _template(options: Tasks) -> Callable[[str], str]:
    """question -> prompt."""
    if options.style == "predict":
        return lambda question: rationales.PREDICT + question
    if options.style == "chat":
        return lambda question: question
    return prompts.in_style(
        options.style,
        trigger=options.trigger,
        exemplars=prompts.load_exemplars(str(options.exemplars))
        if options.style == "few_shot"
        else (),
        preamble=prompts.load_preamble(str(options.exemplars))
        if options.style == "preamble"
        else "",
    )


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


def _measure(task: tasks.Task, rows: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of one task."""
    problems = [row.problem for row in rows if row.problem]
    numbers: dict[str, Any] = {
        "questions": len(rows),
        "greedy": _share([_right(row.greedy, row.gold) for row in rows]),
        "unparsable": _share([row.greedy is None for row in rows]),
        "not_asked": {"questions": len(problems), "reason": next(iter(problems), None)},
        "tokens": sum(row.tokens for row in rows),
    }
    count = min(len(row.drawn) for row in rows)
    if not count:
        return numbers
    golds = [row.gold for row in rows]
    drawn = [row.votes for row in rows]
    hits = [sum(_right(a, row.gold) for a in row.votes) for row in rows]
    sizes = sorted({k for k in (*VOTES, count) if k <= count})
    passed = lambda k: np.asarray([votes.pass_at_k(count, hit, k) for hit in hits])
    numbers["unparsable_drawn"] = sum(a is None for row in drawn for a in row) / (count * len(rows))
    numbers["maj_at"] = {k: _mean(votes.maj_at_k(drawn, golds, k)) for k in sizes}
    numbers["pass_at"] = {k: _mean(passed(k)) for k in sizes}
    return numbers


def _write(folder: pathlib.Path, task: tasks.Task, rows: Sequence[Outcome], results: Any) -> None:
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
