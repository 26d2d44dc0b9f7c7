"""The formats of stored teachers: which arrays a position has, and how large they are."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxdistill.errors import ConfigError

Fields = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name -> (dtype, shape of one position)

VERSION = 1
HIDDEN, TOPK, SAMPLED = "hidden", "topk", "sampled"
NAMES = (HIDDEN, TOPK, SAMPLED)
# The types that a format's numbers may have, the default first.
DTYPES: Mapping[str, tuple[str, ...]] = {
    HIDDEN: ("bfloat16", "float32", "int8"),
    TOPK: ("float16", "float32"),
    SAMPLED: ("float16",),
}
MOST_DRAWN = 2**16 - 1  # a count has 2 bytes


@dataclasses.dataclass(frozen=True)
class Format:
    """What is stored of every position that counts.

        hidden     hidden [D], with int8 scale [] too: h = hidden * scale
        topk       ids [K, 2 or 3], logprobs [K], rest [1 + Z], log_z [Z]
        sampled    ids [draws, N, 2 or 3], counts [draws, N], entropy [1]

    log_z holds log Z(T) = log sum_v p_v^(1/T) of each T in `temperatures`; rest the mass of all
    other tokens, first at T = 1, then at each T. Then log p_T = log p / T - log Z(T). Ids are
    bytes, the low one first; a drawn id whose count is 0 is none.

    Attributes:
      name: of `NAMES`.
      vocab: V, tokens of the vocabulary.
      embed: D of the teacher.
      dtype: of its numbers, of DTYPES[name].
      k: K of topk, at most V; V is the dense teacher. N of sampled.
      temperatures: of topk, besides 1.
      draws: of sampled: independent draws of N tokens.
      seed: of the draws.
    """

    name: str
    vocab: int
    embed: int
    dtype: str
    k: int = 0
    temperatures: tuple[float, ...] = ()
    draws: int = 1
    seed: int = 0

    @property
    def id_bytes(self) -> int:
        """Bytes of a token's id."""
        return 2 if self.vocab <= 2**16 else 3

    def fields(self) -> Fields:
        """Name -> (dtype, shape of one position)."""
        fields: Fields
        if self.name == HIDDEN:
            fields = {"hidden": (np.dtype(self.dtype), (self.embed,))}
            if self.dtype == "int8":
                fields["scale"] = (np.dtype(ml_dtypes.bfloat16), ())
            return fields
        if self.name == TOPK:
            more = len(self.temperatures)
            fields = {
                "ids": (np.dtype(np.uint8), (self.k, self.id_bytes)),
                "logprobs": (np.dtype(self.dtype), (self.k,)),
                "rest": (np.dtype(np.float32), (1 + more,)),
            }
            if more:
                fields["log_z"] = (np.dtype(np.float32), (more,))
            return fields
        kept = (self.draws, min(self.k, self.vocab))
        return {
            "ids": (np.dtype(np.uint8), (*kept, self.id_bytes)),
            "counts": (np.dtype(np.uint8 if self.k < 2**8 else np.uint16), kept),
            "entropy": (np.dtype(np.float16), (1,)),
        }

    def bytes_per_token(self) -> int:
        """Bytes of a position before compression; of sampled, where ids repeat, the most."""
        sizes = (dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.fields().values())
        return sum(sizes)

    def batch_fields(self) -> Fields:
        """As `fields`, of what a batch carries: of several draws the one of its epoch."""
        if self.name != SAMPLED:
            return self.fields()
        return {
            name: (dtype, shape if name == "entropy" else shape[1:])
            for name, (dtype, shape) in self.fields().items()
        }

    def in_epoch(self, row: Mapping[str, np.ndarray], epoch: int) -> dict[str, np.ndarray]:
        """What a batch carries of a row [L, ...] in an epoch."""
        if self.name != SAMPLED:
            return dict(row)
        draw = epoch % self.draws
        return {name: a if name == "entropy" else a[:, draw] for name, a in row.items()}

    def unsound(self, field: str, values: np.ndarray) -> bool:
        """Whether values of a field cannot be right: lost chunks, damage, broken models."""
        if values.dtype.kind in "fV":  # V: NumPy's kind of bfloat16
            return not bool(np.isfinite(values.astype(np.float32)).all())
        if field == "ids":
            return bool((unpack_ids(values) >= self.vocab).any())
        if field == "counts":
            return bool((values.sum(axis=-1, dtype=np.int64) != self.k).any())
        return False

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**dataclasses.asdict(self), "temperatures": list(self.temperatures)}


