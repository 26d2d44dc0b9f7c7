"""What `jaxdistill bench` times: every function of a case has its value and its gradients."""

import jax
import numpy as np
import pytest

from benchmarks.peers import race
from jaxdistill.bench import cases, liger, peer_logprobs, run
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


class Peer(liger.PeerProcess):
    """Stands in for a peer's process: TRL by the definition in float64, and no Liger."""

    def __init__(self, python, folder, script, key):
        self.folder, self.key = folder, key

    def ask(self, do, **words):
        if self.key == "liger":
            raise liger.Skipped("No module named 'liger_kernel'")
        if do == "answer":
            arrays = [np.float64(np.load(self.folder / f"{n}.npy")) for n in peer_logprobs.ARRAYS]
            hidden, head, ids, advantages = arrays
            log_q = cases.log_softmax64(hidden @ head.T)[range(len(ids)), ids.astype(int)]
            return {"value": (advantages * log_q).mean()}
        return {"trl": "9"} if do == "begin" else {"seconds": 0.5, "peak_mib": 3.0}

    def close(self):
        pass


def test_peers_stand_beside_our_log_probabilities_or_are_said_to_be_left_out(monkeypatch):
    monkeypatch.setattr(peer_logprobs, "PeerProcess", Peer)
    monkeypatch.setitem(run.KINDS, "loss", ())
    told = []
    found = run.run("loss", (SHAPE,), 1, told.append, "some-python")
    (row,) = found["rows"]
    assert set(row) == set(run.COLUMNS) and found["peers"]["trl"]["trl"] == "9"
    assert (row["function"], row["ms"], row["temporary_mib"]) == ("log q, TRL", 500, 3.0)
    assert row["error"] < 1e-6 and row["ratio"] > 1
    assert [line for line in told if "Liger: left out: No module named 'liger_kernel'" in line]


def test_a_python_without_torch_has_no_peers():
    told = []
    assert peer_logprobs.there("false", told.append) == {}
    assert len(told) == 2 and all("its process ended with 1" in line for line in told)
