"""What each unit of a model is worth, from neurons and experts to layers, by one forward pass."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdistill.compress import activations
from jaxdistill.errors import ConfigError, DataError, StorageError
from jaxdistill.models import DecoderConfig
from jaxdistill.safe import json_file, whole_file
from jaxdistill.types import Batch

FILE = "importance.safetensors"
BY = ("influence", "loss", "range", "range_loss")
_AXES = ("layers", "embed", "mlp", "heads", "kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class ImportanceScores:
    """Scores of all units of one model, whatever size it is to be pruned to.

    Attributes:
      neurons: [layers, F], of the MLP; [layers, X, F] of every expert's where there are experts.
      heads: [layers, H], query heads.
      channels: [D], of the hidden states.
      shares: by the norm's name in the table of weights, [layers, units] or of the final norm
        [units], mean of x ** 2 / mean(x ** 2) before it: how much of its energy a unit carries.
        Units are channels, or the channels of all heads where a norm goes over them.
      cosines: [layers + 1, layers + 1], mean cosine between hidden states, x_0 the embeddings.
      experts: [layers, X], or None where there are none.
      inputs: L2 norm over all tokens of what projections read, [layers, units] or of every expert
        [layers, X, units]: "attention" is read by query, key and value, "out" by it, "mlp" by gate
        and up, "down" by it.
      loss: [layers], rise of the loss without one layer, or None where it was not measured.
      range_loss: number of layers n -> [layers - n + 1], rise of the loss without n layers in a
        row, by the first of them.
      facts: shape of the model, rows and tokens it was measured on, and whatever a caller noted.
    """

    neurons: np.ndarray
    heads: np.ndarray
    channels: np.ndarray
    shares: Mapping[str, np.ndarray]
    cosines: np.ndarray
    inputs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    experts: np.ndarray | None = None
    loss: np.ndarray | None = None
    range_loss: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def influence(self) -> np.ndarray:
        """Block influence [layers]: 1 - E[cos(x_l, x_{l+1})]; 0 for a layer that changes nothing.

        Reference: ShortGPT, arXiv 2403.03853.
        """
        return self.range_influence(1)

    def range_influence(self, count: int) -> np.ndarray:
        """1 - E[cos(x_l, x_{l+n})] of n layers in a row [layers - n + 1], by the first of them."""
        return 1.0 - np.diagonal(self.cosines, count)

    def kept_layers(self, keep: int, by: str = "influence") -> list[int]:
        """Which layers stay when only `keep` of them do.

        Args:
          keep: how many.
          by: "influence" and "loss" leave out the layers of the lowest scores, wherever they are;
            "range" and "range_loss" leave out the layers in a row that score lowest together.

        Raises:
          ConfigError: for an unknown `by`, a number that does not exist, or a loss that was not
            measured.

        Reference: Minitron leaves out layers in a row, arXiv 2408.11796.
        """
        layers = len(self.neurons)
        if not 1 <= keep <= layers:
            raise ConfigError(
                f"layers = {keep}: the model has {layers}: keep at least 1 and at most {layers}"
            )
        if keep == layers:
            return list(range(layers))
        scores = self._layer_scores(layers - keep, by)
        if by in ("range", "range_loss"):
            first = int(np.argmin(scores))
            gone = range(first, first + layers - keep)
            return [layer for layer in range(layers) if layer not in gone]
        return best(scores, keep)

    def _layer_scores(self, drop: int, by: str) -> np.ndarray:
        scores = {
            "influence": lambda: self.influence,
            "range": lambda: self.range_influence(drop),
            "loss": lambda: self.loss,
            "range_loss": lambda: self.range_loss.get(drop),
        }
        if by not in scores:
            raise ConfigError(f"by = {by!r}: must be one of {', '.join(BY)}")
        score = scores[by]()
        if score is None:
            have = ", ".join(map(str, self.range_loss)) or "none"
            raise ConfigError(
                f"by = {by!r}: the loss without {drop if by == 'range_loss' else 'each'} layer(s) "
                f"was not measured (ranges that were: {have}): measure it, or use influence or "
                "range"
            )
        return score


def best(scores: np.ndarray, keep: int) -> list[int]:
    """The `keep` highest scores as rising indices; of equal ones the first."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    return sorted(int(index) for index in order[:keep])


