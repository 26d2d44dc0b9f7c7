"""Auto-CoT: worked examples that a model makes itself, one per cluster of questions.

rationales by zero-shot CoT -> embed the questions -> k-means -> from each centre outwards,
the first example that the published rules accept
"""

import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import ConfigError
from jaxdistill.models import Model, decoder
from jaxdistill.models.generator import bucket
from jaxdistill.reasoning.prompts import TRIGGERS, Exemplar, plain
from jaxdistill.sharding import on_mesh

# Number of clusters and longest rationale in lines by task, as published; all others 8 and 5.
CLUSTERS = {"aqua": 4, "last_letters": 4, "commonsensqa": 7, "strategyqa": 6}
LINES = {"last_letters": 7}
SEED = 192
WORDS = 60


def accepts(example: Exemplar, *, arithmetic: bool, lines: int = 5) -> bool:
    """Whether the published rules accept an example.

    The question with its "Q:" and "A:" has at most 60 words; the rationale at most `lines` lines,
    blank ones apart, and a full stop at its end; there is an answer, and in arithmetic it occurs in
    the last sentence or among the last ten words.

    Reference: Zhang et al. 2022, arXiv 2210.03493, and its code's run_demo.
    """
    rationale, answer = example.rationale.strip(), example.answer.strip()
    if len(plain(example.question).split()) > WORDS or not answer or not rationale.endswith("."):
        return False
    if len(rationale.replace("\n\n", "\n").split("\n")) > lines:
        return False
    return not arithmetic or (
        answer in rationale.split(".")[-2] or answer in rationale.split()[-10:]
    )


def select(
    examples: Sequence[Exemplar],
    embeddings: np.ndarray,
    *,
    clusters: int = 8,
    arithmetic: bool = True,
    lines: int = 5,
    seed: int = SEED,
) -> list[int]:
    """Places of the chosen examples, at most one per cluster; a cluster may have none.

    Args:
      examples: questions with the rationales and answers a model gave.
      embeddings: float [examples, D] of the questions.
      clusters: k of k-means.
      arithmetic: whether the answer must occur where the rationale ends.
      lines: longest rationale.
      seed: of k-means.

    Raises:
      ConfigError: for more clusters than questions, or none.
    """
    if not 1 <= clusters <= len(examples):
        raise ConfigError(
            f"auto_cot: clusters = {clusters}: must be from 1 to the number of questions, "
            f"{len(examples)}"
        )
    labels, distances = k_means(embeddings, clusters, seed)
    chosen = []
    for cluster in range(clusters):
        members = np.flatnonzero(labels == cluster)
        for place in members[np.argsort(distances[members], kind="stable")]:
            if accepts(examples[place], arithmetic=arithmetic, lines=lines):
                chosen.append(int(place))
                break
    return chosen


def tidy(example: Exemplar) -> Exemplar:
    """The example as it is shown: its rationale on one line, with the trigger in front."""
    rationale = " ".join(example.rationale.split())
    if not rationale.startswith(TRIGGERS[0]):
        rationale = f"{TRIGGERS[0]} {rationale}"
    return example._replace(rationale=rationale)


def k_means(
    points: np.ndarray, clusters: int, seed: int, *, starts: int = 10, steps: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """(cluster of each point, its distance to the centre), the best of `starts` starts.

    Centres begin by k-means++ (Arthur, Vassilvitskii 2007) and move by Lloyd's rule.
    """
    rng, points = np.random.default_rng(seed), np.asarray(points, np.float64)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for _ in range(starts):
        centres = _spread(points, clusters, rng)
        labels = np.full(len(points), -1)
        for _ in range(steps):
            squares = _squares(points, centres)
            nearest = squares.argmin(axis=1)
            if (nearest == labels).all():
                break
            labels = nearest
            for cluster in range(clusters):
                if (labels == cluster).any():
                    centres[cluster] = points[labels == cluster].mean(axis=0)
        squares = _squares(points, centres)
        labels = squares.argmin(axis=1)
        cost = squares.min(axis=1)
        if best is None or cost.sum() < best[0]:
            best = (cost.sum(), labels, np.sqrt(cost))
    assert best is not None, "there is at least one start"
    return best[1], best[2]


def _spread(points: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """First centres: each drawn with a probability that grows with its distance to the others."""
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < clusters:
        squares = _squares(points, points[chosen]).min(axis=1)
        total = squares.sum()
        share = squares / total if total > 0 else np.full(len(points), 1 / len(points))
        chosen.append(int(rng.choice(len(points), p=share)))
    return points[chosen].copy()


def _squares(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    squares = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)[None]
    return np.maximum(squares, 0.0)


def tfidf(texts: Sequence[str]) -> np.ndarray:
    """float64 [texts, words]: rows of length 1 of term counts times log((1 + n) / (1 + df)) + 1."""
    words = [re.findall(r"[a-z0-9]+", text.lower()) for text in texts]
    names = {word: place for place, word in enumerate(sorted({w for row in words for w in row}))}
    counts = np.zeros((len(texts), max(1, len(names))))
    for number, row in enumerate(words):
        for word in row:
            counts[number, names[word]] += 1
    weights = counts * (np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1)
    return weights / np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)


def mean_pooled(model: Model, texts: Sequence[str], batch_size: int = 16) -> np.ndarray:
    """float64 [texts, D]: the mean over each text of a model's last hidden states, of length 1.

    Raises:
      ConfigError: if the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ConfigError(f"embeddings: {model.source} has no tokenizer: use tfidf")
    rows: list[list[int]] = model.tokenizer(list(texts))["input_ids"]
    found = [
        _pool(model, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)
    ]
    pooled = np.concatenate(found)
    return pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)


def _pool(model: Model, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Means over the rows' own tokens, [rows, D]."""
    width = bucket(max(map(len, rows)))
    tokens = np.zeros((len(rows), width), np.int32)
    real = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], real[number, : len(row)] = row, 1
    dtype = np.dtype(model.params["embedding"].dtype)
    with on_mesh(model.params):
        return np.asarray(_mean_hidden(model.config, dtype, model.params, tokens, real), np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_hidden(config, dtype, params, tokens_BL, real_BL):
    outputs = decoder.apply(config, params, tokens_BL, None, real_BL, compute_dtype=dtype)
    hidden_BLD = outputs.hidden.astype(jnp.float32) * real_BL[:, :, None]
    return hidden_BLD.sum(axis=1) / jnp.maximum(real_BL.sum(axis=1, keepdims=True), 1)
