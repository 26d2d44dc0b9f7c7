"""Asks a teacher for rationales and keeps what is right: `jaxdistill teacher generate`."""

import collections
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxdistill import whole_file
from jaxdistill.config.generation import Generation
from jaxdistill.engine.references import load_any
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.reasoning import api, auto_cot, extract, prompts, rationales, tasks
from jaxdistill.reasoning.asking import Answer, Job, Local, Settings, Teacher, added, room
from jaxdistill.reasoning.prompts import Exemplar
from jaxdistill.reasoning.rationales import Sample
from jaxdistill.reasoning.store import Store, write_records
from jaxdistill.sharding import make_mesh

Put = Callable[[str], str]  # question -> prompt
_SHOWN_EVERY = 15.0  # seconds between lines of progress
_TOLD = 5  # reasons in a message: one that names a length may differ for every question


def generate(config: Generation, *, samples: int | None = None) -> dict[str, Any]:
    """Asks for every sample that is missing, then filters, and writes training files.

    What was received is kept at once: a run that was stopped asks only for the rest, and never for
    the same sample twice.

    Args:
      config: the file.
      samples: per question, in place of sampling.samples.

    Returns:
      Counts: questions, samples, parsed, correct, kept, dropped by reason, failed by reason, the
      training files, and what was spent on all samples of the folder, by earlier runs too.

    Raises:
      DataError: if no sample can be used; says what became of them.
      UserError: whatever is wrong with the configuration, the task or the teacher.
    """
    count = config.sampling.samples if samples is None else samples
    task = tasks.load(config.task, limit=config.limit)
    with Store(config.output, _asked(config)) as store:
        _check_questions(task, store)
        run = _Run(config, task, store)
        missing = sum(n for item in task.items for _, n in store.missing(item.id, count))
        try:
            failed = run.ask(count, missing) if missing else {}
        finally:
            spent = store.spend(run.spent())  # also of a run that fails
        found = [
            store.samples[item.id, number]
            for item in task.items
            for number in range(count)
            if (item.id, number) in store.samples
        ]
        return _finish(config, store, found, failed, spent)


def _asked(config: Generation) -> dict[str, Any]:
    """What decides the samples; the number of them, and what is kept, may change."""
    tree = config.model_dump(mode="json")
    tree["sampling"].pop("samples")
    # What stands in the files, for that may change behind their names.
    if config.prompt.exemplars is not None:
        shown = prompts.load_exemplars(config.prompt.exemplars)
        tree["prompt"]["exemplars"] = [one._asdict() for one in shown]
    if config.prompt.preamble is not None:
        tree["prompt"]["preamble"] = prompts.load_preamble(config.prompt.preamble)
    teacher = tree["teacher"]
    named = {"source": teacher["source"], "chat": teacher["chat"]}
    if teacher["api"] is not None:
        named = {key: teacher["api"][key] for key in ("model", "chat")}
    return {"teacher": named, **{key: tree[key] for key in ("task", "prompt", "sampling")}}


def _check_questions(task: tasks.Task, store: Store) -> None:
    """Raises where the folder answers another question by the name of one of these."""
    items = {item.id: item for item in task.items}
    for sample in store.samples.values():
        item = items.get(sample.id)
        if item is not None and (item.question, item.gold) != (sample.question, sample.gold):
            raise ConfigError(
                f"{store.folder}: holds answers to another question {item.id!r}: {task.name} has "
                "changed: give another `output`, or remove the folder"
            )