def measure(
    config: DecoderConfig,
    params: Any,
    batches: Iterable[Batch],
    *,
    compute_dtype: DTypeLike = jnp.bfloat16,
    facts: Mapping[str, Any] | None = None,
) -> ImportanceScores:
    """Importance of every unit, from one forward pass over calibration batches, at any sharding.

        neuron i:   sqrt(sum over samples of (mean over tokens of |a_i|) ** 2),  a enters `down`
        head h:     the same of what enters `out`, per channel; then the L2 norm over its E channels
        channel c:  the same of what attention and the MLP read (their norm's output, where there
                    is one before them); added over both and over the layers
        input i of a projection:  sqrt(sum over tokens of x_i ** 2), for Wanda's scores
        expert e:   mean over the tokens that pass it of share_e * |what it gives|, its L2 norm over
                    the channels; 0 where no token does

    An expert's score is REAP's, with the shares that the layer uses: it counts how much an expert
    adds and not only how often; its authors found it ahead of choosing by frequency, and of merging
    experts, in models of 20B to 1T parameters. For a token that passes other experts, an expert's
    neurons count 0.

    Sums are float32 on the devices within a batch and float64 on the host over batches.

    Args:
      config: of the model.
      params: its parameters, on any mesh; batches must lie on the same.
      batches: a row is a sample; segment 0 is padding.
      compute_dtype: dtype of activations.
      facts: noted in the result.

    Raises:
      DataError: if there is nothing to measure on, or the model's values are not finite.

    Reference: Minitron, arXiv 2407.14679, section 2.2; REAP, Lasby et al. 2025, arXiv 2510.13999.
    """
    total: dict[str, np.ndarray] = {}
    for batch in batches:
        part = jax.device_get(activations.sums(config, np.dtype(compute_dtype), params, batch))
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    if not total or not total["tokens"]:
        raise DataError("calibration: there are no tokens to measure importance on")
    if not all(np.isfinite(value).all() for value in total.values()):
        raise DataError(
            "calibration: activations are not finite: compute in float32, check weights"
        )
    measured = {"rows": int(total["rows"]), "tokens": int(total["tokens"])}
    return ImportanceScores(
        neurons=np.sqrt(total["neurons"]),
        heads=np.sqrt(total["heads"].sum(-1)),
        channels=np.sqrt(total["channels"]).sum((0, 1)),
        shares={
            name.removeprefix("shares."): value / total["tokens"]
            for name, value in total.items()
            if name.startswith("shares.")
        },
        cosines=total["cosines"] / total["tokens"],
        inputs={
            name.removeprefix("inputs."): np.sqrt(value)
            for name, value in total.items()
            if name.startswith("inputs.")
        },
        experts=total["experts"] / np.maximum(total["routed"], 1) if config.experts else None,
        facts={"shape": shape_of(config), **measured, **(facts or {})},
    )


