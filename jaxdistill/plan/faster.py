"""Looks for settings with a lower floor where a step fits: one kind of setting after the other."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdistill.config import Config

Trial = Mapping[str, Any]
_GAIN = 0.99  # of a floor: what is nearer is no gain


class Kind(NamedTuple):
    """Settings of one kind, of which one is taken.

    Attributes:
      about: what they set.
      lowers: the parts of a floor that they may lower.
      overrides: as on the command line, one after the other.
      climbs: whether each goes further than the one before, so that the first without a gain ends
        them; else the best comes first, and the first gain ends them. What is no step decides
        nothing.
    """

    about: str
    lowers: tuple[str, ...]
    overrides: Sequence[tuple[str, ...]]
    climbs: bool = False


def kinds(config: Config, mesh: Mapping[str, int]) -> list[Kind]:
    """What may be faster and leaves what is learned as it is."""
    parts = config.train.micro_batches
    fewer = [(f"train.micro_batches={n}",) for n in range(1, parts) if parts % n == 0]
    order = ("none", "dots", "full")
    remat = [(f"student.remat={name}",) for name in order[: order.index(config.student.remat)]]
    named = {"student": config.student, **config.teacher_sections}
    slow = [f"{who}.attention=auto" for who, one in named.items() if one.attention == "xla"]
    return [
        Kind("attention", ("compute", "memory"), [tuple(slow)] if slow else []),
        Kind("micro-batches", ("memory", "links", "network"), fewer),
        Kind("weights", ("links", "network"), _once(config, mesh), climbs=True),
        *_meshes(mesh),
        Kind("remat", ("compute", "memory"), remat),
    ]


def _once(config: Config, mesh: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Weights that lie apart cross the mesh once a step, not once a micro-batch."""
    apart = mesh["fsdp"] * mesh.get("expert", 1)
    order = ("none", "teacher", "both")
    further = order[order.index(config.train.gather_once) + 1 :]
    wanted = further if config.train.micro_batches > 1 and apart > 1 else ()
    return [(f"train.gather_once={whose}",) for whose in wanted]


def _meshes(mesh: Mapping[str, int]) -> Iterator[Kind]:
    """Weights are gathered among fewer devices: copies of them, or heads apart."""
    for axis in ("data", "tensor"):
        sizes = [more for more in (2, 4, 8, 16) if mesh["fsdp"] % more == 0]
        named = [{**mesh, axis: mesh[axis] * n, "fsdp": mesh["fsdp"] // n} for n in sizes]
        overrides = [
            tuple(f"mesh.{name}={one[name]}" for name in ("data", "fsdp", "tensor"))
            for one in named
        ]
        yield Kind("mesh", ("memory", "links", "network"), overrides, climbs=True)


class Search:
    """Compiles one kind of setting after the other, each together with the gains before it.

        outcomes = list(Search(plan, attempt, tries=8, seconds=600).over(kinds(config, mesh)))

    Kinds that may lower the longest part of the step come first, until none does. The others come
    then, for the parts below the floor: they may take memory that a lower floor needs.

    Args:
      found: the plan, with floor_seconds, seconds and fits.
      attempt: overrides -> what comes of them, None where they are no step.
      tries: how many that are steps are compiled, at most.
      seconds: after which none is begun.
    """

    def __init__(
        self,
        found: Trial,
        attempt: Callable[[tuple[str, ...]], Trial | None],
        tries: int,
        seconds: float,
    ):
        self._best, self._attempt, self._tries = found, attempt, tries
        self._end = time.monotonic() + seconds
        self._taken: dict[str, tuple[str, ...]] = {}
        self._seen: dict[tuple[str, ...], Trial | None] = {}

    def over(self, kinds: Sequence[Kind]) -> Iterator[Trial]:
        """Every outcome, once."""
        left = list(kinds)
        while kind := next((one for one in left if self._longest() in one.lowers), None):
            left.remove(kind)
            yield from self._one(kind, lower)
        for kind in kinds:
            if kind.about not in self._taken or kind in left:
                yield from self._one(kind, better)

    def _longest(self) -> str:
        seconds = self._best["seconds"]
        return max(seconds, key=lambda part: seconds[part], default="")

    def _one(self, kind: Kind, gains: Callable[[Trial, Trial], bool]) -> Iterator[Trial]:
        for overrides in kind.overrides:
            tried = self._taken | {kind.about: overrides}
            words = tuple(word for about in sorted(tried) for word in tried[about])
            if words not in self._seen:
                tries = sum(outcome is not None for outcome in self._seen.values())
                if tries == self._tries or time.monotonic() > self._end:
                    return
                made = self._seen[words] = self._attempt(words)
                if made is not None:
                    yield made
            outcome, gain = self._seen[words], False
            if outcome is None:
                continue
            if outcome["fits"] and gains(outcome, self._best):
                self._best, self._taken, gain = outcome, tried, True
            if gain != kind.climbs:
                break


def lower(one: Trial, other: Trial) -> bool:
    """Whether a floor is lower."""
    return one["floor_seconds"] < _GAIN * other["floor_seconds"]


def better(one: Trial, other: Trial) -> bool:
    """Whether a floor is lower, or as low where all parts of the step together take less time."""
    if lower(one, other) or lower(other, one):
        return lower(one, other)
    together = lambda outcome: sum(outcome["seconds"].values())
    return together(one) < _GAIN * together(other)
