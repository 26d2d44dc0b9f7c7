"""What `teacher.from` and `teacher.until` exclude: the steps in which a teacher is asked."""

from collections.abc import Iterator
from typing import Any

from jaxdistill import methods, rules
from jaxdistill.section import Problem


def problems(config: Any) -> Iterator[Problem]:
    """What is wrong between the stages of a teacher and the other sections of a `Config`."""
    teacher, steps, name = config.teacher, config.train.steps, config.method.name
    for one, section in (config.teachers or {}).items():
        for key in ("from", "until"):
            if getattr(section, key.replace("from", "from_")) is not None:
                yield ("teachers", one, key), "several teachers are asked throughout: remove it"
    if teacher is None:
        return
    given = {"from": teacher.from_, "until": teacher.until}
    given = {key: rules.moment(value, steps) for key, value in given.items() if value is not None}
    for key, step in given.items():
        place = ("teacher", key)
        if not methods.of(config.method).needs_teacher(config.method):
            yield place, f"has no effect with method {name}, which asks no teacher: remove it"
        elif config.rollout is not None:
            rule = "without its teacher the student would learn what it writes itself: remove it"
            yield place, f"{rule}, or rollout"
        elif step >= steps:
            rule = f"is step {step}, and the run has {steps} (train.steps): remove it or lower it"
            yield place, rule
        elif step < 1 and key == "until":
            yield place, "is before the first step: the teacher would never be asked: use sft"
        elif step < 1:
            yield place, "is the first step, from which the teacher is asked anyway: remove it"
    if len(given) == 2 and given["from"] >= given["until"]:
        yield (
            ("teacher", "from"),
            f"is step {given['from']}: must be before until ({given['until']})",
        )
