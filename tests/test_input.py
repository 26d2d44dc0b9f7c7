"""A little of benchmarks/soak_input.py: whatever comes in, a value or a message goes out."""

import random
import resource

from benchmarks import soak_input


def test_damaged_input_never_ends_in_a_traceback():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # tests before this one
    found = soak_input.run(configs=120, records=250, files=50, seed=1)
    assert found["tracebacks"] == []
    assert found["typos/share right"] >= 0.95
    assert found["configs/refused"] > 60 and found["configs/without a place"] == 0
    assert found["records/records"] >= 250 and found["records/lost"] == 0
    assert found["records/used"] and found["records/set aside"]
    assert found["files/message without a name"] == 0
    assert found["most memory MiB"] < before + 2000


def test_the_counts_see_tracebacks_and_wrong_suggestions(monkeypatch):
    counts = soak_input.Counts()
    counts.case("x", 3, lambda: 1 / 0)
    assert counts["x/tracebacks"] == 1 and "x 3: ZeroDivisionError" in counts.tracebacks[0]
    monkeypatch.setattr("jaxdistill.config.keys.nearest", lambda *_: "other")
    soak_input.fuzz_typos(random.Random(0), 5, counts)
    assert counts["typos/cases"] and not counts["typos/right"]
