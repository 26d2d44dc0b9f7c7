"""Device memory that is full: XLA's error as one message that says what makes room."""

import contextlib
from collections.abc import Iterator

import jax

from jaxdistill.errors import FitError

ROOM = (
    "raise train.micro_batches, set student.remat, lower train.batch_size or data.seq_len, or use "
    "more devices; `jaxdistill plan` shows what fits before anything runs"
)


def is_full(error: BaseException) -> bool:
    """Whether XLA found no room for an array or a program."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def told(room: str = ROOM) -> Iterator[None]:
    """Reports in one message that a device has no room for what runs inside.

    Args:
      room: what makes room.

    Raises:
      FitError: in place of XLA's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_full(error):
            raise
        first = str(error).splitlines()[0][:200]
        raise FitError(f"the memory of a device is full ({first}): {room}") from error
