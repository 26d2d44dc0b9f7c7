"""The options of rewards, `reward:`: who judges the student's answers, and what becomes of it."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxdistill import methods
from jaxdistill.config.rollout import AHEAD_BYTES, PromptSource
from jaxdistill.data.context_names import SIBLING, places
from jaxdistill.drawing import FILTERS
from jaxdistill.section import NAME_PATTERN, Count, Problem, Section, Size


class Verifier(Section):
    """One verifier of a reward."""

    verifier: Annotated[str, Field(min_length=1, max_length=100, pattern=NAME_PATTERN)] = Field(
        description="exact, number, numeric, choice, yes_no, expression, regex, math, format, "
        "length, or a name of distill(config, verifiers={name: function})."
    )
    weight: float = Field(1.0, ge=-1000, le=1000, description="Of its number in the reward.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        max_length=20,
        description="Of the verifier, such as {pattern: ...} of regex and format, {rel: 0.01} of "
        "numeric, {limit: 2000, ramp: 500} characters of length.",
    )

    def problems(self) -> Iterator[Problem]:
        """Rules: options that the verifier has."""
        from jaxdistill.reasoning import scorers

        for name, value in self.options.items():
            if not isinstance(value, str | int | float | bool):
                yield ("options", name), "must be text, a number, true or false"
                return
        if told := scorers.check(self.verifier, self.options):
            yield ("options",), told


class HeldOutQuestions(Section):
    """Questions that nobody trains on, asked at each evaluation."""

    prompts: Annotated[
        tuple[PromptSource, ...], Field(min_length=1, max_length=1000, strict=False)
    ] = Field(description="Files of prompts with their answers, as data.prompts.")
    samples: Annotated[int, Field(ge=1, le=1024)] = Field(
        8, description="Answers to each, k of eval/pass_at_k and eval/maj_at_k."
    )
    limit: Annotated[int, Field(ge=1, le=10**5)] = Field(
        64, description="Questions at most; the first ones."
    )


class Reward(Section):
    """What the student's answers earn, and how it learns from that."""

    verifiers: Annotated[tuple[Verifier, ...], Field(min_length=1, max_length=20, strict=False)] = (
        Field(description="Who judges: the reward of an answer is the weighted sum.")
    )
    advantage: Literal["group", "batch", "none"] = Field(
        "group",
        description="Whose standard deviation divides the distance from the group's mean "
        "(scale_rewards): the group's, the batch's, or none.",
    )
    updates: Size = Field(
        1, description="Updates that learn from the same answers (num_iterations, mu)."
    )
    overlong: Literal["count", "mask"] = Field(
        "count",
        description="Answers cut at rollout.max_new_tokens: learned as they are, or left out "
        "(mask_truncated_completions).",
    )
    ramp: Count | None = Field(
        None,
        description="Tokens before rollout.max_new_tokens over which the reward falls by up to 1 "
        "(DAPO's soft punishment); null: it does not.",
    )
    resample: int = Field(
        0,
        ge=0,
        le=16,
        description="How often other prompts are asked in place of those whose answers all earned "
        "the same (DAPO's dynamic sampling).",
    )
    patience: Size = Field(
        50,
        description="The run stops after so many batches in a row whose groups had no spread.",
    )
    seconds: float = Field(
        5.0, gt=0, le=3600, description="A verifier that takes longer for an answer is killed."
    )
    workers: Annotated[int, Field(ge=1, le=256)] = Field(
        2, description="Processes that judge, for each kind of verifier."
    )
    held_out: HeldOutQuestions | None = Field(
        None,
        description="Questions that are asked at each evaluation: how often the first verifier "
        "gives 1 (pass@k), and how often the most frequent answer is right (maj@k).",
    )


def mixed(config: Any) -> bool:
    """Whether some prompts are for the reward alone, or for the teacher alone."""
    return any(one.learns_from != "both" for one in config.data.prompts)


