"""Whether teacher and student mean the same token by the same id, and how many ids count."""

import logging
from typing import Any

from jaxdistill.errors import MismatchError, ModelError

_SHOWN = 5
_RANDOM = {"dropout": None, "alpha": None, "nbest_size": None}  # of BPE, and of Unigram
_log = logging.getLogger(__name__)


def made_steady(tokenizer: Any) -> Any:
    """The tokenizer, without what makes the tokens of a text random; said where it had some.

    BPE dropout and Unigram sampling are meant for training from text that is read anew every
    epoch; here a text has one tokenisation, which its fingerprint stands for.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    for name, off in _RANDOM.items():
        value = getattr(model, name, None)
        if value:
            setattr(model, name, off)
            _log.warning(
                "tokenizer: %s = %g, which makes tokens random, is switched off", name, value
            )
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """Rows of a head that are tokens: one more than the highest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same(teacher: Any, student: Any) -> None:
    """Both tokenizers give every id the same token; sizes alone say nothing.

    Raises:
      MismatchError: naming the first ids that differ and what can be done.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    if ours == theirs:
        return
    differing = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    shown = ", ".join(
        f"{i}: teacher {theirs.get(i)!r}, student {ours.get(i)!r}" for i in differing[:_SHOWN]
    )
    raise MismatchError(
        f"teacher and student have different vocabularies: {len(differing)} of "
        f"{len(ours.keys() | theirs.keys())} ids differ ({shown}). Probabilities can only be "
        "compared token by token: take a student of the teacher's family, or cut one out of the "
        "teacher (student.from: teacher)"
    )


def check_rows(who: str, rows: int, vocab: int) -> None:
    """A model's head has a row for every token; rows behind them are padding and are left out.

    Raises:
      ModelError: if the tokenizer can produce ids that the model has no row for.
    """
    if rows < vocab:
        raise ModelError(
            f"{who}: its embedding has {rows} rows, but the tokenizer's ids reach {vocab - 1}; "
            "this tokenizer does not belong to this model: set tokenizer.from to the model's own"
        )
