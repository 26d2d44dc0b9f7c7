"""Whether teacher and student mean the same token by the same id, and how many ids count."""

import logging
from typing import Any

from jaxdistill import errors, rules

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
    """Both tokenizers give every id the same token.

    Raises:
      MismatchError: naming the first ids that differ and what can be done.
    """
    errors.check(rules.same_ids(teacher.get_vocab(), student.get_vocab()))


def check_rows(who: str, rows: int, vocab: int) -> None:
    """A model's head has a row for every token.

    Raises:
      ModelError: if the tokenizer can produce ids that the model has no row for.
    """
    errors.check(rules.head_rows(who, rows, vocab))
