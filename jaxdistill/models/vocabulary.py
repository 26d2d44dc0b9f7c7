"""Whether teacher and student mean the same token by the same id, and how many ids count."""

from typing import Any

from jaxdistill import errors, rules


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
