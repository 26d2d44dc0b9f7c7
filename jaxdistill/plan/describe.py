"""A plan as text for people."""

from collections.abc import Iterator, Mapping
from typing import Any

_FORMS = {
    "blocks": "xla, in blocks",
    "xla": "xla, all scores of a layer at once",
    "splash": "splash (Pallas)",
    "ring": "xla, in a ring of blocks",
    "ring-splash": "splash (Pallas), in a ring",
    "cudnn": "cuDNN",
}


def describe(plan: Mapping[str, Any]) -> str:
    """The plan of `api.plan` as lines of text."""
    return "\n".join(_lines(plan))


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    yield f"{plan['target']}: {plan['devices']} devices, {mesh or 'one device'}"
    counts = plan["parameters"]
    yield f"parameters: {counts['total']:,}, of which {counts['trainable']:,} are trained"
    if plan.get("attention"):
        yield "attention: " + ", ".join(
            f"{who} {_FORMS.get(form, form)}" for who, form in plan["attention"].items()
        )
    yield ""
    yield from _memory(plan)
    if plan.get("rollout"):
        yield from _writing(plan["rollout"])
    if plan.get("teacher"):
        yield from _apart(plan["teacher"], plan["memory"]["available"])
    yield ""
    yield from _work(plan)
    if plan.get("teacher_cache"):
        yield from _stored(plan["teacher_cache"])
    if plan["unknown_loops"]:
        loops = ", ".join(plan["unknown_loops"])
        yield f"counted once, because nothing tells how often they run: {loops}"
    if plan.get("tried"):
        yield ""
        yield from _faster(plan) if plan["fits"] else _changes(plan)


def _memory(plan: Mapping[str, Any]) -> Iterator[str]:
    memory = plan["memory"]
    yield "memory of each device"
    for name, size in memory["arguments"].items():
        yield f"  {name:<28}{_size(size):>12}"
    for name, size in memory.get("host", {}).items():
        yield f"  {name + ' on the host':<28}{_size(size):>12}   not counted here"
    yield f"  {'temporaries':<28}{_size(memory['temporaries']):>12}   at the fullest moment:"
    for name, size in sorted(memory["at_peak"].items(), key=lambda item: -item[1]):
        if size:
            yield f"    {name:<26}{_size(size):>12}"
    yield f"  {'loss, at its own peak':<28}{_size(memory['most'].get('loss', 0)):>12}"
    if memory["available"] is None:
        yield f"  {'total':<28}{_size(memory['total']):>12}"
        return
    apart = plan.get("teacher")
    fits = memory["total"] <= memory["available"] if apart else plan["fits"]
    verdict = "fits" if fits else "does not fit"
    yield (
        f"  {'total':<28}{_size(memory['total']):>12}   of {_size(memory['available'])}: {verdict}"
    )


def _writing(writing: Mapping[str, Any]) -> Iterator[str]:
    yield f"while the student writes {writing['slots']} answers, in place of temporaries"
    for name, key in (
        ("temporaries", "temporaries"),
        ("  of them: decoder weights", "weights"),
        ("  of them: keys and values", "cache"),
        ("total", "total"),
    ):
        yield f"  {name:<28}{_size(writing[key]):>12}"


def _apart(apart: Mapping[str, Any], available: float | None) -> Iterator[str]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in apart["mesh"].items() if size > 1)
    yield f"each of the teacher's own {apart['devices']} devices, {mesh or 'one device'}"
    yield f"  {'parameters':<28}{_size(apart['parameters']):>12}"
    room = ""
    if available is not None:
        verdict = "fits" if apart["total"] <= available else "does not fit"
        room = f"   of {_size(available)}: {verdict}"
    yield f"  {'total':<28}{_size(apart['total']):>12}{room}"
    name = "hidden states, to each of the step's"
    yield f"  {name:<28}{_size(apart['hidden_bytes']):>12}"
    if apart["floor_seconds"] is not None:
        yield f"  {'floor, beside the step':<28}{1e3 * apart['floor_seconds']:>9.1f} ms"


def _work(plan: Mapping[str, Any]) -> Iterator[str]:
    yield "one step on each device"
    seconds = plan["seconds"]
    shown = lambda name: f"   {1e3 * seconds[name]:10.1f} ms at the peak" if name in seconds else ""
    yield f"  {'products':<28}{plan['flops'] / 1e12:>8.2f} TFLOP{shown('compute')}"
    yield f"  {'memory traffic':<28}{_size(plan['bytes']):>14}{shown('memory')}"
    others = "other slices" if plan["target"].startswith("tpu") else "other hosts"
    local = plan["sent_bytes"] - plan["network_bytes"]
    yield f"  {'sent to other devices':<28}{_size(local):>14}{shown('links')}"
    if plan["network_bytes"]:
        name = f"sent to {others}"
        yield f"  {name:<28}{_size(plan['network_bytes']):>14}{shown('network')}"
    if plan.get("host_bytes"):
        yield f"  {'from the host':<28}{_size(plan['host_bytes']):>14}{shown('host')}"
    for entry in plan["collectives"]:
        name, beyond = f"{entry['kind']} over {', '.join(entry['axes'])}", entry["network_bytes"]
        crossing = f", {_size(beyond)} of it to {others}" if beyond else ""
        sent = f"{_size(entry['sent_bytes']):>12}{crossing}"
        yield f"    {name:<36}{entry['times']:>7} times {sent}"
    for name, value in plan["compiler_options"].items():
        yield f"  compiled with {name}={value}"
    if plan["floor_seconds"] is not None:
        yield (
            f"floor: {1e3 * plan['floor_seconds']:.1f} ms a step, at most "
            f"{plan['tokens_per_second']:,.0f} tokens/s, MFU {plan['mfu']:.0%} "
            f"({', '.join(_sources(plan))})"
        )


def _sources(plan: Mapping[str, Any]) -> Iterator[str]:
    yield plan["source"]
    if "network" in plan["seconds"] and plan["network_source"] != plan["source"]:
        yield plan["network_source"]


def _stored(sizes: Mapping[str, Any]) -> Iterator[str]:
    yield f"the teacher asked once, about at most {sizes['tokens']:,} tokens (teacher cache)"
    for name, size in sizes["bytes_per_token"].items():
        yield f"  {name:<28}{size:>8,} B a token   {_size(size * sizes['tokens']):>12}"


def _changes(plan: Mapping[str, Any]) -> Iterator[str]:
    changes = plan.get("changes", [])
    tried = plan["tried"]
    if not changes:
        yield f"none of {tried} changes that were tried makes it fit"
        return
    yield f"what makes it fit, the fastest first ({tried} changes were compiled):"
    yield from map(_outcome, changes)


def _faster(plan: Mapping[str, Any]) -> Iterator[str]:
    if not plan["faster"]:
        yield f"no faster settings were found ({plan['tried']} changes were compiled)"
        return
    yield f"faster settings, the best first ({plan['tried']} changes were compiled):"
    yield from map(_outcome, plan["faster"])


def _outcome(change: Mapping[str, Any]) -> str:
    floor = change["floor_seconds"]
    speed = "" if floor is None else f", {1e3 * floor:.1f} ms a step"
    return f"  {' '.join(change['overrides'])}: {_size(change['total'])}{speed}"


def _size(count: int | float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