class _Run:
    """The teacher, loaded when it is first asked, and the prompts."""

    def __init__(self, config: Generation, task: tasks.Task, store: Store):
        self._config, self._task, self._store = config, task, store
        self._teacher: Teacher | None = None
        self._past: dict[str, float] = {}  # spent by teachers before this one
        self._model: Any = None
        self._two_stage = config.prompt.style == "zero_shot"

    def spent(self) -> dict[str, float]:
        return added(self._past, {} if self._teacher is None else self._teacher.spent())

    def ask(self, count: int, missing: int) -> dict[str, int]:
        """Asks for what is missing; failures by reason."""
        put = self._put()
        jobs = collections.deque(
            Job(item.id, put(item.question), self._settings(), first, number, item)
            for item in self._task.items
            for first, number in self._store.missing(item.id, count)
        )
        teacher = self._open([job.prompt for job in jobs], self._config.sampling.max_new_tokens)
        failed: collections.Counter[str] = collections.Counter()
        shown = time.monotonic()
        done = 0
        for answer, sample in self._samples(teacher, jobs):
            done += 1
            if sample is None:
                failed[answer.reason] += 1
            else:
                self._store.add(sample)
            if time.monotonic() - shown > _SHOWN_EVERY or done == missing:
                shown = time.monotonic()
                self._store.spend(self.spent())
                print(
                    f"{done} of {missing} samples, {sum(failed.values())} failed", file=sys.stderr
                )
        return dict(failed)

    def _samples(
        self, teacher: Teacher, jobs: collections.deque[Job]
    ) -> Iterator[tuple[Answer, Sample | None]]:
        """Answers with the samples they make; in two stages the second question comes between."""
        kind, choices = self._task.kind, self._task.choices
        for answer in teacher.ask(jobs):
            before = answer.job.tag if isinstance(answer.job.tag, Answer) else None
            if answer.failed:
                yield answer, None
            elif before is not None:
                parsed = extract.Parsed(before.text.strip(), _second(answer.text, kind, choices))
                yield answer, self._sample(before, parsed)
            elif self._two_stage:
                asked = prompts.second_stage(answer.job.prompt, answer.text, kind, choices)
                brief = Settings(prompts.ANSWER_TOKENS, stop=("\n",))
                jobs.appendleft(Job(answer.job.id, asked, brief, answer.sample, 1, answer))
            else:
                yield answer, self._sample(answer, rationales.split(answer.text, kind, choices))

    def _sample(self, answer: Answer, parsed: extract.Parsed) -> Sample:
        item, kind = answer.job.tag, self._task.kind
        found, gold = (extract.canonical(text, kind) for text in (parsed.answer, item.gold))
        return Sample(
            id=item.id,
            sample=answer.sample,
            question=item.question,
            gold=item.gold,
            completion=answer.text,
            rationale=parsed.rationale,
            answer=parsed.answer if found is not None else None,
            correct=None if gold is None else found == gold,
            logprob=answer.logprob,
            tokens=answer.tokens,
            reason=answer.reason,
        )

    def _settings(self) -> Settings:
        drawn = self._config.sampling
        return Settings(**drawn.model_dump(exclude={"samples"}))

    def _open(self, asked: list[str], answer: int) -> Teacher:
        """The teacher, with room for the longest of these prompts and answers of so many tokens."""
        told, server = self._config.teacher, self._config.teacher.api
        if server is not None:
            if self._teacher is None:
                self._teacher = _server(server)
            return self._teacher
        model, self._past = self._load(), self.spent()
        second = prompts.second_stage("", "", self._task.kind, self._task.choices)
        self._teacher = Local(
            model,
            length=room(model, asked, answer + (64 if told.chat else 0), second),
            slots=told.slots,
            chat=told.chat,
            cache_dtype=told.cache_dtype,
        )
        return self._teacher

    def _load(self) -> Any:
        if self._model is None:
            told = self._config.teacher
            assert told.source is not None, "the configuration names a model or a server"
            loaded = load_any(told.source, dtype=told.dtype, mesh=make_mesh())
            self._model = loaded.consume_per_layer()
        return self._model

    def _put(self) -> Put:
        """How a question becomes a prompt."""
        prompt = self._config.prompt
        if prompt.style == "zero_shot":
            return lambda question: prompts.zero_shot_cot(question, prompt.trigger)
        if prompt.style == "plain":
            return prompts.plain
        if prompt.style == "preamble":
            assert prompt.preamble is not None, "the configuration has it where it is needed"
            text = prompts.load_preamble(prompt.preamble)
            return lambda question: prompts.with_preamble(text, question)
        if prompt.style == "few_shot":
            assert prompt.exemplars is not None, "the configuration has it where it is needed"
            shown = prompts.load_exemplars(prompt.exemplars)
        else:
            shown = self._auto_cot()
        return lambda question: prompts.few_shot_cot(question, shown, symbolic=prompt.symbolic)

    def _auto_cot(self) -> list[Exemplar]:
        """Worked examples by the teacher itself, made once and kept beside the samples."""
        path = self._store.folder / "auto_cot.jsonl"
        if not path.exists():
            write_records(path, [one._asdict() for one in self._make_auto_cot()])
        return prompts.load_exemplars(path)

    def _make_auto_cot(self) -> list[Exemplar]:
        told, task = self._config.prompt, self._task
        pool = task.items[: told.pool]
        if told.clusters > len(pool):
            raise ConfigError(
                f"prompt.clusters = {told.clusters}: must be from 1 to the number of questions, "
                f"{len(pool)}"
            )
        brief = Settings(prompts.RATIONALE_TOKENS, stop=("\nQ:",))
        jobs = collections.deque(
            Job(f"auto/{item.id}", prompts.zero_shot_cot(item.question), brief, tag=item)
            for item in pool
        )
        teacher = self._open([job.prompt for job in jobs], prompts.RATIONALE_TOKENS)
        plain, self._two_stage = self._two_stage, True
        made: dict[str, Sample] = {}
        failed: collections.Counter[str] = collections.Counter()
        for answer, sample in self._samples(teacher, jobs):
            if sample is None:
                failed[answer.reason] += 1
            else:
                made[sample.id] = sample
        self._two_stage = plain
        if len(made) < told.clusters:
            raise DataError(
                f"auto_cot: the teacher answered {len(made)} of {len(pool)} questions, too few for "
                f"prompt.clusters = {told.clusters}: {_told(failed)}"
            )
        found = [made[item.id] for item in pool if item.id in made]
        examples = [Exemplar(s.question, s.rationale, s.answer or "") for s in found]
        asked = [prompts.plain(one.question) for one in examples]
        hidden = told.embed == "hidden"
        points = auto_cot.mean_pooled(self._load(), asked) if hidden else auto_cot.tfidf(asked)
        places = auto_cot.select(
            examples, points, clusters=told.clusters, arithmetic=task.kind == "number"
        )
        if not places:
            raise DataError(
                f"auto_cot: none of {len(examples)} examples of the teacher follows the published "
                "rules: give worked examples with style: few_shot"
            )
        return [auto_cot.tidy(examples[place]) for place in places]


