"""Flipped bits of a stored teacher, in numbers: each must be found before its numbers are used."""

import pathlib
import random
from collections import Counter
from typing import Any

import numpy as np

from jaxdistill.data.teacher_cache import catalog, formats, parts, segments
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import ConfigError, DamagedError

SEGMENTS, VOCAB, EMBED = 40, 300, 16


def flips(folder: pathlib.Path, count: int, seed: int) -> dict[str, Any]:
    """Flips a bit of a random object, `count` times, reads everything, and puts it back."""
    stores = {name: _made(folder / name, name) for name in formats.NAMES}
    chosen = random.Random(seed)
    found: Counter[str] = Counter()
    for _ in range(count):
        name = chosen.choice(formats.NAMES)
        path = chosen.choice(stores[name])
        before = path.read_bytes()
        place = chosen.randrange(8 * len(before))
        after = bytearray(before)
        after[place // 8] ^= 1 << place % 8
        path.write_bytes(after)
        found["found" if _refused(folder / name) else f"missed in {path.name}"] += 1
        path.write_bytes(before)
    for name in formats.NAMES:
        assert not _refused(folder / name), "what was put back is whole"
    return {"flips": count, **found}


def _refused(place: pathlib.Path) -> bool:
    """Whether reading all of a store ends in an error of ours."""
    try:
        store = Store(str(place))
        for entry in range(len(store)):
            store.reading(entry)()
            store.tokens(entry)
    except (DamagedError, ConfigError):
        return True
    return False


def _made(place: pathlib.Path, name: str) -> list[pathlib.Path]:
    """A whole store of random numbers; its files."""
    form = formats.choose(name, vocab=VOCAB, embed=EMBED)
    objects, numbers = Objects(str(place)), np.random.default_rng(0)
    catalog.begin(objects, {"format": form.facts()}, {"seq_len": 64})
    for _ in range(2):
        wanted = []
        for _ in range(SEGMENTS // 2):
            tokens = numbers.integers(0, VOCAB, numbers.integers(2, 64)).astype(np.int32)
            mask = np.arange(len(tokens)) < len(tokens) - 1
            key = segments.key_of(tokens, np.arange(len(tokens)))
            wanted.append(parts.Wanted(key, mask, tokens))
        rows = sum(int(one.mask.sum()) for one in wanted)
        arrays = {
            field: _numbers(numbers, form, field, (rows, *shape), dtype)
            for field, (dtype, shape) in form.fields().items()
        }
        parts.write(objects, form, wanted, arrays)
    catalog.seal(objects)
    return sorted(path for path in place.rglob("*") if path.is_file())


def _numbers(
    numbers: np.random.Generator, form: formats.Format, field: str, shape: Any, dtype: Any
) -> np.ndarray:
    """Numbers that a field may hold."""
    if field == "ids":
        return numbers.integers(0, 2, shape).astype(dtype)
    if field == "counts":
        counts = np.zeros(shape, dtype)
        counts[..., 0], counts[..., 1] = form.k - 1, 1
        return counts
    return numbers.normal(size=shape).astype(dtype)
