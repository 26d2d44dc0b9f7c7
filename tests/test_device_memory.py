"""Full device memory is one message with a remedy; other errors of XLA stay as they are."""

import jax
import pytest

from jaxdistill import device_memory
from jaxdistill.errors import FitError


def test_full_memory_is_one_message_that_says_what_makes_room():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore")
    with pytest.raises(FitError, match="allocating 8 bytes.*train.micro_batches.*plan") as caught:
        with device_memory.told():
            raise full
    assert "more devices" in str(caught.value)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [jax.errors.JaxRuntimeError("INTERNAL: no"), ValueError("RESOURCE_EXHAUSTED: of a disk")],
)
def test_other_errors_stay_as_they_are(other):
    with pytest.raises(type(other)) as caught, device_memory.told():
        raise other
    assert caught.value is other