def _server(told: Any) -> api.Api:
    return api.Api(
        told.base_url,
        told.model,
        key=api.key_from(told.key_env),
        chat=told.chat,
        concurrency=told.concurrency,
        timeout=told.timeout_s,
        retries=told.retries,
        max_failures=told.max_failures,
        logprobs=told.logprobs,
        prices=(told.price_in, told.price_out),
    )


def _second(text: str, kind: str, choices: str) -> str | None:
    """The answer in what followed stage two's trigger: the first match."""
    if kind == "expression":
        return extract.answer(f"{extract.TRIGGER} {text}", kind)
    return extract.cleanse(text, kind, choices=choices)


def _told(counts: Mapping[str, int]) -> str:
    """The most frequent reasons with how often each was met."""
    ordered = collections.Counter(counts).most_common()
    told = [f"{count} {reason}" for reason, count in ordered[:_TOLD]]
    rest = sum(count for _, count in ordered[_TOLD:])
    return ", ".join([*told, *([f"{rest} for other reasons"] if rest else [])])


def _finish(
    config: Generation,
    store: Store,
    found: list[Sample],
    failed: dict[str, int],
    spent: dict[str, float],
) -> dict[str, Any]:
    """Filters, writes the training files and the summary."""
    told = config.filter.model_dump()
    files, kept, dropped = {}, [], {}
    for form in config.forms:
        rule = told | {"seed": config.sampling.seed}
        if form == "sequence_kd":  # the teacher's words as they are
            rule |= {"correct_only": False, "parsable_only": False}
        kept, dropped = rationales.keep(found, **rule)
        if not kept:
            counts = _told(dropped | failed) or "none came"
            raise DataError(
                f"{store.folder}: none of {len(found)} samples can be used for {form} ({counts}); "
                "look at samples.jsonl, and change prompt, sampling or filter"
            )
        path = store.folder / f"train_{form}.jsonl"
        write_records(path, rationales.records(kept, form))
        files[form] = {"path": str(path), "samples": len(kept), "dropped": dropped}
    summary = {
        "questions": len({sample.id for sample in found}),
        "samples": len(found),
        "parsed": sum(sample.answer is not None for sample in found),
        "correct": sum(bool(sample.correct) for sample in found),
        "failed": failed,
        "spent": spent,
        "files": files,
    }
    whole_file.write_text(store.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
