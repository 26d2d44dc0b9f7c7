"""What a run may find changed when it goes on, and what that means: one table of rules."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxdistill
from jaxdistill.config import syntax
from jaxdistill.errors import ConfigError, DamagedError
from jaxdistill.run.folder import RunDir
from jaxdistill.sharding import HOST
from jaxdistill.train.table import flatten

FILE = "fingerprints.json"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What follows when something has changed since a run began, or since it last went on.

    Attributes:
      refused: whether the run does not go on.
      bitwise: whether its numbers stay the same to the last bit.
      meaning: in words.
    """

    refused: bool
    bitwise: bool
    meaning: str


_OTHER_RUN = "going on would mix two runs: restore what was there, or start a new run"
_ROUNDING = "state and batches are exact; sums may be rounded otherwise from here on"

# By the beginning of a fact's name; the longest one holds.
RULES: Mapping[str, Rule] = {
    "data": Rule(True, False, _OTHER_RUN),
    "tokenizer": Rule(True, False, _OTHER_RUN),
    "teacher": Rule(True, False, _OTHER_RUN),
    "teachers": Rule(True, False, _OTHER_RUN),
    "student": Rule(True, False, _OTHER_RUN),
    "config": Rule(False, False, "from here on the new value holds"),
    "config.seed": Rule(True, False, _OTHER_RUN),
    "config.method.name": Rule(True, False, _OTHER_RUN),
    "config.teacher.random": Rule(True, False, _OTHER_RUN),
    "config.teacher.mesh": Rule(False, False, _ROUNDING),
    "config.teacher.api": Rule(False, True, "how a server is asked, not which model answers"),
    "config.teacher.api.model": Rule(True, False, _OTHER_RUN),
    "config.teacher.self": Rule(True, False, _OTHER_RUN),
    **dict.fromkeys(
        (f"config.teacher.self.{name}" for name in ("ema_decay", "ema_every")),
        Rule(False, False, "from here on the new value holds"),
    ),
    "config.teacher.self.leak_phrases": Rule(False, True, "what is shown"),
    # What the checkpoints hold, and in which numbers.
    "config.optimizer.name": Rule(True, False, _OTHER_RUN),
    "config.optimizer.moments": Rule(True, False, _OTHER_RUN),
    "config.student.param_dtype": Rule(True, False, _OTHER_RUN),
    "config.student.lora": Rule(True, False, _OTHER_RUN),
    "config.student.lora.dropout": Rule(False, False, "from here on the new value holds"),
    "config.student.base": Rule(True, False, _OTHER_RUN),
    "config.student.sparsity": Rule(True, False, _OTHER_RUN),  # masks are in the checkpoints
    "config.rollout": Rule(True, False, _OTHER_RUN),  # which prompt is whose turn
    **dict.fromkeys(
        (
            f"config.rollout.{name}"
            for name in ("share", "temperature", "top_k", "top_p", "min_p", "distilled_tokens")
        ),
        Rule(False, False, "from here on the new value holds"),
    ),
    "config.reward.updates": Rule(True, False, _OTHER_RUN),  # which answers an update learns from
    "config.reward.verifiers": Rule(True, False, _OTHER_RUN),  # verdicts are kept by answer alone
    "config.reward.workers": Rule(False, True, "who judges, not how"),
    "config.rollout.slots": Rule(False, False, _ROUNDING),
    "config.rollout.cache_dtype": Rule(False, False, _ROUNDING),
    "config.data": Rule(False, True, "the tokens are the same"),  # or "data" refuses
    "config.run": Rule(False, True, "a name or a place"),
    "config.logging": Rule(False, True, "what is shown"),
    "config.checkpoint": Rule(False, True, "what is kept"),
    "code": Rule(False, False, f"another version of jaxdistill; {_ROUNDING}"),
    "versions": Rule(False, False, _ROUNDING),
    "device": Rule(False, False, _ROUNDING),
    "mesh": Rule(False, False, _ROUNDING),
    "processes": Rule(False, False, _ROUNDING),
    "flags": Rule(False, False, _ROUNDING),
}


