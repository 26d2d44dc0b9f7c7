"""Filters drop exactly what they say, count it, and keep budgets; records have their forms."""

import collections
import dataclasses

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.reasoning import rationales
from jaxdistill.reasoning.rationales import Sample, keep, records, split


def _sample(number, rationale="Two and two.", answer="4", correct=True, **changes):
    made = Sample(
        id="q1", sample=number, question="2 + 2?", gold="4", completion=f"{rationale} The "
        f"answer is {answer}.", rationale=rationale, answer=answer, correct=correct,
        logprob=-float(number), tokens=10, reason="stop",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_samples_are_dropped_for_named_reasons():
    samples = [
        _sample(0),
        _sample(1, rationale="two  AND two."),
        _sample(2, answer="5", correct=False),
        _sample(3, answer=None, correct=False),
        _sample(4, answer=None, correct=False, reason="length"),
        _sample(5, rationale=""),
        _sample(6, rationale="Other.", gold="", correct=None),
        _sample(7, id="q2"),
        _sample(8, rationale="Two\0 and \0 two."),
    ]
    kept, dropped = keep(samples)
    assert [one.sample for one in kept] == [0, 7]
    assert dropped == {
        "duplicate": 1, "wrong answer": 1, "no answer could be parsed": 1,
        "cut at the limit of tokens": 1, "no rationale": 1, "no gold answer": 1,
        "no text that can be trained on": 1,
    }  # fmt: skip
    kept, dropped = keep(samples, correct_only=False, dedupe=False)
    assert [one.sample for one in kept] == [0, 1, 2, 6, 7]
    assert sum(dropped.values()) + len(kept) == len(samples)


def test_budgets_choose_as_they_say():
    kinds = ["add the two", "count up fast", "draw many boxes", "use your fingers"]
    samples = [_sample(n, rationale=f"{kinds[n % 4]} number {n}") for n in range(12)]
    likely, dropped = keep(samples, budget=3, by="likelihood")
    assert [one.sample for one in likely] == [0, 1, 2] and dropped == {"over budget": 9}
    spread, _ = keep(samples, budget=4, by="diversity")
    assert sorted(one.sample % 4 for one in spread) == [0, 1, 2, 3]
    some, _ = keep(samples, budget=5, by="random", seed=1)
    assert some == keep(samples, budget=5, by="random", seed=1)[0] and len(some) == 5
    assert some != keep(samples, budget=5, by="random", seed=2)[0]
    assert len(keep(samples, budget=50, by="diversity")[0]) == 12
    with pytest.raises(ConfigError, match="told no log-probabilities"):
        keep([_sample(0, logprob=None)], budget=1, by="likelihood")
    with pytest.raises(ConfigError, match="budget 0 by 'random'"):
        keep(samples, budget=0)


def test_open_ended_questions_get_more():
    samples = [
        _sample(n, id=f"q{q}", rationale=" ".join(f"w{q}{n}{i}" for i in range(2 + q)))
        for q in range(10)
        for n in range(9)
    ]
    kept, _ = keep(samples, by="open_endedness")
    counts = collections.Counter(one.id for one in kept)
    assert [counts[f"q{q}"] for q in range(10)] == [1, 1, 3, 3, 5, 5, 7, 7, 9, 9]


def test_completions_are_split():
    assert split("Two and two. The answer is 4.\n\nQ: next", "number") == ("Two and two.", "4")
    assert split("It is B. So the answer is (B).", "choice") == ("It is B.", "B")
    assert split("<think>\nwell\n</think>\n\nThe answer is 4.", "number") == ("well", "4")
    assert split("no answer", "number") == ("no answer", None)


def test_records_have_their_forms():
    pair = [_sample(0), _sample(1, rationale="Count.")]
    assert records(pair, "scotd") == [
        {"prompt": "Q: 2 + 2?\nA:", "completion": " Two and two. The answer is 4."},
        {"prompt": "Q: 2 + 2?\nA:", "completion": " Count. The answer is 4."},
    ]
    assert records(pair, "label") == [
        {"prompt": "Q: 2 + 2?\nA:", "completion": " The answer is 4."}
    ]
    assert records(pair, "step_by_step") == [
        {"prompt": "predict: 2 + 2?", "completion": " 4"},
        {"prompt": "explain: 2 + 2?", "completion": " Two and two."},
        {"prompt": "explain: 2 + 2?", "completion": " Count."},
    ]
    assert records(pair[:1], "sequence_kd")[0]["completion"] == "Two and two. The answer is 4."
    (chat,) = records(pair[:1], "think")
    assert chat["messages"][1]["content"] == "<think>\nTwo and two.\n</think>\n\nThe answer is 4."
    with pytest.raises(ConfigError, match="form 'poem': is not one of"):
        records(pair, "poem")
    with pytest.raises(ConfigError, match="neither a gold nor a parsed answer"):
        records([_sample(0, gold="", answer=None)], "label")
    assert set(rationales.FORMS) == {"scotd", "label", "step_by_step", "sequence_kd", "think"}
