"""Auto-CoT: published rules on their own demonstrations, selection on points placed by hand."""

import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.errors import ConfigError
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.reasoning import auto_cot
from jaxdistill.reasoning.prompts import Exemplar, load_exemplars

GOOD = Exemplar("How many?", "First one. Then two. So 3.", "3")


@pytest.mark.parametrize(
    ("change", "arithmetic", "accepted"),
    [
        ({}, True, True),
        ({"question": "w " * 58}, True, True),  # with Q: and A: 60 words
        ({"question": "w " * 59}, True, False),
        ({"rationale": "So 3"}, True, False),
        ({"rationale": "a\nb\nc\nd\nSo 3."}, True, True),
        ({"rationale": "a\n\nb\nc\nd\nSo 3."}, True, True),
        ({"rationale": "a\nb\nc\nd\ne\nSo 3."}, True, False),
        ({"answer": " "}, True, False),
        ({"answer": "4"}, True, False),
        ({"answer": "4"}, False, True),
        ({"rationale": "It is 4. No it is another one of them all."}, True, False),
        ({"rationale": "It is 3 . " + "w " * 7 + "end."}, True, True),  # among the last ten words
        ({"rationale": "It is 3 . " + "w " * 9 + "end."}, True, False),
    ],
)
def test_the_published_rules(change, arithmetic, accepted):
    assert auto_cot.accepts(GOOD._replace(**change), arithmetic=arithmetic) is accepted


def test_the_published_demonstrations_follow_the_rules(reference_data):
    shipped = load_exemplars(reference_data / "auto_cot" / "multiarith_auto")
    assert all(auto_cot.accepts(one, arithmetic=True) for one in shipped)
    assert [auto_cot.tidy(one) for one in shipped] == shipped
    # Given all of them and as many clusters, each is the first of its own.
    points = auto_cot.tfidf([one.question for one in shipped])
    assert sorted(auto_cot.select(shipped, points, clusters=8)) == list(range(8))


def test_each_cluster_gives_its_first_accepted_example():
    # Two clusters on a line, around 0 and 100; distances to the centre rise with the offset.
    offsets = [0.0, 1.0, -2.0, 4.0, -3.0]
    points = np.asarray([[base + offset] for base in (0.0, 100.0) for offset in offsets])
    bad = GOOD._replace(answer="")
    examples = [bad, GOOD, GOOD, GOOD, GOOD, bad, bad, GOOD, bad, GOOD]
    assert sorted(auto_cot.select(examples, points, clusters=2)) == [1, 7]
    assert auto_cot.select([bad] * 10, points, clusters=2) == []
    for wrong in (0, 11):
        with pytest.raises(ConfigError, match=f"clusters = {wrong}: must be from 1 to the number"):
            auto_cot.select(examples, points, clusters=wrong)


def test_k_means_finds_separate_groups_and_survives_equal_points():
    rng = np.random.default_rng(0)
    centres = np.asarray([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = np.concatenate([centre + rng.standard_normal((20, 2)) for centre in centres])
    labels, distances = auto_cot.k_means(points, 4, seed=0)
    assert all(len(set(labels[20 * group : 20 * group + 20])) == 1 for group in range(4))
    assert len(set(labels)) == 4 and distances.max() < 5
    labels, distances = auto_cot.k_means(np.ones((5, 3)), 3, seed=0)
    np.testing.assert_allclose(distances, 0, atol=1e-6)


def test_embeddings_place_like_texts_together():
    texts = ["two red apples", "two green apples", "a train leaves town"]
    for found in (auto_cot.tfidf(texts), _pooled(texts)):
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
        assert found[0] @ found[1] > found[0] @ found[2]
    # A text's embedding does not depend on its neighbours' lengths.
    np.testing.assert_allclose(_pooled(texts[:1]), _pooled(texts)[:1], atol=1e-5)


def _pooled(texts):
    tokenizer = byte_tokenizer()
    config = models.DecoderConfig(
        "llama",
        vocab_size=len(tokenizer),
        embed=16,
        mlp=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=8,
    )
    return auto_cot.mean_pooled(models.random(config, 0, tokenizer=tokenizer), texts)
