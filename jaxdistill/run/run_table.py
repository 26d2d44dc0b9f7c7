"""The table of a run: teacher, student before, the control without a teacher, student after."""

import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import agree, optim
from jaxdistill.compress import quantize
from jaxdistill.config.models import Student
from jaxdistill.config.schema import Eval
from jaxdistill.data.records import PAIRS, teacher_key
from jaxdistill.data.second_view import second_rows
from jaxdistill.evaluate import gaps, meter, speed
from jaxdistill.evaluate.held_out import HeldOut
from jaxdistill.methods import measuring
from jaxdistill.models import Model
from jaxdistill.report import MetricsWriter, json_lines
from jaxdistill.run import participants, setup, states
from jaxdistill.run.ahead import Ahead
from jaxdistill.run.folder import RunDir
from jaxdistill.run.teaching import Online, names, online
from jaxdistill.train.state import TrainState, whole
from jaxdistill.train.step import make_loss

ORDER = ("teacher", "student before", "SFT control", "student after")
FILE = "table.json"
_FIELDS = {"name", "perplexity", "kl_t1", "agree_top1", "scored_tokens_per_second", "parameters"}
PROMPT_TOKENS = 24
# Settings of the student's training: those that the control has too, and those that it has not.
_BOTH = ("config.train", "config.optimizer", "config.method", "config.student")
_STUDENT_ALONE = ("config.rollout", "config.reward", "config.teacher.self")
ANSWER_TOKENS = 40


