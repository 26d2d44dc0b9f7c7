"""What configuration, small files and loaded models are all held to: each rule once, as numbers.

A rule yields what is wrong. `config.preflight` asks it with what small files say, without JAX; a
start asks it again with the models in hand, so that `validate` and `train` say the same.
"""

import fnmatch
import math
import os
from collections.abc import Iterator, Mapping, Sequence

from jaxdistill.errors import ConfigError, ModelError

_OF_A_MODEL = ("RUN.json", "config.json", "tokenizer.json")  # of a run's student, or a folder's


def batches(
    batch_size: int, micro_batches: int, eval_batch_size: int, parts: int, *, where: str = "mesh"
) -> Iterator[tuple[tuple[str, str], str]]:
    """Each part of a batch's rows has as many as the others: (key, what it must be).

    `where` is the key of the mesh, here and below.
    """
    sizes = f"{where}.data * {where}.fsdp * {where}.expert ({parts})"
    if batch_size // micro_batches % parts:
        of = "batch_size" if micro_batches == 1 else "batch_size / micro_batches"
        yield ("train", "batch_size"), f"{of} must be a multiple of {sizes}"
    if eval_batch_size % parts:
        yield ("eval", "batch_size"), f"must be a multiple of {sizes}"


def moment(given: int | float, steps: int) -> int:
    """The step, or update, that a `section.StepOrFraction` stands for in a run of so many."""
    return given if isinstance(given, int) else round(given * steps)


def row_length(
    seq_len: int, who: str, longest: int, key: str = "data.seq_len"
) -> Iterator[ConfigError]:
    """Rows are no longer than a model was made for."""
    if seq_len > longest:
        yield ConfigError(
            f"{key} = {seq_len}: the {who} was made for {longest} positions: use at most that"
        )


def kept_layers(kept: Sequence[int], count: int) -> Iterator[ConfigError]:
    """The layers of a cut student are some of its teacher's, in order."""
    kept = list(kept)
    missing = any(not 0 <= layer < count for layer in kept)
    if missing or not kept or kept != sorted(set(kept)):
        yield ConfigError(
            f"student.layers = {kept}: the teacher's layers are 0 to {count - 1}; name at least "
            "one, each once, in rising order"
        )


def tensor_axis(
    parts: int, who: str, sizes: Mapping[str, int], *, where: str = "mesh"
) -> Iterator[ConfigError]:
    """The tensor axis divides what of a model lies along it; the vocabulary may be any size.

    Key and value heads are repeated where there are fewer of them than devices.
    """
    fewer = lambda name, n, size: name == "kv_heads" and size and n % size == 0
    fits_in = lambda name, n, size: size % n == 0 or fewer(name, n, size)
    wrong = [f"{name} = {size}" for name, size in sizes.items() if not fits_in(name, parts, size)]
    if wrong:
        rest = [size for name, size in sizes.items() if name != "kv_heads"] or [*sizes.values()]
        common = math.gcd(*rest)
        fits = [
            n
            for n in range(1, common + 1)
            if all(fits_in(name, n, size) for name, size in sizes.items())
        ]
        yield ConfigError(
            f"{where}.tensor = {parts} does not divide the {who}'s {', '.join(wrong)}: take one of "
            f"{', '.join(map(str, fits[-6:]))}"
        )


def expert_axis(
    parts: int, tensor: int, experts: Mapping[str, int], *, where: str = "mesh"
) -> Iterator[ConfigError]:
    """The expert axis, with tensor, divides the experts of every model that has some.

    Args:
      parts: of the axis expert.
      tensor: of the axis tensor.
      experts: who has experts -> how many in a layer.
      where: the key of the mesh.
    """
    if parts > 1 and not experts:
        yield ConfigError(
            f"{where}.expert = {parts}: no model on it has routed experts: use {where}.fsdp"
        )
    for who, count in experts.items():
        if parts > 1 and count % (parts * tensor):
            fits = [n for n in range(1, count + 1) if count % (n * tensor) == 0]
            yield ConfigError(
                f"{where}.expert = {parts}: with {where}.tensor = {tensor} it does not divide the "
                f"{who}'s {count} experts: take one of {', '.join(map(str, fits[-6:]))}"
            )


def exceptions_match(
    key: str, patterns: Sequence[str], family: str, names: Sequence[str]
) -> Iterator[ConfigError]:
    """Every pattern of an exception to a scheme names a projection.

    Args:
      key: of the option.
      patterns: as a shell matches files.
      family: of the model.
      names: of its projections in a layer.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            yield ConfigError(
                f"{key}.exceptions: {pattern!r} matches no projection: a {family} model has "
                f"{', '.join(names)}, in every layer alike"
            )


def context_axis(seq_len: int, parts: int, *, where: str = "mesh") -> Iterator[ConfigError]:
    """Every device of `context` has a part from the front of a row and one from its end."""
    if parts > 1 and seq_len % (2 * parts):
        yield ConfigError(
            f"data.seq_len = {seq_len}: must be a multiple of 2 * {where}.context = {2 * parts}: "
            "change one of them"
        )


def local(key: str, path: str) -> Iterator[ConfigError]:
    """A place that is written to is a folder of a file system, no address of an object store."""
    scheme, separator, _ = path.partition("://")
    if separator:
        yield ConfigError(
            f"{key} = {path}: {scheme}:// is no folder of this machine, and only folders are "
            "written to: give one, of a mounted bucket if need be, and copy it afterwards"
        )


def run_is_there(source: str) -> Iterator[ConfigError]:
    """A name that stands for a run, by its @ or by its place among runs, is that of one."""
    path = os.path.expanduser(source)
    if source.startswith(("hf:", "package:")) or os.path.isfile(path):
        return
    if any(os.path.isfile(os.path.join(path, name)) for name in _OF_A_MODEL):
        return
    folder, at, which = path.rpartition("@")
    if not at or not (which in ("best", "latest") or which.isdecimal()):
        folder = path
        if os.path.basename(os.path.dirname(path)) != "runs":
            return
    if not os.path.exists(os.path.join(folder, "RUN.json")):
        yield ConfigError(f"{folder}: holds no run (no RUN.json): give a run folder")


def tokenizer_rows(rows: int | None, known: int) -> Iterator[ConfigError]:
    """The rows that the loss takes for tokens are no fewer than the tokenizer has."""
    if rows is not None and rows < known:
        yield ConfigError(
            f"tokenizer.rows = {rows}: the tokenizer has {known} tokens: use at least that, or "
            "leave it out"
        )


def head_rows(who: str, rows: int, vocab: int) -> Iterator[ModelError]:
    """A model's head has a row for every token; rows behind them are padding and are left out."""
    if rows < vocab:
        yield ModelError(
            f"{who}: its embedding has {rows} rows, but the tokenizer's ids reach {vocab - 1}: set "
            "tokenizer.from to the model's own"
        )
