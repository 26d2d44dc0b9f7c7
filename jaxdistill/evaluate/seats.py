"""Models of one vocabulary beside each other: each in the ids that the text was cut into."""

from typing import Any

from jaxdistill import errors
from jaxdistill.data import coverage, vocabularies
from jaxdistill.evaluate.held_out import HeldOut
from jaxdistill.models import Model, reseat
from jaxdistill.models.vocabulary import check_rows, vocabulary_size

_REMEDY = "Measure it alone on this text, by bits per byte, or on text without them"


def seated(model: Model, tokenizer: Any, rows: HeldOut) -> tuple[Model, tuple[int, ...] | None]:
    """A model in the ids of a tokenizer, and those of them that it has; None: all.

    Args:
      model: with the tokenizer it comes with; without one its ids are taken for the tokenizer's.
      tokenizer: that cut the text.
      rows: the text.

    Raises:
      ModelError: for a head without a row for every token.
      MismatchError: if the text holds tokens that the model does not have, with their share.
    """
    if model.tokenizer is None or model.tokenizer is tokenizer:
        check_rows(model.source, model.config.vocab_size, vocabulary_size(tokenizer))
        return model, None
    ours = vocabularies.vocabulary(tokenizer)
    theirs = vocabularies.vocabulary(model.tokenizer)
    pair = vocabularies.compare(ours, theirs, model.config.vocab_size)
    data = {"text": rows.dataset}
    errors.check(coverage.errors(model.source, pair, ours, pair.unreadable, data, _REMEDY))
    if pair.in_place:
        return model, None
    return reseat.reseated(model, pair.read, pair.renamed), pair.columns
