"""Which teacher a record is for, and batches whose micro-batches are of one teacher each."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.records import TEACHER, Record
from jaxdistill.data.rules import printable
from jaxdistill.data.sources import Source
from jaxdistill.errors import DataError


@dataclasses.dataclass(frozen=True)
class TeacherRoutes:
    """The names of several teachers, of which every record is for one.

    The record's own field `teacher` decides; without it that of its source, then the default.

    Attributes:
      names: of the teachers; a route is a place in them, from 1.
      default: of records that name none, or None: such a record is refused.
    """

    names: tuple[str, ...]
    default: str | None = None

    def identity(self) -> dict[str, Any]:
        """What decides, besides the records, who teaches which."""
        return {"teachers": list(self.names), "default": self.default}

    def of(self, record: Record, source: Source) -> int:
        """The route of a record.

        Raises:
          DataError: naming the record, for a name that no teacher has, or for none.
        """
        return self.chosen(record.notes.get(TEACHER), source, record.line)

    def chosen(self, named: str | None, source: Source, line: int) -> int:
        """The route of a record that names one of them, or none.

        Raises:
          DataError: as `of`.
        """
        name = named or source.teacher or self.default
        where, known = f"{source.name}:{line}", ", ".join(self.names)
        if name is None:
            raise DataError(
                f"{where}: names no teacher, and there are {len(self.names)} ({known}): give the "
                "record a field `teacher`, its file a `teacher`, or set routing.default"
            )
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{where}: names the teacher {printable(name)!r}, and there are {known}{hint}"
            )
        return self.names.index(name) + 1

    def counted(self, routes: Sequence[int] | np.ndarray) -> Mapping[str, int]:
        """How often each teacher is named in routes."""
        counts = np.bincount(np.asarray(routes, np.int64), minlength=len(self.names) + 1)
        return dict(zip(self.names, counts[1:].tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class MicroBatchLayout:
    """How the rows of a batch lie where each micro-batch is of one teacher.

    A batch of M * m rows takes M + K - 1 parts of m rows, which is room for any of its mixtures:

        sum_k ceil(n_k / m) <= M + K - 1    for    sum_k n_k = M m

    What is left is padding. A part that is padding alone costs no time in the step.

    Attributes:
      teachers: K.
      micro_batches: M, in which a batch without padding is computed.
    """

    teachers: int
    micro_batches: int

    @property
    def parts(self) -> int:
        """Micro-batches of the padded batch."""
        return self.micro_batches + self.teachers - 1

    def size(self, rows: int) -> int:
        """Rows of the padded batch that holds any mixture of so many rows."""
        return self.parts * self._part(rows)

    def _part(self, rows: int) -> int:
        assert rows % self.micro_batches == 0, "checked before"
        return rows // self.micro_batches

    def fits(self, routes: Sequence[int] | np.ndarray, rows: int) -> bool:
        """Whether rows of these teachers fit into a batch for `rows` of any mixture."""
        counts = np.bincount(np.asarray(routes, np.int64), minlength=1)
        return int((-(-counts // self._part(rows))).sum()) <= self.parts

    def places(self, routes: Sequence[int] | np.ndarray, rows: int) -> np.ndarray:
        """Which row stands at each place of the padded batch.

        Rows of a teacher keep their order, teachers stand in theirs. Part p has the places p,
        p + parts, ..., as the step takes them.

        Args:
          routes: the teacher of each row, from 1.
          rows: of a batch without padding, at least as many.

        Returns:
          int64 [size(rows)], places in `routes`; -1 is padding.
        """
        part = self._part(rows)
        places = np.full((self.parts, part), -1, np.int64)
        given, at = np.asarray(routes, np.int64), 0
        for route in np.unique(given):
            own = np.flatnonzero(given == route)
            for first in range(0, len(own), part):
                here = own[first : first + part]
                places[at, : len(here)] = here
                at += 1
        return places.T.reshape(-1)
