"""What a model family is: how its configuration and its tensors differ from the common table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.formats import tensor_names
from jaxdistill.formats.tensor_names import Names


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` differs from the common table.

    Attributes:
      architecture: the transformers class that opens a saved folder.
      published: models that are of it, for people.
      assumed: its configuration defaults where they differ from the common ones.
      names: of its tensors.
      features: our fields that it fixes.
      read: our fields -> configuration fields that set them, beyond the common ones.
      renamed: common configuration fields -> what this family calls them.
      aliases: what else transformers calls a field -> the common name.
      absent: common configuration fields that it lacks.
      only: fields that change the mathematics -> the values under which this decoder is the same.
      ignored: fields that change nothing in a forward pass.
      windowed: "never"; "all" layers where `sliding_window` is set; "listed": or those that
        `layer_types` lists; "switched": only where `use_sliding_window` says so too; "chosen"
        layers; or "pattern": all but every n-th.
      ropes: which kinds of position scaling it has; "partial": its heads may turn in part; "local":
        windows have frequencies of their own; "interleaved": neighbours turn together.
    """

    architecture: str
    published: str
    assumed: Mapping[str, Any]
    names: Names = dataclasses.field(default_factory=lambda: tensor_names.LLAMA)
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    windowed: str = "never"
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")

    def field(self, common: str) -> str:
        """What this family calls a common configuration field."""
        return self.renamed.get(common, common)
