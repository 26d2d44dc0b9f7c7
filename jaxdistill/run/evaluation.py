"""Measures a model on text as its own run measured it: `jaxdistill eval`."""

import logging
from typing import Any

from jaxdistill import config as configs
from jaxdistill.commands import Evaluate
from jaxdistill.evaluate import perplexity
from jaxdistill.models import Model
from jaxdistill.references import as_run
from jaxdistill.run import texts

log = logging.getLogger(__name__)


def evaluate(
    model: str | Model, options: Evaluate, *, teacher: str | Model | None = None
) -> dict[str, Any]:
    """`perplexity.evaluate`, where a run's text is read as the run reads its own.

    Row length, packing, what counts in the loss, template and special tokens are the run's, unless
    `options` says otherwise.

    Raises:
      ModelError, MismatchError, DataError, ConfigError: whatever cannot be used.
    """
    run = None if isinstance(model, Model) else as_run(model)
    if run is None:
        return perplexity.evaluate(model, options, teacher=teacher)
    data = configs.load(run.folder / "config.resolved.yaml").data
    log.info(
        "text is read as %s reads it: rows of %d tokens, loss_on %s",
        run.folder,
        options.seq_len or data.seq_len,
        options.loss_on or data.loss_on,
    )
    return perplexity.evaluate(model, options, teacher=teacher, reading=texts.reading_of(data))
