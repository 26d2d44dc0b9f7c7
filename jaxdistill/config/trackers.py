"""The options of the trackers: W&B, MLflow and trackio, each through its own client."""

import importlib.util
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from jaxdistill.errors import ConfigError
from jaxdistill.section import PLAIN_PATTERN, Section

TrackerName = Annotated[str, Field(min_length=1, max_length=128, pattern=PLAIN_PATTERN)]
_TITLE = "Name of the run there; null: run.name."
_TAGS = "Labels of the run there."
# The import name of each client; the extra has the tracker's own name.
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


class WandbTracker(Section):
    """Weights & Biases; the key is read from $WANDB_API_KEY or `wandb login`."""

    project: TrackerName = Field(description="Project of the runs.")
    entity: TrackerName | None = Field(None, description="User or team; null: the key's own.")
    name: TrackerName | None = Field(None, description=_TITLE)
    tags: tuple[TrackerName, ...] = Field((), max_length=50, strict=False, description=_TAGS)
    mode: Annotated[str, Field(pattern="^(online|offline)$")] = Field(
        "online", description="online, or offline: kept in RUN/wandb for `wandb sync`."
    )


class MlflowTracker(Section):
    """MLflow; the server's password is read from $MLFLOW_TRACKING_PASSWORD."""

    experiment: TrackerName = Field(description="Experiment of the runs; made when missing.")
    uri: TrackerName | None = Field(
        None, description="Tracking server, or file:///FOLDER; null: $MLFLOW_TRACKING_URI."
    )
    name: TrackerName | None = Field(None, description=_TITLE)
    tags: tuple[TrackerName, ...] = Field((), max_length=50, strict=False, description=_TAGS)


class TrackioTracker(Section):
    """trackio, on this machine or in a Space of the Hugging Face Hub."""

    project: TrackerName = Field(description="Project of the runs.")
    space: TrackerName | None = Field(
        None, description="Space such as user/name; null: this machine."
    )
    name: TrackerName | None = Field(None, description=_TITLE)


class Trackers(Section):
    """The trackers that also keep what a run measures; each needs the extra of its name."""

    wandb: WandbTracker | None = Field(None, description="Weights & Biases.")
    mlflow: MlflowTracker | None = Field(None, description="MLflow.")
    trackio: TrackioTracker | None = Field(None, description="trackio.")

    def named(self) -> dict[str, Section]:
        """The sections that are given, by tracker."""
        return {name: section for name in PACKAGES if (section := getattr(self, name)) is not None}


def missing(options: Trackers) -> Iterator[ConfigError]:
    """Trackers whose client is not installed."""
    for name in options.named():
        if importlib.util.find_spec(PACKAGES[name]) is None:
            yield ConfigError(
                f"logging.{name}: needs the package {PACKAGES[name]}: "
                f"`pip install 'jaxdistill[{name}]'`, or remove the section"
            )