def _mixture_problems(config: Any) -> Iterator[Problem]:
    """Prompts learn from what there is, and whoever is there teaches some of them."""
    asked = {("data", "prompts", n): one for n, one in enumerate(config.data.prompts)}
    held = config.reward.held_out if config.reward else None
    for number, source in enumerate(held.prompts if held else ()):
        if source.learns_from != "both":
            where = ("reward", "held_out", "prompts", number, "learns_from")
            yield where, "nobody learns from held-out questions: remove it"
        if source.teacher is not None:
            where = ("reward", "held_out", "prompts", number, "teacher")
            yield where, "no teacher is asked about held-out questions: remove it"
    alone = [where for where, one in asked.items() if one.learns_from != "both"]
    row = methods.of(config.method)
    if not alone:
        return
    if not (row.rewards and row.needs_teacher(config.method)):
        rule = "needs rewards and a teacher: method grpo with teacher_weight, or remove it"
        yield (*alone[0], "learns_from"), rule
        return
    if (oneself := config.teacher and config.teacher.self_) and SIBLING in places(
        oneself.context or ""
    ):
        rule = "a teacher that is told of right answers needs all of them judged: remove it"
        yield (*alone[0], "learns_from"), rule
    for missing, other, remedy in (
        ("reward", "teacher", "use a method of teachers, such as reverse_kd"),
        ("teacher", "reward", "use teacher_weight: 0"),
    ):
        if all(one.learns_from == other for one in asked.values()):
            rule = f"no prompt would learn from the {missing}: {remedy}, or add others"
            yield (*alone[0], "learns_from"), rule


def problems(config: Any) -> Iterator[Problem]:
    """What is wrong between `reward` and the other sections of a `Config`."""
    reward, rollout, name = config.reward, config.rollout, config.method.name
    yield from _mixture_problems(config)
    best = config.checkpoint.best_metric
    if best in ("eval/pass_at_1", "eval/reward_mean") and not (reward and reward.held_out):
        rule = "is measured on reward.held_out, and there is none: add it, or use eval/loss"
        yield ("checkpoint", "best_metric"), rule
    if not methods.of(config.method).rewards:
        if reward is not None:
            yield ("reward",), f"has no effect with method {name}: remove it, or use grpo"
        return
    if reward is None:
        yield ("reward",), f"method {name} learns from rewards: say who judges"
    if reward is None or rollout is None:
        return
    if rollout.samples < 2:
        rule = "one answer to each prompt has nothing to be compared with: use at least 2"
        yield ("rollout", "samples"), rule
    if rollout.share != 1:
        yield ("rollout", "share"), f"method {name} learns from the student's answers alone: use 1"
    if rollout.replay is not None:
        rule = (
            "rewards are for the student that wrote, and not for what it wrote long ago: remove it"
        )
        yield ("rollout", "replay"), rule
    if rollout.max_age:
        rule = "rewards are for the student that wrote: use 0, and reward.updates for more updates"
        yield ("rollout", "max_age"), rule
    if rollout.temperature != 1:
        yield ("rollout", "temperature"), "ratios are between probabilities at 1: use 1.0"
    for filter in FILTERS:
        if getattr(rollout, filter) is not None:
            rule = "ratios are between probabilities of all tokens: remove it"
            yield ("rollout", filter), rule
    if config.student.lora is not None and config.student.lora.dropout:
        rule = "would give the answers other probabilities than those they were drawn with: use 0"
        yield ("student", "lora", "dropout"), rule
    if reward.ramp is not None and reward.ramp > rollout.max_new_tokens:
        rule = f"must be at most rollout.max_new_tokens ({rollout.max_new_tokens})"
        yield ("reward", "ramp"), rule
    # log q_old of every token of a row besides, in base 64.
    kept = rollout.answers * (rollout.answer_bytes + 6 * config.data.seq_len)
    if reward.updates > 1 and kept > AHEAD_BYTES:
        rule = f"checkpoints would keep up to {kept / 1e6:.0f} MB of answers, and "
        rule += f"{AHEAD_BYTES // 10**6} MB are the limit: use 1, or fewer answers"
        yield ("reward", "updates"), rule
