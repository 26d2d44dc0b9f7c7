"""Compares a stored teacher with the teacher itself: `jaxdistill teacher cache verify`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdistill.compress import quantize
from jaxdistill.data.teacher_cache import formats
from jaxdistill.data.teacher_cache.formats import HIDDEN, SAMPLED
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.models import Model, decoder
from jaxdistill.references import load_any
from jaxdistill.run import changes
from jaxdistill.sharding import make_mesh
from jaxdistill.types import Outputs

_LENGTHS = 64  # texts are filled up to a multiple: each length costs a compiled program
_QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}


def verify(place: str, teacher: str | Model, count: int) -> dict[str, Any]:
    """Reads every object against its digest, and asks the teacher again about some segments.

    Args:
      place: of the store.
      teacher: a model, or its name.
      count: segments, spread evenly.

    Returns:
      segments, positions; weights: same or other. Of hidden and topk: kl_mean and kl_max of
      KL(stored || live), over the known tokens and the rest; of topk kept_mass. Of sampled:
      cross_entropy_gap, the mean of -log p over the draws less the live entropy, 0 on average,
      with its standard_error. entropy: of the live teacher. Shares by quantile; nats.

    Raises:
      DamagedError: naming the object that is missing, new or changed.
      ModelError: if the teacher cannot be loaded.
    """
    store = Store(place, thorough=True)
    identity = store.identity
    model = load_any(teacher, dtype=identity["teacher.dtype"], mesh=make_mesh(), tokenizer=False)
    if (rounded := quantize.of(identity["teacher.quantize"])) is not None:
        model = quantize.quantized(model, rounded)
    same = changes.weights(model.params) == identity["teacher.weights"]
    picked = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).round().astype(int))
    head = store.head() if store.format.name == HIDDEN else None
    rows: dict[str, list[np.ndarray]] = {}
    for entry in picked.tolist():
        live = _live(model, store.tokens(entry), store.format.vocab)[store.mask(entry)]
        for name, values in _compared(store, head, store.reading(entry)(), model, live).items():
            rows.setdefault(name, []).append(values)
    all_rows = {name: np.concatenate(values) for name, values in rows.items()}
    differences: dict[str, Any] = {
        "segments": len(picked),
        "positions": len(all_rows["entropy"]),
        "weights": "same" if same else "other",
    }
    if "kl" in all_rows:
        differences |= {
            "kl_mean": float(all_rows["kl"].mean()),
            "kl_max": float(all_rows["kl"].max()),
        }
    if "gap" in all_rows:
        gap = all_rows["gap"]
        error = float(gap.std() / np.sqrt(len(gap)))
        differences |= {"cross_entropy_gap": float(gap.mean()), "standard_error": error}
    for name in ("kept_mass", "entropy"):
        if name in all_rows:
            differences[name] = {
                q: float(np.quantile(all_rows[name], s)) for q, s in _QUANTILES.items()
            }
    return differences


def _live(model: Model, tokens: np.ndarray, vocab: int) -> np.ndarray:
    """float64 log-probabilities [N, V] of a text by the teacher itself."""
    room = -len(tokens) % _LENGTHS
    padded = np.pad(tokens, (0, room))[None]
    segment = np.pad(np.ones(len(tokens), np.int32), (0, room))[None]
    logits = np.asarray(model.logits(padded, segment), np.float64)[0, : len(tokens), :vocab]
    return _log_softmax(logits)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _compared(
    store: Store,
    head: np.ndarray | None,
    stored: dict[str, np.ndarray],
    model: Model,
    live: np.ndarray,
) -> dict[str, np.ndarray]:
    """Per position what `verify` reports, from stored fields [N, ...] and live [N, V]."""
    entropy = -_expected(live, live)
    if head is not None:
        logp = _log_softmax(_logits(stored, head, model, store.format.vocab))
        return {"kl": _expected(logp, logp - live), "entropy": entropy}
    ids = formats.unpack_ids(stored["ids"])
    if store.format.name == SAMPLED:
        shares = stored["counts"].reshape(len(live), -1) / (store.format.k * store.format.draws)
        said = np.take_along_axis(live, ids.reshape(len(live), -1), axis=-1)
        return {"gap": -(shares * said).sum(axis=-1) - entropy, "entropy": entropy}
    logp, rest = stored["logprobs"].astype(np.float64), stored["rest"][:, 0].astype(np.float64)
    said = np.take_along_axis(live, ids, axis=-1)
    tail = np.clip(1 - np.exp(said).sum(axis=-1), 1e-12, None)
    of_rest = np.where(rest > 0, rest * np.log(np.maximum(rest, 1e-300) / tail), 0.0)
    kl = _expected(logp, logp - said) + of_rest
    return {"kl": kl, "kept_mass": np.exp(logp).sum(axis=-1), "entropy": entropy}


def _logits(
    stored: dict[str, np.ndarray], head: np.ndarray, model: Model, vocab: int
) -> np.ndarray:
    """float64 logits [N, V] of stored hidden states, as the loss computes them."""
    hidden = jnp.asarray(stored["hidden"])
    if "scale" in stored:
        scale = stored["scale"].astype(np.float32)[:, None]
        hidden = jnp.asarray(stored["hidden"].astype(np.float32) * scale, head.dtype)
    outputs = Outputs(hidden[None], jnp.asarray(head), softcap=model.config.logits_softcap)
    return np.asarray(decoder.logits(outputs), np.float64)[0]


def _expected(logp: np.ndarray, values: np.ndarray) -> np.ndarray:
    return (np.exp(logp) * values).sum(axis=-1)
