"""How a run's tokenizer fits its models' own: what is shared, what is masked, what is refused."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxdistill import errors
from jaxdistill.config.models import Student
from jaxdistill.data import coverage, vocabularies
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.vocabularies import Pair, Vocabulary
from jaxdistill.errors import ConfigError
from jaxdistill.models import DecoderConfig, Model, reseat
from jaxdistill.models.vocabulary import BIAS
from jaxdistill.sharding import replicated

_REMEDIES = {
    "teacher": "Take data without them, tokenizer.from: teacher where the student has rows for "
    "them, or a teacher of the student's family",
    "student": "Take data without them, tokenizer.from: student, or a student of the teacher's "
    "family",
}


@dataclasses.dataclass(frozen=True)
class Pairing:
    """The run's vocabulary beside those that its models come with.

    Attributes:
      ours: the run's; None where every model has it.
      pairs: of it and a model's own, by "teacher" and "student".
      teacher: the teacher's configuration in its files, where it is put into the run's ids.
      aside: whether the teacher lacks ordinary tokens of the run's, and the method asks for none:
        it is neither loaded nor measured, but for the student that is cut out of it.
    """

    ours: Vocabulary | None = None
    pairs: Mapping[str, Pair] = dataclasses.field(default_factory=dict)
    teacher: DecoderConfig | None = None
    aside: bool = False

    @property
    def columns(self) -> tuple[int, ...] | None:
        """The ids that teacher and student are compared on; None: all."""
        return self.pairs["teacher"].columns if self.teacher is not None else None

    def lines(self) -> dict[str, str]:
        """What there is to know of each model's vocabulary, by its name."""
        lines = {name: str(pair) for name, pair in self.pairs.items() if pair.kind != "same"}
        if self.aside:
            lines["teacher"] += "; the method asks for no teacher, and it is not measured"
        return lines

    def check(self, data: Mapping[str, Dataset]) -> None:
        """The data hold no token that a model cannot take for what it is.

        Raises:
          MismatchError: with the share of the data, and the tokens.
        """
        errors.check(self._errors(data))

    def _errors(self, data: Mapping[str, Dataset]) -> Iterator[errors.UserError]:
        for name, pair in self.pairs.items():
            if name == "teacher" and self.aside:
                continue
            assert self.ours is not None, "pairs are with it"
            ids = pair.unreadable if name == "teacher" else pair.misplaced
            yield from coverage.errors(name, pair, self.ours, ids, data, _REMEDIES[name])

    def as_loaded(self, teacher: Model | None) -> Model | None:
        """The teacher's shape as its files have it."""
        if teacher is None or self.teacher is None:
            return teacher
        return dataclasses.replace(teacher, config=self.teacher)

    def seated(self, teacher: Model | None) -> Model | None:
        """A loaded teacher in the run's ids."""
        if teacher is None or self.teacher is None:
            return teacher
        pair = self.pairs["teacher"]
        return reseat.reseated(teacher, pair.read, pair.renamed)

    def abstract(self, params: Mapping[str, Any], mesh: Any) -> Mapping[str, Any]:
        """The shapes of the teacher's parameters, with what `seated` adds to them."""
        if self.columns is None:
            return params
        table = params["embedding"]
        bias = jax.ShapeDtypeStruct(table.shape[:1], table.dtype, sharding=replicated(mesh))
        return {**params, BIAS: bias}


def of(
    tokenizer: Any,
    teacher: Model | None,
    student: Model,
    *,
    born: Student,
    named: str,
    needs_teacher: bool,
    best_metric: str,
) -> tuple[Pairing, Model | None]:
    """The pairing of a run, and the teacher's shape in the run's ids; None where it is aside.

    Args:
      tokenizer: of the run.
      teacher: its shape, with its own tokenizer.
      student: the same of the student.
      born: how the student comes to be.
      named: `tokenizer.from`, for messages.
      needs_teacher: whether the method asks for one.
      best_metric: what checkpoints are ranked by.

    Raises:
      ConfigError: for a student cut out of a teacher that has other ids than the run, or a metric
        against a teacher that is aside.
    """
    own = {"teacher": teacher, "student": student}
    if born.random or born.from_ == "teacher":
        del own["student"]  # nothing of it stands for a token yet, or the teacher's pair says it
    others = {
        name: model
        for name, model in own.items()
        if model is not None and model.tokenizer is not None and model.tokenizer is not tokenizer
    }
    if not others:
        return Pairing(), teacher
    ours = vocabularies.vocabulary(tokenizer)
    pairs = {
        name: vocabularies.compare(
            ours, vocabularies.vocabulary(model.tokenizer), model.config.vocab_size
        )
        for name, model in others.items()
    }
    pair = pairs.get("teacher")
    if teacher is None or pair is None or pair.in_place:
        return Pairing(ours, pairs), teacher
    if pair.ours.ordinary and not needs_teacher:
        if best_metric in ("eval/kl_t1", "eval/agree_top1"):
            raise ConfigError(
                f"checkpoint.best_metric = {best_metric}: is measured against a "
                f"teacher, and this one lacks tokens of the run's ({pair}): use eval/loss"
            )
        return Pairing(ours, pairs, aside=True), None
    if born.from_ == "teacher" and born.tokenizer is None:
        raise ConfigError(
            f"tokenizer.from = {named!r}: the student is cut out of the teacher "
            f"and has its rows, of another vocabulary ({pair}): use tokenizer.from: teacher, or "
            "student.tokenizer and tokenizer.from: student, which makes it rows of its own"
        )
    seated = dataclasses.replace(teacher, config=reseat.shape(teacher.config, pair.read))
    return Pairing(ours, pairs, teacher.config), seated