class RunTable:
    """Measures each participant on the same rows and keeps what was measured in table.json."""

    def __init__(
        self,
        run: RunDir,
        models: participants.Models,
        method: setup.RunMethod,
        held_out: HeldOut,
        *,
        student: Student,
        speaks: Eval,
        seed: int,
    ):
        """Measures on `held_out`.

        Args:
          run: keeps the table.
          models: who takes part.
          method: of the run.
          held_out: what is measured on.
          student: the student's options.
          speaks: the options of evaluation, which say what models complete.
          seed: of the method's own parameters.
        """
        self._run, self._models, self._held_out = run, models, held_out
        self._student, self._speaks = student, speaks
        self._adapters = states.adapters_of(student)
        self._own = method.objective.init(jax.random.key(seed))
        self._row_knobs = {**method.measuring, **measuring.KNOBS}
        self._step, self._asked_params = self._program(method)
        self._rows = agree.by_leader(lambda: _stored(run))
        self._teacher_answers: list[str | None] | None = None
        self._student_speed: float | None = None
        # Tokens of two tokenizers are no measure of each other; the bytes that they spell are.
        apart = models.second is not None or models.pairing.aside
        self._bytes = held_out.text_bytes(models.tokenizer) if apart else None

    def _program(self, method: setup.RunMethod) -> tuple[meter.MeterStep, Any]:
        """The loss without gradient: that of training, if it measures against the teacher too.

        With it what it takes for the teacher.
        """
        models, objective, teaching = self._models, method.objective, self._models.teaching
        alone = models.second is not None or not teaching.compared
        # One that is the student itself exists in a step alone.
        itself = objective.needs_teacher and not teaching.compared
        own = objective.token_means and not itself and (alone or objective.needs_teacher)
        if self._pairs or own:
            return meter.make_step(method.loss, method.teacher), method.asked.params
        # Beside a teacher, alpha = 1 makes cross-entropy the loss of this too. One that reads other
        # tokens gives no distribution to compare with.
        if alone:
            objective, signal = measuring.cross_entropy(vocab=models.vocab), teaching.silent()
        else:
            objective = measuring.against_teacher(
                vocab=models.vocab, columns=models.pairing.columns
            )
            signal = teaching.signal()
        loss = make_loss(
            models.student.config,
            objective,
            compute_dtype=jnp.dtype(self._student.compute_dtype),
            quantization=quantize.of(self._student.quantize),
        )
        return meter.make_step(loss, signal), teaching.params

    @property
    def _pairs(self) -> bool:
        """Whether the held-out rows are pairs, which the method alone can compare."""
        return self._held_out.dataset.kind in PAIRS

    @property
    def tells_teacher(self) -> bool:
        """Whether the teacher's row can be measured: whole rows of it are known."""
        return self._models.teaching.whole

    def has(self, name: str) -> bool:
        """Whether this row has been measured already."""
        return name in self._rows

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Held-out metrics of a state in training, with the knobs it has now."""
        knobs = self._row_knobs | dict(optim.knobs(state.opt_state))
        return self._measure(self._whole(state), knobs)

    def _whole(self, state: TrainState) -> Any:
        return whole(state.params, state.frozen, self._adapters)

    def student_params(self, state: TrainState) -> Any:
        """The student of a state, its adapters in place."""
        return self._whole(state)["student"]

    def _measure(self, params: Any, knobs: Mapping[str, Any]) -> dict[str, float]:
        # Numbers of the host, before the first step and after it: arrays that lie elsewhere than
        # those before would have the program compiled again.
        knobs = {name: np.float32(jax.device_get(value)) for name, value in knobs.items()}
        return self._held_out.measure(
            self._step, params, self._asked_params, knobs, text_bytes=self._bytes
        )

    def add_teacher(self) -> None:
        """The teacher's own row: how well it models the held-out rows, and how fast.

        Of several together, each on the rows that are for it; nobody can time them.
        """
        teaching = self._models.teaching
        if self.has("teacher") or not self.tells_teacher:
            return
        rows, text_bytes = self._as_read()
        vocab = self._models.read[1]
        if not isinstance(teaching, Online):  # several, or a stored one
            scoring = meter.teacher_scoring_step(teaching.signal(), vocab)
            metrics = rows.measure(scoring, None, teaching.params, text_bytes=text_bytes)
            return self._add("teacher", metrics, teaching.size(), None)
        dtype = jnp.dtype(teaching.given.dtype)
        scoring = meter.scoring_step(teaching.model.config, vocab, compute_dtype=dtype)
        if isinstance(teaching, Ahead):
            rows = rows.replaced(rows.dataset, teaching.mesh)
        params = teaching.model.params
        metrics = rows.measure(scoring, params, text_bytes=text_bytes)
        self._add("teacher", metrics, teaching.size(), rows.speed(scoring, params))

    def _as_read(self) -> tuple[HeldOut, int | None]:
        """The held-out rows in the tokens that the teacher reads; their bytes if it has its own."""
        rows, models = self._held_out, self._models
        if models.second is None:
            return rows, None
        rows = rows.replaced(second_rows(rows.dataset))
        return rows, rows.text_bytes(models.second.tokenizer)

    def add_student(
        self, name: str, params: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """A student's row, from the metrics of its last evaluation where there was one."""
        model = self._models.student
        if metrics is None:
            metrics = self._measure({"student": params, "objective": self._own}, self._row_knobs)
        if self._student_speed is None:
            # Every student row has this shape and runs this program: one timing serves them all.
            scoring = meter.scoring_step(
                model.config,
                self._models.vocab,
                compute_dtype=jnp.dtype(self._student.compute_dtype),
            )
            self._student_speed = self._held_out.speed(scoring, params)
        self._add(name, metrics, speed.size(model.config, params), self._student_speed)

    def _add(
        self,
        name: str,
        metrics: Mapping[str, float],
        size: Mapping[str, int | float],
        rate: float | None,
    ) -> None:
        row: dict[str, Any] = {
            "name": name,
            **_measured(metrics, "eval"),
            "scored_tokens_per_second": rate,
        }
        if several := names(self._models.teaching):
            row["by_teacher"] = {
                teacher: _measured(metrics, f"eval/teachers/{teacher}")
                for teacher in several
                if f"eval/teachers/{teacher}/perplexity" in metrics
            }
        if "eval/bits_per_byte" in metrics:
            row["bits_per_byte"] = metrics["eval/bits_per_byte"]
        self._rows[name] = row | dict(size)
        self._run.write_json(FILE, {"held_out": self._held_out.name, "rows": self.rows})

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows measured so far, in the table's order."""
        return [self._rows[name] for name in ORDER if name in self._rows]

    def write_samples(
        self,
        number: int,
        state: TrainState,
        writer: MetricsWriter,
        more: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """What teacher and student say to the same prompts, and more rows, written to samples/."""
        prompts = self._prompts()
        if not prompts:
            if more:
                writer.samples(number, more)
            return
        student, tokenizer = self._models.student, self._models.tokenizer
        if self._teacher_answers is None:
            self._teacher_answers = self._taught(prompts)
        params = self.student_params(state)
        ours = self._continued(Model(student.config, params, tokenizer), prompts)
        rows = []
        for index, prompt in enumerate(prompts):
            row = {"prompt": tokenizer.decode(prompt), "student": tokenizer.decode(ours[index])}
            if (theirs := self._teacher_answers[index]) is not None:
                row["teacher"] = theirs
            rows.append(row)
        marks = self._marks(params, prompts, ours)
        writer.samples(number, [*rows, *more], marks and [*marks, *[[]] * len(more)])

    def _marks(
        self, params: Any, prompts: list[list[int]], answers: list[list[int]]
    ) -> list[list[tuple[str, float]]]:
        """The student's answers token by token, with log q - log p; empty where p is not known.

        In one process alone: the parameters of another one's devices cannot be read here.
        """
        teaching = self._models.teaching
        # One with tokens of its own says nothing of the student's.
        if not isinstance(teaching, Online) or self._models.second is not None:
            return []
        if not any(answers) or jax.process_count() > 1:
            return []
        readers = (
            gaps.Reader(self._models.student.config, self._student.compute_dtype, params),
            gaps.Reader(teaching.model.config, teaching.given.dtype, teaching.model.params),
        )
        marked = gaps.token_gaps(*readers, self._models.vocab, prompts, answers)
        decode = self._models.tokenizer.decode
        return [
            [(decode([token]), round(float(gap), 3)) for token, gap in zip(answer, of, strict=True)]
            for answer, of in zip(answers, marked, strict=True)
        ]

    def _prompts(self) -> list[list[int]]:
        """The configured prompts, and beginnings of held-out rows, as tokens."""
        tokenizer = self._models.tokenizer
        own = [list(tokenizer(text)["input_ids"]) for text in self._speaks.prompts]
        return own + [one for part in self._beginnings().values() for one in part]

    def _beginnings(self) -> dict[str, list[list[int]]]:
        """Beginnings of held-out rows, by whom of several teachers they are for; else by ""."""
        parts = self._held_out.by_teacher
        if not parts:
            return {"": self._held_out.beginnings(self._speaks.samples, PROMPT_TOKENS)}
        counts = [
            len(range(place, self._speaks.samples, len(parts))) for place in range(len(parts))
        ]
        return {
            name: part.beginnings(count, PROMPT_TOKENS)
            for (name, part), count in zip(parts.items(), counts, strict=True)
        }

    def _taught(self, prompts: list[list[int]]) -> list[str | None]:
        """What the teacher answers; of several the one that a held-out row is for."""
        teachers = online(self._models.teaching)
        if not names(self._models.teaching):
            alone = teachers.get("teacher")
            if alone is None or alone.given.offload:  # generation would hold all of its layers
                return [None] * len(prompts)
            return list(self._asked(alone.model, prompts))
        answers: list[str | None] = [None] * len(self._speaks.prompts)
        for name, part in self._beginnings().items():
            one = teachers.get(teacher_key(name))
            answers += self._asked(one.model, part) if one and part else [None] * len(part)
        return answers

    def _asked(self, teacher: Model, prompts: list[list[int]]) -> list[str]:
        """What the teacher answers to prompts in the student's tokens."""
        tokenizer, second = self._models.tokenizer, self._models.second
        if second is not None:
            texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
            prompts = [list(second.tokenizer(text)["input_ids"]) for text in texts]
            tokenizer = second.tokenizer
        named = dataclasses.replace(teacher, tokenizer=tokenizer)
        return [tokenizer.decode(one) for one in self._continued(named, prompts)]

    def _continued(self, model: Model, prompts: list[list[int]]) -> list[list[int]]:
        answers = model.generate(prompts, max_new_tokens=ANSWER_TOKENS)
        return [[int(token) for token in one] for one in answers]


def _measured(metrics: Mapping[str, float], where: str) -> dict[str, float | None]:
    """What a row says of held-out text: all of it, or the part of one teacher."""
    return {
        "perplexity": metrics[f"{where}/perplexity"],
        "kl_t1": metrics.get(f"{where}/kl_t1"),
        "agree_top1": metrics.get(f"{where}/agree_top1"),
    }


def stale(changed: Collection[str]) -> Sequence[str]:
    """Rows of the table that other settings made than those that hold now."""
    if "config.eval.max_rows" in changed:
        return ORDER
    if any(name.startswith(_BOTH) for name in changed):
        return ("SFT control", "student after")
    return ("student after",) if any(map(trains, changed)) else ()


def trains(name: str) -> bool:
    """Whether a fact is a setting that the student is trained by."""
    return name.startswith(_BOTH + _STUDENT_ALONE)


def last_evaluation(folder: pathlib.Path) -> dict[str, float] | None:
    """The metrics of the last evaluation in metrics.jsonl, or None."""
    records, _ = json_lines.scan(folder / "metrics.jsonl")
    for record in reversed(records):
        metrics = {name: value for name, value in record.items() if name.startswith("eval/")}
        if metrics:
            return {name: math.nan if value is None else value for name, value in metrics.items()}
    return None


def drop(run: RunDir, names: Collection[str]) -> None:
    """Forgets rows that are no longer what the configuration says; they are measured again."""
    rows = _stored(run) if names else {}
    if rows.keys() & set(names):
        kept = [row for name, row in rows.items() if name not in names]
        run.write_json(FILE, run.read_json(FILE) | {"rows": kept})


def _stored(run: RunDir) -> dict[str, Any]:
    """The rows of an earlier attempt; a damaged table is put aside, told, and measured again."""
    try:
        stored = run.read_json(FILE, {"rows": list}) or {"rows": []}
        rows = {row["name"]: row for row in stored["rows"] if row["name"] in ORDER}
        for row in rows.values():
            if not _FIELDS <= row.keys():
                raise ValueError(f"{FILE}: the row {row['name']} is not whole")
    except (ValueError, TypeError, KeyError) as error:  # DamagedError among them
        os.replace(run.path / FILE, run.path / "table.damaged.json")
        run.event("damaged_table", reason=str(error), aside="table.damaged.json")
        print(f"{run.path / FILE}: is damaged, put aside and measured again", file=sys.stderr)
        return {}
    return rows
