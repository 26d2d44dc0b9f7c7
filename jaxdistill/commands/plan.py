"""What a run is planned for."""

from typing import Annotated

from pydantic import Field

from jaxdistill.section import Flag, Section


class Plan(Section):
    """What a run is planned for."""

    target: Annotated[str, Flag(metavar="TARGET")] = Field(
        description="What to compile for: tpu:v5p:2x2x4 or tpu:v5e:4x4x2 (chips of a slice, then "
        "slices; needs the package libtpu), gpu:h100:8 or gpu:h100:4x8 (hosts x GPUs; needs JAX's "
        "CUDA plugin, no GPU), or cpu:8."
    )
    tries: Annotated[int, Field(ge=0, le=10**4), Flag(metavar="N")] = Field(
        8,
        description="Changes to compile, at most: until it fits, or for faster settings where it "
        "does; 0 for none.",
    )
    minutes: Annotated[float, Field(gt=0), Flag(metavar="M")] = Field(
        10.0, description="No change that may be faster is begun after so many."
    )
