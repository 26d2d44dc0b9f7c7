"""The options of the optimizer: which of them a rule reads."""

import pytest

from jaxdistill.config.optimizer import Optimizer


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"name": "adafactor", "betas": (0.8, 0.9)}, "betas"),
        ({"name": "adafactor", "moments": "bfloat16"}, "moments"),
        ({"name": "lion", "eps": 1e-6}, "eps"),
        ({"name": "muon", "moments": "bfloat16"}, None),
        ({"name": "adamw", "eps": 1e-6}, None),
    ],
)
def test_a_setting_without_effect_is_refused(given, wrong):
    if wrong is None:
        assert Optimizer(**given).name == given["name"]
        return
    with pytest.raises(ValueError, match=f"{wrong}: has no effect with name: {given['name']}"):
        Optimizer(**given)