def check(
    run: RunDir,
    facts: Mapping[str, str],
    accepted: Callable[[Collection[str]], Any] = lambda changed: None,
) -> dict[str, str | None]:
    """Compares the facts with those that the run last had, refuses or tells, and keeps the new.

    Args:
      run: a new run has no facts yet.
      facts: name -> value; the beginning of every name is a key of RULES.
      accepted: called with the names of what has changed, when nothing of it is refused, before
        anything is told or kept.

    Returns:
      what has changed -> the value it had.

    Raises:
      ConfigError: naming everything whose change is refused.
      DamagedError: if the run has facts, and they cannot be read.
    """
    stored = kept(run)
    before = dict(facts) if stored is None else stored
    names = sorted(before.keys() | facts.keys())
    changed = {n: rule_of(n) for n in names if before.get(n) != facts.get(n)}
    refused = [name for name, rule in changed.items() if rule.refused]
    if refused:
        raise ConfigError(
            f"{run.path}: changed since this run began: {', '.join(refused)}: {_OTHER_RUN}"
        )
    accepted(changed)
    for name, rule in changed.items():
        old, new = before.get(name), facts.get(name)
        run.event("changed", what=name, before=old, after=new, bitwise=rule.bitwise)
        bits = "the same bits" if rule.bitwise else "not the same bits"
        what = f"{name} has changed ({_short(old)} -> {_short(new)})"
        print(f"{what}: {bits}: {rule.meaning}", file=sys.stderr)
    if stored is None or changed:
        run.write_json(FILE, {"crc32": _crc(facts), "facts": dict(facts)})
    if not run.record.get("sealed"):
        run.update(sealed=True)
    return {name: before.get(name) for name in changed}


def rule_of(name: str) -> Rule:
    """The rule of a fact: that of the longest beginning of its name.

    Each of several teachers has the rules of the one.
    """
    parts = name.split(".")
    if parts[:2] == ["config", "teachers"]:
        parts = ["config", "teacher", *parts[3:]]
    for count in range(len(parts), 0, -1):
        if rule := RULES.get(".".join(parts[:count])):
            return rule
    raise KeyError(name)


def kept(run: RunDir) -> dict[str, str] | None:
    """The facts that a run last had; None before it has had any.

    Raises:
      DamagedError: if there were some, and they are gone or not as they were written.
    """
    remedy = (
        "without it nobody can tell whether data, teacher and tokenizer are those that the run "
        f"began with: restore it, or begin anew with `jaxdistill resume {run.path} --from-start`"
    )
    place = run.path / FILE
    try:
        content = run.read_json(FILE, {"crc32": int, "facts": dict})
    except DamagedError as error:
        raise DamagedError(f"{error}; {remedy}") from error
    if content is None:
        if run.record.get("sealed") or run.record.get("saved"):
            raise DamagedError(f"{place}: is missing; {remedy}")
        return None
    facts = content["facts"]
    texts = all(isinstance(value, str) for value in facts.values())
    if not texts or content["crc32"] != _crc(facts):
        raise DamagedError(f"{place}: is damaged: it has another checksum; {remedy}")
    return facts


def _crc(facts: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps(dict(facts), sort_keys=True).encode())


def _short(value: str | None) -> str:
    """A value for people: of a digest the beginning."""
    return value[:8] if value and len(value) == 64 else str(value)


def facts_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Every setting as a fact; a section that is absent is none, as before there was such a one."""
    given = {name: section for name, section in settings.items() if section is not None}
    return {f"config.{name}": json.dumps(value) for name, value in syntax.dotted(given)}


def world(mesh: jax.sharding.Mesh, versions: Mapping[str, str]) -> dict[str, str]:
    """Everything around a run that its last bits depend on.

    Args:
      mesh: the run's.
      versions: package -> version.
    """
    devices = list(mesh.devices.flat)
    facts = {f"versions.{name}": version for name, version in versions.items()}
    return facts | {
        "code": code(),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "processes": str(jax.process_count()),
        "flags": os.environ.get("XLA_FLAGS", ""),
    }


def weights(params: Any) -> str:
    """A fingerprint of a model's numbers, the same on any mesh; made where they lie.

    Each array is summed as integers modulo 2^32, its elements' bits times 2 * place + 1: integers
    add up alike in any order, and no change of a single bit can vanish.
    """

    @jax.jit
    def sums(leaves):
        return jnp.stack([_sum(leaf) for leaf in leaves])

    named = flatten(params)
    # What waits on the host comes to the device one array after the other.
    away = {name: leaf for name, leaf in named.items() if leaf.sharding.memory_kind == HOST}
    here = {name: leaf for name, leaf in named.items() if name not in away}
    made = dict(zip(here, np.asarray(sums(list(here.values()))).tolist(), strict=True))
    for name, leaf in away.items():
        place = leaf.sharding.with_memory_kind("device")
        made[name] = int(sums([jax.device_put(leaf, place)])[0])
    numbers = [made[name] for name in named]
    told = [(name, str(leaf.dtype), leaf.shape) for name, leaf in named.items()]
    return hashlib.sha256(repr((told, numbers)).encode()).hexdigest()


def _sum(leaf: jax.Array) -> jax.Array:
    size = leaf.dtype.itemsize
    assert size <= 4, "no model of ours has wider numbers"
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * size}"))
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = math.prod(leaf.shape[axis + 1 :]) % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place = place + index * np.uint32(stride)
    return jnp.sum(leaf.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def code() -> str:
    """A fingerprint of this package's own source."""
    root = pathlib.Path(jaxdistill.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
