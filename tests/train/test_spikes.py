"""Loss spikes: seen in the step they come, never in a loss that only moves as it should."""

import json
import math
import random

import pytest

from jaxdistill.train.spikes import Spikes

CURVES = {
    "flat": lambda n: 3.0,
    "warmup": lambda n: 3.0 + 7.0 * math.exp(-n / 30),
    "training": lambda n: 2.0 + 8.0 * (n + 1) ** -0.3,
    "alpha from 0 to 1": lambda n: 1.0 + 3.0 * min(n / 1000, 1.0),
    "TAID's t": lambda n: 1.0 + 3.0 * (1.0 - math.exp(-n / 500)),
}
NOISES = {
    "normal": lambda rng: rng.gauss(0.0, 1.0),
    "laplace": lambda rng: rng.choice((-1.0, 1.0)) * rng.expovariate(1.0),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("curve", CURVES)
def test_no_false_alarm_in_ten_thousand_steps(curve, noise):
    for spread in (0.3, 0.01):
        rng, spikes = random.Random(0), Spikes(200, 10.0)
        losses = [CURVES[curve](n) + spread * NOISES[noise](rng) for n in range(5000)]
        assert not [loss for loss in losses if spikes.see(loss, {"knobs/alpha": 0.5})]


@pytest.mark.parametrize("curve", CURVES)
def test_a_spike_is_seen_in_its_step_and_told_once(curve):
    rng, spikes = random.Random(0), Spikes(200, 10.0)
    told = []
    for n in range(600):
        loss = CURVES[curve](n) + 0.1 * rng.gauss(0.0, 1.0)
        if n in (400, 401, 500):
            loss += 4.0
        spike = spikes.see(loss, {})
        if spike is not None:
            told.append(n)
            assert spike.loss == loss and abs(spike.expected - CURVES[curve](n)) < 0.5
    assert told == [400, 500]


def test_a_loss_that_falls_is_no_spike_and_what_stays_up_becomes_normal():
    spikes, rng = Spikes(64, 10.0), random.Random(0)
    level = lambda n: 5.0 if n < 100 else 1.0 if n < 200 else 5.0
    losses = [level(n) + 0.1 * rng.gauss(0.0, 1.0) for n in range(400)]
    assert [n for n, loss in enumerate(losses) if spikes.see(loss, {})] == [200]


def test_a_knob_that_jumps_changes_the_loss_by_design():
    """TED's second stage, after which another loss is minimised; a slow knob hides nothing."""
    for stage, told in ((lambda n: 1.0 if n < 100 else 2.0, []), (lambda n: n / 200, [100])):
        spikes, rng = Spikes(200, 10.0), random.Random(0)
        losses = [(1.0 if n < 100 else 9.0) + 0.1 * rng.gauss(0.0, 1.0) for n in range(200)]
        found = [n for n, loss in enumerate(losses) if spikes.see(loss, {"knobs/stage": stage(n)})]
        assert found == told


def test_too_few_losses_judge_nothing_and_equal_ones_have_a_spread():
    spikes = Spikes(200, 10.0)
    assert not any(spikes.see(loss, {}) for loss in [1.0] * 40 + [100.0])
    spikes = Spikes(200, 10.0)
    assert not any(spikes.see(loss, {}) for loss in [1.0] * 60 + [1.09])
    assert spikes.see(1.11, {}) is not None  # ten times 1 %


def test_it_goes_on_as_if_it_had_not_been_saved():
    rng = random.Random(0)
    losses = [3.0 + 0.1 * rng.gauss(0.0, 1.0) + 9.0 * (n in (90, 91, 150)) for n in range(200)]
    for cut in (10, 70, 91, 120):
        whole, first, second = (Spikes(64, 10.0) for _ in range(3))
        expected = [whole.see(loss, {"a": 1.0}) for loss in losses]
        found = [first.see(loss, {"a": 1.0}) for loss in losses[:cut]]
        second.load(json.loads(json.dumps(first.state())))
        assert found + [second.see(loss, {"a": 1.0}) for loss in losses[cut:]] == expected
