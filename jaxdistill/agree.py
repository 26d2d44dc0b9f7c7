"""What the processes of a run decide alike: votes, outcomes, and whether they are one run.

Every function is called by all processes, in the same order. With one process nothing is sent.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill import errors
from jaxdistill.errors import ConfigError

Result = TypeVar("Result")
_MEETINGS = itertools.count()  # all processes meet in the same order
_PATIENCE_MS = 10_000  # of one question to the coordinator; it is asked again


def leads() -> bool:
    """Whether this process is the one that writes and tells: process 0."""
    return jax.process_index() == 0


class Vote:
    """Asks all processes how much one of them wants to happen, once in every step.

        vote = Vote()
        level = vote(2 if stopping else 1 if save_is_due else 0)

    The answer is the largest level of any process, the same one everywhere, so that all act in the
    same step. With one process it is that process's own level. With several it is the answer to the
    call before, because the question travels behind the training step and nobody waits for it: a
    wish must stand until it is answered. An answer above 0 withdraws the question that is open.
    """

    def __init__(self):
        self._open: jax.Array | None = None
        count = jax.process_count()
        self._ask: Callable[[int], jax.Array] | None = None if count == 1 else _asker(count)

    def __call__(self, level: int) -> int:
        """The largest level that any process had in the call before; alone, this one."""
        if self._ask is None:
            return level
        before, self._open = self._open, self._ask(level)
        answer = 0 if before is None else int(before)
        if answer:
            self._open = None
        return answer


def _asker(count: int) -> Callable[[int], jax.Array]:
    """level -> the largest of all processes', on one device of each."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.asarray([first[process] for process in range(count)]), ("process",))
    apart, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("process",), ()))
    largest = jax.jit(jnp.max, out_shardings=whole)

    def ask(level: int) -> jax.Array:
        own = np.full(1, level, np.int32)
        answer = largest(jax.make_array_from_process_local_data(apart, own, (count,)))
        # Devices keep the order of programs. A CPU may run two at once, and Gloo, which tells their
        # messages apart by order alone, then mixes them up.
        return jax.block_until_ready(answer) if jax.default_backend() == "cpu" else answer

    return ask


def together(work: Callable[[], Result]) -> Result:
    """Does work in every process; where it fails in one of them, it fails in all.

    Raises:
      UserError: this process's own, or that of the first that failed, with its number.
    """
    if jax.process_count() == 1:
        return work()
    result, failure = _tried(work)
    _meet(range(jax.process_count()))
    _raise_any(failure, [json.loads(text) for text in _gather(json.dumps(_described(failure)))])
    return result


def by_leader(work: Callable[[], Any]) -> Any:
    """Does work in process 0 alone; its result, which JSON must hold, or its error is everyone's.

    Raises:
      UserError: as process 0 did.
    """
    if jax.process_count() == 1:
        return work()
    result, failure = _tried(work) if leads() else (None, None)
    _meet([0])
    told = json.loads(_gather(json.dumps([_described(failure), result]))[0])
    _raise_any(failure, told[:1])
    return told[1]


def leader_first(work: Callable[[], Result]) -> Result:
    """Does work in process 0, then in the others: for what the first makes and they find.

    Raises:
      UserError: as `together`.
    """
    if jax.process_count() == 1:
        return work()
    done: list[Result] = []
    by_leader(lambda: done.append(work()))
    return together(lambda: done[0] if done else work())


def same(facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same facts, such as configuration and data.

    Raises:
      ConfigError: in all processes alike, naming what differs, the processes and their values.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    if (digests == digests[0]).all():
        return
    first, *others = [json.loads(told) for told in _gather(text)]
    told = [
        f"{name}: process 0 has {first.get(name)}, process {number} has {other.get(name)}"
        for number, other in enumerate(others, start=1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
    raise ConfigError(
        f"the processes were not started alike, so all of them stop: {'; '.join(told[:5])}{more}. "
        "Give every process the same configuration, files and version of jaxdistill"
    )


def everyone(text: str) -> list[str]:
    """The text of every process, by its number; alone, this one's."""
    return [text] if jax.process_count() == 1 else _gather(text)


def _meet(awaited: Iterable[int]) -> None:
    """Waits until these processes are here, however long their work takes.

    A collective does not wait so long: one that has begun fails after half an hour, and the first,
    which connects the processes, after half a minute. So they meet at the coordinator before. A
    process that dies meanwhile is missed there, which ends the others.
    """
    from jax._src import distributed  # the coordinator's store has no public name

    client = distributed.global_state.client
    assert client is not None, "of several processes"
    name = f"jaxdistill/met/{next(_MEETINGS)}"
    own = jax.process_index()
    client.key_value_set(f"{name}/{own}", "here")
    for process in awaited:
        while process != own:
            try:
                client.blocking_key_value_get(f"{name}/{process}", _PATIENCE_MS)
                break
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


def _tried(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # told to the others, then raised again
        return None, error


def _described(error: Exception | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, str(error)]


def _raise_any(own: Exception | None, failures: list[list[str] | None]) -> None:
    """Raises this process's error, or tells of the first of the others'."""
    if own is not None:
        raise own
    for number, failure in enumerate(failures):
        if failure is not None:
            kind = getattr(errors, failure[0], RuntimeError)
            lines = failure[1].splitlines() or [failure[0]]
            raise kind("\n".join(f"process {number}: {line}" for line in lines))


def _gather(text: str) -> list[str]:
    """The text of every process, by its number."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, int(sizes.max()) - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
