"""Collects the rationales that a configuration asks for: `jaxdistill teacher generate`."""

import functools
from collections.abc import Callable
from typing import Any

from jaxdistill.config import generation
from jaxdistill.config.generation import Generation
from jaxdistill.data import rendering
from jaxdistill.data.sources import open_source
from jaxdistill.models import Model
from jaxdistill.reasoning import asking, augment, collect, prompts, served, tasks
from jaxdistill.reasoning.asking import Respondent, SamplingParams
from jaxdistill.reasoning.duplicates import Sieve
from jaxdistill.reasoning.store import AnswerStore
from jaxdistill.references import load_any
from jaxdistill.run.served_teacher import client_options
from jaxdistill.sharding import make_mesh


def generate(config: Generation, *, samples: int | None = None) -> dict[str, Any]:
    """Asks for every sample that is missing, then filters, and writes training files.

    Each sample is kept as soon as it comes: a run that was stopped asks only for the rest, and
    never for the same sample twice.

    Args:
      config: the file.
      samples: per question, in place of sampling.samples.

    Returns:
      See `collect.finish`; for task: augment see `augment.finish`.

    Raises:
      DataError: if no sample can be used; says why.
      UserError: whatever is wrong with the configuration, the task or the teacher.
    """
    if config.augment is not None:
        return _augmented(config, config.augment)
    count = config.sampling.samples if samples is None else samples
    task = tasks.load(config.task, limit=config.limit)
    with AnswerStore(config.output, _asked(config)) as store:
        collect.check_questions(task, store)
        teacher = _LazyTeacher(config.teacher, task.second_stage)
        collector = collect.Collector(task, store, teacher.open)
        try:
            failed = _collect(config, collector, teacher, count) if collector.missing(count) else {}
        finally:
            spent = store.spend(collector.spent())  # also of a run that fails
        wanted = [(item.id, number) for item in task.items for number in range(count)]
        return collect.finish(
            store,
            [store.samples[key] for key in wanted if key in store.samples],
            failed,
            spent,
            forms=config.forms,
            rule=config.filter.model_dump() | {"seed": config.sampling.seed},
        )


def _augmented(config: Generation, section: generation.Augment) -> dict[str, Any]:
    """New records out of given ones: what `generate` does for task: augment."""
    source = open_source(section.seeds, section.format)
    seeds, _ = augment.load_seeds(source, config.limit)
    sieve = Sieve(
        min_characters=section.min_characters,
        max_characters=section.max_characters,
        language=section.language,
        near=section.near,
    )
    teacher = _LazyTeacher(config.teacher, lambda prompt, answer: "")
    user_turn = section.user_turn or ""
    if section.magpie and section.user_turn is None:
        user_turn = rendering.user_turn(teacher.model().tokenizer)
    sampling = config.sampling.model_dump(exclude={"samples"})
    named = _named_teacher(config)
    asked = {
        "teacher": named,
        "task": "augment",
        "augment": {"seeds": sorted(seed.id for seed in seeds), "shown": section.shown,
                    "user_turn": user_turn},
        "sampling": config.sampling.model_dump(mode="json", exclude={"samples"}),
    }  # fmt: skip
    with AnswerStore(config.output, asked) as store:
        maker = augment.Augmenter(
            seeds,
            store,
            teacher.open,
            SamplingParams(**sampling),
            section.candidates,
            shown=section.shown,
            user_turn=user_turn,
        )
        try:
            made, dropped = maker.make(sieve)
        finally:
            spent = store.spend(maker.spent())  # also of a run that fails
        return augment.finish(
            store,
            made,
            dropped,
            maker.failed,
            spent,
            seeds=len(seeds),
            teacher=str(named.get("source") or named["model"]),
            max_dropped=section.max_dropped,
        )


def _asked(config: Generation) -> dict[str, Any]:
    """What decides the samples; the number of them, and what is kept, may change."""
    tree = config.model_dump(mode="json")
    tree["sampling"].pop("samples")
    # What stands in the files, for that may change behind their names.
    if config.prompt.exemplars is not None:
        exemplars = prompts.load_exemplars(config.prompt.exemplars)
        tree["prompt"]["exemplars"] = [one._asdict() for one in exemplars]
    if config.prompt.preamble is not None:
        tree["prompt"]["preamble"] = prompts.load_preamble(config.prompt.preamble)
    return {
        "teacher": _named_teacher(config),
        **{key: tree[key] for key in ("task", "prompt", "sampling")},
    }


def _named_teacher(config: Generation) -> dict[str, Any]:
    """What of a teacher decides its answers."""
    teacher = config.teacher.model_dump(mode="json")
    if teacher["api"] is not None:
        return {key: teacher["api"][key] for key in ("model", "chat")}
    return {"source": teacher["source"], "chat": teacher["chat"]}


class _LazyTeacher:
    """The teacher of a configuration, loaded when it is first asked."""

    def __init__(self, section: generation.AskedTeacher, second: asking.SecondStage):
        self._section, self._second = section, second

    def open(self, asked: list[str], max_new_tokens: int) -> Respondent:
        """The server; or the model, with room for the longest of these prompts and its answers."""
        section = self._section
        if section.api is not None:
            return self._server
        return asking.open_local(
            self.model(),
            asked,
            max_new_tokens,
            self._second,
            slots=section.slots,
            chat=section.chat,
            cache_dtype=section.cache_dtype,
        )

    def model(self) -> Model:
        """The model on this machine."""
        return self._model

    @functools.cached_property
    def _model(self) -> Model:
        section = self._section
        assert section.source is not None, "the configuration names a model or a server"
        return load_any(section.source, dtype=section.dtype, mesh=make_mesh()).consume_per_layer()

    @functools.cached_property
    def _server(self) -> served.ApiClient:
        server = self._section.api
        assert server is not None
        return served.ApiClient(
            **client_options(server), chat=server.chat, logprobs=server.logprobs
        )


def _collect(
    config: Generation, collector: collect.Collector, teacher: _LazyTeacher, count: int
) -> dict[str, int]:
    """Asks in the style of the configuration; failures by reason."""
    return collector.collect(
        _template(config.prompt, collector, teacher, _chats(config.teacher)),
        SamplingParams(**config.sampling.model_dump(exclude={"samples"})),
        count,
        two_stages=config.prompt.style == "zero_shot",
    )


def _chats(teacher: generation.AskedTeacher) -> bool:
    """Whether a prompt becomes the user's turn of a chat."""
    return teacher.chat if teacher.api is None else teacher.api.chat


def _template(
    prompt: generation.PromptStyle, collector: collect.Collector, teacher: _LazyTeacher, chat: bool
) -> Callable[[str], str]:
    """question -> prompt; for auto_cot the teacher makes the worked examples first.

    A plain question is a user's turn as it is, which is what the form `think` trains on.
    """
    if chat and prompt.style == "plain":
        return lambda question: question
    style, exemplars, preamble = prompt.style, [], ""
    if prompt.exemplars is not None:
        exemplars = prompts.load_exemplars(prompt.exemplars)
    if prompt.preamble is not None:
        preamble = prompts.load_preamble(prompt.preamble)
    if style == "auto_cot":
        style, exemplars = "few_shot", collector.exemplars(
            pool=prompt.pool, clusters=prompt.clusters, embed=prompt.embed, model=teacher.model
        )  # fmt: skip
    return prompts.in_style(
        style,
        trigger=prompt.trigger,
        exemplars=exemplars,
        preamble=preamble,
        symbolic=prompt.symbolic,
    )
