"""Collects a teacher's rationales: asks for what a store lacks, judges, filters, writes files."""

import collections
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.models import Model
from jaxdistill.reasoning import asking, auto_cot, extract, prompts, rationales
from jaxdistill.reasoning.asking import Job, OpenRespondent, Reply, Respondent, SamplingParams
from jaxdistill.reasoning.prompts import Exemplar
from jaxdistill.reasoning.rationales import Sample
from jaxdistill.reasoning.store import AnswerStore, write_records, writing
from jaxdistill.reasoning.tasks import Item, Task
from jaxdistill.safe import whole_file
from jaxdistill.safe.redact import redacted

_REASONS = 5  # in a message: a reason that names a length may differ for every question


def check_questions(task: Task, store: AnswerStore) -> None:
    """Refuses a store that holds answers to another question of the same id.

    Raises:
      ConfigError: if there is one.
    """
    items = {item.id: item for item in task.items}
    for sample in store.samples.values():
        item = items.get(sample.id)
        if item is not None and (item.question, item.gold) != (sample.question, sample.gold):
            raise ConfigError(
                f"{store.folder}: holds answers to another question {item.id!r}: {task.name} has "
                "changed: give another `output`, or remove the folder"
            )


class Collector:
    """Asks a teacher for a task's samples and keeps each at once.

    Args:
      task: the questions.
      store: where samples are kept; only those that it lacks are asked for.
      open: opens the teacher for given prompts. It is called once for the samples, and once more
        where the teacher makes its own worked examples first.
    """

    def __init__(self, task: Task, store: AnswerStore, open: OpenRespondent):
        self._task, self._store, self._open = task, store, open
        self._respondent: Respondent | None = None
        self._before: dict[str, float] = {}  # spent by teachers that were opened earlier

    def spent(self) -> dict[str, float]:
        """Requests, tokens and cost of all that was asked here."""
        now = {} if self._respondent is None else self._respondent.spent()
        return asking.added(self._before, now)

    def missing(self, count: int) -> int:
        """How many samples the store lacks for `count` of each question."""
        return sum(n for item in self._task.items for _, n in self._store.missing(item.id, count))

    def collect(
        self,
        template: Callable[[str], str],
        sampling: SamplingParams,
        count: int,
        *,
        two_stages: bool,
    ) -> dict[str, int]:
        """Asks for what is missing; returns how many could not be had, by reason.

        Args:
          template: question -> prompt.
          sampling: how answers are drawn.
          count: samples of each question.
          two_stages: whether a second question asks for the answer alone.
        """
        missing = self.missing(count)
        jobs = [
            Job(item.id, template(item.question), sampling, first, number, item)
            for item in self._task.items
            for first, number in self._store.missing(item.id, count)
        ]
        failed: collections.Counter[str] = collections.Counter()
        replies = self._replies(jobs, sampling.max_new_tokens, two_stages)
        due = asking.every(asking.PROGRESS_SECONDS)
        for done, reply in enumerate(replies, start=1):
            if reply.problem is None:
                self._store.add(self._sample(reply))
            else:
                failed[reply.problem] += 1
            if due() or done == missing:
                self._store.spend(self.spent())
                print(
                    f"{done} of {missing} samples, {sum(failed.values())} failed", file=sys.stderr
                )
        return dict(failed)

    def exemplars(
        self, *, pool: int, clusters: int, embed: str, model: Callable[[], Model]
    ) -> list[Exemplar]:
        """Worked examples by the teacher itself, made once and kept beside the samples.

        Args:
          pool: how many questions they are chosen among.
          clusters: how many at most.
          embed: `tfidf`, or `hidden` for mean hidden states of the model.
          model: loads that model.

        Raises:
          ConfigError: for more clusters than questions.
          DataError: if the teacher answered too few questions, or no answer follows the rules.
        """
        path = self._store.folder / "auto_cot.jsonl"
        if not path.exists():
            examples = self._answered(self._task.items[:pool], clusters)
            asked = [prompts.plain(one.question) for one in examples]
            points = (
                auto_cot.mean_pooled(model(), asked) if embed == "hidden" else auto_cot.tfidf(asked)
            )
            arithmetic = self._task.kind == "number"
            chosen = auto_cot.select(examples, points, clusters=clusters, arithmetic=arithmetic)
            if not chosen:
                raise DataError(
                    f"auto_cot: none of {len(examples)} examples of the teacher follows the "
                    "published rules: give worked examples with style: few_shot"
                )
            write_records(path, [auto_cot.tidy(examples[i])._asdict() for i in chosen])
        return prompts.load_exemplars(path)

    def _answered(self, pool: Sequence[Item], clusters: int) -> list[Exemplar]:
        """The teacher's zero-shot rationales and answers, of the questions it answered."""
        if clusters > len(pool):
            raise ConfigError(
                f"prompt.clusters = {clusters}: must be from 1 to the number of questions, "
                f"{len(pool)}"
            )
        greedy = SamplingParams(prompts.RATIONALE_TOKENS, stop=("\nQ:",))
        jobs = [
            Job(f"auto/{item.id}", prompts.zero_shot_cot(item.question), greedy, tag=item)
            for item in pool
        ]
        samples: dict[str, Sample] = {}
        failed: collections.Counter[str] = collections.Counter()
        for reply in self._replies(jobs, greedy.max_new_tokens, two_stages=True):
            if reply.problem is None:
                sample = self._sample(reply)
                samples[sample.id] = sample
            else:
                failed[reply.problem] += 1
        if len(samples) < clusters:
            raise DataError(
                f"auto_cot: the teacher answered {len(samples)} of {len(pool)} questions, too few "
                f"for prompt.clusters = {clusters}: {_most_frequent(failed)}"
            )
        ordered = [samples[item.id] for item in pool if item.id in samples]
        return [Exemplar(s.question, s.rationale, s.answer or "") for s in ordered]

    def _replies(self, jobs: list[Job], max_new_tokens: int, two_stages: bool) -> Iterator[Reply]:
        """Opens the teacher for these prompts and asks them."""
        before = self.spent()
        opened = self._open([job.prompt for job in jobs], max_new_tokens)
        if opened is not self._respondent:  # a server is opened once and counts on
            self._before, self._respondent = before, opened
        return asking.ask(opened, jobs, self._task.second_stage if two_stages else None)

    def _sample(self, reply: Reply) -> Sample:
        """A reply, parsed and judged."""
        answer, kind, choices = reply.answer, self._task.kind, self._task.choices
        if reply.second is None:
            parsed = rationales.split(answer.text, kind, choices)
        else:
            short = _second_answer(reply.second.text, kind, choices)
            parsed = extract.Parsed(answer.text.strip(), short)
        item = answer.job.tag
        spelled, gold = (extract.canonical(text, kind) for text in (parsed.answer, item.gold))
        return Sample(
            id=item.id,
            sample=answer.sample,
            question=item.question,
            gold=item.gold,
            completion=answer.text,
            rationale=parsed.rationale,
            answer=parsed.answer if spelled is not None else None,
            correct=None if gold is None else spelled == gold,
            logprob=answer.logprob,
            tokens=answer.tokens,
            reason=answer.reason,
        )


