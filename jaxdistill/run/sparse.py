"""The masks of a run's student, as its configuration wants them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from jaxdistill import optim
from jaxdistill.compress import importance
from jaxdistill.compress.sparsify import input_norms
from jaxdistill.config.sparsity import Sparsity
from jaxdistill.errors import ConfigError
from jaxdistill.models import DecoderConfig
from jaxdistill.models.architecture import Weight, flat_weights, weights


def check(section: Sparsity, student: DecoderConfig) -> None:
    """The student has what is to become sparse, in sizes that the pattern divides.

    Raises:
      ConfigError: if not; or for an importance file of another model, or without norms.
    """
    kernels = _kernels(section, student)
    have = {name.split(".")[-2] for name in kernels}
    for target in section.targets:
        if target not in have and section.targets != Sparsity().targets:
            raise ConfigError(
                f"student.sparsity.targets: {target}: a {student.family} model has no such "
                f"projection; of those named it has {', '.join(sorted(have)) or 'none'}"
            )
    for name, row in kernels.items():
        if section.pattern == "2:4" and row.shape[-2] % 4:
            raise ConfigError(
                f"student.sparsity.pattern = 2:4: {name} has {row.shape[-2]} inputs, which 4 does "
                "not divide: leave it out of targets, or use unstructured"
            )
    _norms(section, student)


def transform(
    section: Sparsity | None, steps: int, student: DecoderConfig
) -> optax.GradientTransformationExtraArgs | None:
    """The last transform of the optimizer; None without sparsity.

    Args:
      section: of the configuration.
      steps: of the run.
      student: its shape.
    """
    if section is None:
        return None
    begin, end = section.span(steps)
    wanted = {f"student/{name.replace('.', '/')}" for name in _kernels(section, student)}

    def where(params: Any) -> Any:
        name = lambda path: "/".join(str(getattr(key, "key", key)) for key in path)
        return jax.tree_util.tree_map_with_path(lambda path, _: name(path) in wanted, params)

    return optim.sparsity(
        pattern=section.pattern,
        share=section.share,
        begin=begin,
        end=end,
        every=section.every,
        scope=section.scope,
        by=section.by,
        norms=_norms(section, student),
        where=where,
    )


def _kernels(section: Sparsity, student: DecoderConfig) -> dict[str, Weight]:
    """The rows of the table of weights that become sparse."""
    return {
        name: row
        for name, row in flat_weights(weights(student)).items()
        if name.endswith(".kernel") and name.split(".")[-2] in section.targets
    }


def _norms(section: Sparsity, student: DecoderConfig) -> Mapping[str, np.ndarray] | None:
    """Norms of every kernel's inputs, by its path in the trained parameters."""
    if section.importance is None:
        return None
    measured = importance.load(section.importance)
    return {f"student/{name}": norm for name, norm in input_norms(measured, student).items()}
