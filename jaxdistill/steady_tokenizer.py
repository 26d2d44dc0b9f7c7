"""A tokenizer without what makes its tokens random: a text has one tokenisation here."""

import logging
from typing import Any

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
