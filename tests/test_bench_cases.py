"""What `jaxdistill bench` times: every function of a case has its value and its gradients."""

import jax
import numpy as np
import pytest

from benchmarks.peers import race
from jaxdistill.bench import cases, run
from jaxdistill.bench.shapes import Shape

SHAPE = Shape("odd", 12, 331, 8, 10, "float32")


@pytest.mark.parametrize("make", run.KINDS["loss"], ids=lambda make: make.__name__)
def test_all_functions_of_a_case_are_one_loss(make):
    truth, case = cases.exact(make(SHAPE), rows=SHAPE.tokens)
    _, wanted = jax.jit(case.functions[case.naive])(*case.arguments)
    assert all(np.abs(slope).max() > 0 for slope in wanted)
    for name, function in case.functions.items():
        value, slopes = jax.jit(function)(*case.arguments)
        np.testing.assert_allclose(value, truth, rtol=2e-6, err_msg=name)
        for slope, want in zip(slopes, wanted, strict=True):
            np.testing.assert_allclose(slope, want, atol=2e-6, err_msg=name)


def test_a_race_compares_signed_values():
    race.check_alike({"torch": -0.62530861, "jaxdistill": -0.62530864})
    for other in (0.6253, -0.62, float("nan")):
        with pytest.raises(AssertionError, match="not the same"):
            race.check_alike({"torch": other, "jaxdistill": -0.62530864})
