"""What a server says of a given text is taken as vLLM says it, or refused with a reason."""

import collections
import re

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs the extra api")

from jaxdistill.errors import ModelError
from jaxdistill.reasoning.scored import Scorer
from tests.reasoning import scoring_server
from tests.reasoning.scoring_server import V, logprobs_of


@pytest.fixture
def server():
    with scoring_server.running() as made:
        yield made


def scorer(server, k=4, **options):
    options = {"retries": 0, "max_failures": 100, "timeout": 20.0, "prices": (1.0, 2.0)} | options
    return Scorer(server.url, "m", k=k, vocab=V, **options)


TEXT = [3, 1, 4, 1, 5, 9]


def test_the_likeliest_tokens_behind_each_token(server):
    made = scorer(server)
    (found,) = made.score([("name", TEXT)])
    logp = logprobs_of(TEXT)[:-1]
    order = np.argsort(-logp, axis=-1)[:, :4]
    assert not found.failed and found.job.tag[0] == "name"
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(logp, order, -1), rtol=1e-6)
    assert server.asked[0]["prompt"] == TEXT and server.asked[0]["max_tokens"] == 1
    spent = made.spent()
    assert (spent["requests"], spent["tokens_in"], spent["tokens_out"]) == (1, 6, 1)
    assert spent["cost"] == pytest.approx((6 * 1.0 + 1 * 2.0) / 1e6)


def without_last(told):
    return told[:-1]


def shifted(told):
    return [*told[1:], None]


def one_later(told):
    return [None, *told[1:-2], told[-1], told[-2]]


def fewer(told):
    first = next(iter(told[2]))
    return [*told[:2], {first: told[2][first]}, *told[3:]]


def nan(told):
    for one in told[3].values():
        one["logprob"] = float("nan")
    return told


def far_below(told):
    next(iter(told[3].values()))["logprob"] = -1e300
    return told


def beyond(told):
    next(iter(told[3].values()))["logprob"] = -(10**400)
    return told


def above(told):
    next(iter(told[3].values()))["logprob"] = 0.5
    return told


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda told: None, "holds no prompt_logprobs"),
        (without_last, "5 prompt_logprobs came for 6 tokens"),
        (shifted, "shifted: the first token has an entry"),
        (one_later, "shifted: an entry lacks the text's token"),
        (fewer, "has 1 tokens, not 4"),
        (nan, "nan is no log-probability"),
        (far_below, r"-1e\+300 is no log-probability"),
        (beyond, "is no table of tokens|is no log-probability"),
        (above, "0.5 is no log-probability"),
        (lambda told: [None, *["x"] * 5], "is no table of tokens"),
    ],
)
def test_what_is_no_answer_is_asked_again_and_then_told(spoil, words, server):
    server.spoil = spoil
    (found,) = scorer(server).score([("name", TEXT)])
    assert found.failed and re.search(words, found.reason)
    assert len(server.asked) == 3


def test_one_good_answer_among_bad_ones_is_enough(server):
    tries = collections.deque([without_last, lambda told: told])
    server.spoil = lambda told: tries.popleft()(told)
    (found,) = scorer(server).score([("name", TEXT)])
    assert not found.failed


def test_more_than_the_server_allows_ends_it_with_the_servers_words(server):
    with pytest.raises(ModelError, match="BadRequestError.*prompt logprobs of 21, more than 20"):
        list(scorer(server, k=21).score([("a", TEXT), ("b", TEXT)]))