def with_losses(
    importance: ImportanceScores,
    config: DecoderConfig,
    params: Any,
    batches: Callable[[], Iterable[Batch]],
    *,
    vocab: int,
    counts: Sequence[int] = (1,),
    compute_dtype: DTypeLike = jnp.bfloat16,
) -> ImportanceScores:
    """The importance with the rise of the loss when n layers in a row are left out, for every n.

    One program serves all; a pass over the batches per range, and one of the whole model.

    Args:
      importance: from `measure`.
      config: of the model.
      params: its parameters.
      batches: called for every pass.
      vocab: how many rows of the head are tokens.
      counts: the n, each below the number of layers; 1 also gives `loss`.
      compute_dtype: dtype of activations.

    Raises:
      ConfigError: for an n that leaves nothing.
    """
    layers = config.layers
    for count in counts:
        if not 1 <= count < layers:
            raise ConfigError(f"layers to leave out = {count}: must be 1 to {layers - 1}")

    def loss(first: int, count: int) -> float:
        index = np.arange(layers)
        keep = jnp.asarray((index < first) | (index >= first + count))
        pair = np.zeros(2)
        for batch in batches():
            mean = activations.loss_without(
                config, vocab, np.dtype(compute_dtype), params, batch, keep
            )
            pair += [float(mean.total), float(mean.count)]
        return pair[0] / max(pair[1], 1.0)

    whole = loss(0, 0)
    ranges = dict(importance.range_loss)
    for count in counts:
        ranges[count] = np.array([loss(f, count) - whole for f in range(layers - count + 1)])
    facts = dict(importance.facts) | {"loss": whole}
    return dataclasses.replace(
        importance, loss=ranges.get(1, importance.loss), range_loss=ranges, facts=facts
    )


def shape_of(config: DecoderConfig) -> dict[str, int]:
    """The sizes that scores are counted by."""
    experts = {} if config.experts is None else {"experts": config.experts.count}
    return {name: getattr(config, name) for name in _AXES} | experts


def check_belongs(importance: ImportanceScores, config: DecoderConfig) -> None:
    """The scores are of a model of this shape.

    Raises:
      ConfigError: naming the sizes that differ.
    """
    ours = shape_of(config)
    theirs = importance.facts.get("shape", {})
    wrong = [
        f"{name} {theirs.get(name)} for {ours.get(name)}"
        for name in {**ours, **theirs}
        if theirs.get(name) != ours.get(name)
    ]
    if wrong:
        raise ConfigError(
            f"importance: was measured on another model ({', '.join(wrong)}): measure this one"
        )


def save(importance: ImportanceScores, path: str | os.PathLike) -> pathlib.Path:
    """Writes the scores as a safetensors file, the facts as JSON in its header.

    Raises:
      StorageError: if it cannot be written.
    """
    file = pathlib.Path(path)
    arrays = {
        name: np.ascontiguousarray(getattr(importance, name), np.float64)
        for name in ("neurons", "heads", "channels", "cosines", "experts", "loss")
        if getattr(importance, name) is not None
    }
    for group in ("shares", "inputs", "range_loss"):
        for name, value in getattr(importance, group).items():
            arrays[f"{group}.{name}"] = np.ascontiguousarray(value, np.float64)
    beside = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, beside, metadata={"jaxdistill": json.dumps(dict(importance.facts))})
        whole_file.usual_mode(beside)
        os.replace(beside, file)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{file}: cannot be written: {error}") from error
    return file


def load(path: str | os.PathLike) -> ImportanceScores:
    """The scores of a file that `save` wrote.

    Raises:
      ConfigError: if it is missing, damaged or no such file.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(
            f"importance = {str(file)!r}: no such file; `jaxdistill importance` writes one"
        )
    try:
        with safe_open(str(file), "np") as opened:
            facts = json_file.parse((opened.metadata() or {})["jaxdistill"])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
        names = ("shares", "inputs", "range_loss")
        groups: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
        for name in list(arrays):
            group, dot, rest = name.partition(".")
            if dot:
                groups[group][rest] = arrays.pop(name)
        ranges = {int(count): value for count, value in groups["range_loss"].items()}
        own = {"shares": groups["shares"], "inputs": groups["inputs"]}
        return ImportanceScores(**arrays, **own, range_loss=ranges, facts=facts)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(
            f"importance = {str(file)!r}: is damaged or no importance file ({error}): measure again"
        ) from error


def check_enough(rows: int, wanted: int, name: str) -> None:
    """The calibration data has the rows that are wanted.

    Raises:
      DataError: with both numbers.
    """
    if rows < wanted:
        raise DataError(
            f"calibration: {name} has {rows} rows, {wanted} are wanted: give more text, shorter "
            f"rows (seq_len), or rows = {rows}"
        )