def of_facts(facts: Mapping[str, Any]) -> Format:
    """The format of `Format.facts`."""
    given: dict[str, Any] = {**facts, "temperatures": tuple(facts["temperatures"])}
    return Format(**given)


def choose(
    name: str,
    *,
    vocab: int,
    embed: int,
    dtype: str = "auto",
    k: int | None = None,
    temperatures: tuple[float, ...] = (),
    draws: int | None = None,
    seed: int | None = None,
) -> Format:
    """A format of what a user asks for.

    Raises:
      ConfigError: for settings that do not belong to the format, or numbers that do not fit.
    """
    if dtype not in ("auto", *DTYPES[name]):
        raise ConfigError(f"dtype = {dtype}: {name} holds {', '.join(DTYPES[name])}")
    for label, given, owners in (
        ("k", k, (TOPK, SAMPLED)),
        ("temperatures", temperatures or None, (TOPK,)),
        ("draws", draws, (SAMPLED,)),
        ("seed", seed, (SAMPLED,)),
    ):
        if given is not None and name not in owners:
            rule = f"belongs to format {' or '.join(owners)}: remove it"
            raise ConfigError(f"{label} = {given}: {rule}")
    if vocab > 2**24:
        raise ConfigError(f"format = {name}: ids of {vocab} tokens do not fit 3 bytes")
    k = {HIDDEN: 0, TOPK: min(64, vocab), SAMPLED: 50}[name] if k is None else k
    if name == TOPK and k > vocab:
        raise ConfigError(f"k = {k}: the vocabulary has {vocab} tokens: use at most that")
    if name == SAMPLED and k > MOST_DRAWN:
        raise ConfigError(f"k = {k}: at most {MOST_DRAWN} tokens are drawn for a position")
    kept = tuple(sorted(set(temperatures) - {1.0}))
    dtype = DTYPES[name][0] if dtype == "auto" else dtype
    return Format(name, vocab, embed, dtype, k, kept, draws or 1, seed or 0)


def pack_ids(ids: np.ndarray, width: int) -> np.ndarray:
    """Token ids [...] as bytes [..., width], the low one first."""
    assert ids.size == 0 or 0 <= int(ids.min()) <= int(ids.max()) < 256**width
    whole = np.ascontiguousarray(ids.astype("<u4"))
    return whole.view(np.uint8).reshape(*ids.shape, 4)[..., :width]


def unpack_ids(packed: np.ndarray) -> np.ndarray:
    """int32 [...], the ids that `pack_ids` made bytes of."""
    parts = [
        packed[..., place].astype(np.int32) << (8 * place) for place in range(packed.shape[-1])
    ]
    return np.sum(parts, axis=0, dtype=np.int32)


def quantised(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [N, D] as int8 [N, D] and a bfloat16 scale [N]; |error| <= scale / 2.

    The scale is rounded up, so that the largest number of a row still fits.
    """
    wide = hidden.astype(np.float32)
    exact = np.abs(wide).max(axis=-1) / 127
    scale = exact.astype(ml_dtypes.bfloat16)
    low = scale.astype(np.float32) < exact
    above = (scale.view(np.uint16) + 1).view(ml_dtypes.bfloat16)
    scale = np.where(low, above, scale)
    divisor = np.where(scale == 0, 1, scale.astype(np.float32))
    return np.rint(wide / divisor[:, None]).astype(np.int8), scale