def _second_answer(text: str, kind: str, choices: str) -> str | None:
    """The answer in what followed the second question: the first match."""
    if kind == "expression":
        return extract.answer(f"{extract.TRIGGER} {text}", kind)
    return extract.cleanse(text, kind, choices=choices)


def _most_frequent(reasons: Mapping[str, int]) -> str:
    """The most frequent reasons, each with how often it was met."""
    ordered = collections.Counter(reasons).most_common()
    parts = [f"{count} {reason}" for reason, count in ordered[:_REASONS]]
    rest = sum(count for _, count in ordered[_REASONS:])
    return ", ".join([*parts, *([f"{rest} for other reasons"] if rest else [])])


def finish(
    store: AnswerStore,
    samples: Sequence[Sample],
    failed: Mapping[str, int],
    spent: Mapping[str, float],
    *,
    forms: Sequence[str],
    rule: Mapping[str, Any],
) -> dict[str, Any]:
    """Filters the samples; writes a training file for each form, and summary.json.

    Args:
      store: in whose folder the files are written.
      samples: all that were asked for and are there.
      failed: how many are not, by reason.
      spent: of all runs on this store.
      forms: of training records, of `rationales.FORMS`.
      rule: arguments of `rationales.keep`.

    Returns:
      The summary: counts of questions, samples, parsed and correct ones, `failed`, `spent`, and
      by form {path, samples, dropped}.

    Raises:
      DataError: if no sample can be used for a form; says how many were dropped, and why.
    """
    files = {}
    for form in forms:
        options = dict(rule)
        if form == "sequence_kd":  # it learns the teacher's text as it is
            options |= {"correct_only": False, "parsable_only": False}
        kept, dropped = rationales.keep(samples, **options)
        if not kept:
            counts = _most_frequent({**dropped, **failed}) or "none came"
            raise DataError(
                f"{store.folder}: none of {len(samples)} samples can be used for {form} "
                f"({counts}); look at samples.jsonl, and change prompt, sampling or filter"
            )
        path = store.folder / f"train_{form}.jsonl"
        write_records(path, rationales.records(kept, form))
        files[form] = {"path": str(path), "samples": len(kept), "dropped": dropped}
    summary = {
        "questions": len({sample.id for sample in samples}),
        "samples": len(samples),
        "parsed": sum(sample.answer is not None for sample in samples),
        "correct": sum(bool(sample.correct) for sample in samples),
        "failed": dict(failed),
        "spent": dict(spent),
        "files": files,
    }
    text = json.dumps(redacted(summary), indent=2) + "\n"
    with writing(store.folder):
        whole_file.write_text(store.folder / "summary.json", text)
    return summary
