"""Rationales of a teacher: which are kept, and the training records they become.

samples (N per question) -> parse, filter, budget -> JSON Lines for the data room
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdistill.data.rules import text_problem
from jaxdistill.errors import ConfigError
from jaxdistill.reasoning import extract
from jaxdistill.reasoning.auto_cot import tfidf
from jaxdistill.reasoning.prompts import FEW_SHOT_TRIGGER, plain

BUDGETS = ("random", "diversity", "likelihood", "open_endedness")
FORMS = ("scotd", "label", "step_by_step", "sequence_kd", "think")
QUINTILES = (1, 3, 5, 7, 9)  # samples per question by rank of its unique bigrams
PREDICT, EXPLAIN = "predict: ", "explain: "


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer of the teacher.

    Attributes:
      id: of the question.
      sample: which of its samples, from 0.
      question, gold: what was asked; "" where no answer is known.
      completion: what the teacher wrote.
      rationale: what stands before the answer.
      answer: as it was written, or None.
      correct: by the task's verifier; None where there is no gold answer.
      logprob: sum over the tokens; None where the teacher does not report them.
      tokens: how many.
      reason: why it ended, "stop" or "length".
    """

    id: str
    sample: int
    question: str
    gold: str
    completion: str
    rationale: str
    answer: str | None
    correct: bool | None
    logprob: float | None
    tokens: int
    reason: str

    @property
    def mean_logprob(self) -> float:
        """Per token; -inf where it is not known."""
        known = self.logprob is not None and self.tokens > 0
        return float(self.logprob) / self.tokens if known else -np.inf  # pyrefly: ignore

    def json(self) -> dict[str, Any]:
        """As it is stored."""
        return dataclasses.asdict(self)


def split(completion: str, kind: str, choices: str = "ABCDE") -> extract.Parsed:
    """Rationale and answer of a completion: the text before the last trigger, and the answer."""
    text = completion.split("\nQ:")[0]
    thought, closed, behind = text.rpartition("</think>")
    answer = extract.answer(text, kind, choices=choices)
    if closed:
        return extract.Parsed(thought.replace("<think>", "").strip(), answer)
    place = max(behind.rfind(FEW_SHOT_TRIGGER), behind.rfind("the answer is"))
    if place < 0:
        return extract.Parsed(behind.strip(), answer)
    before = behind[:place].rstrip()
    return extract.Parsed(before.removesuffix("So").removesuffix("Therefore,").strip(), answer)


def keep(
    samples: Sequence[Sample],
    *,
    correct_only: bool = True,
    dedupe: bool = True,
    complete_only: bool = True,
    parsable_only: bool = True,
    budget: int | None = None,
    by: str = "random",
    seed: int = 0,
) -> tuple[list[Sample], dict[str, int]]:
    """(kept samples in order, how many were dropped for each reason).

    Args:
      samples: of any questions.
      correct_only: drop wrong answers, and those without gold answer; SCoTD's supervised setting.
      dedupe: drop a rationale and answer that this question already has, spaces and case apart.
      complete_only: drop what was cut at the limit of tokens before it gave an answer.
      parsable_only: drop what has no answer or no rationale.
      budget: at most so many per question; None: all. Without effect for open_endedness.
      by: how a budget chooses. `random`; `diversity`: one from each of `budget` clusters of the
        rationales' TF-IDF vectors (Ward linkage); `likelihood`: highest log-probability per token;
        `open_endedness`: 1, 3, 5, 7 or 9 by the quintile of the question's unique bigrams.
      seed: of random choices.

    Raises:
      ConfigError: for an unknown `by`, a budget below 1, or likelihoods that are not known.

    Reference: Li et al. 2023, arXiv 2306.14050.
    """
    if by not in BUDGETS or (budget is not None and budget < 1):
        raise ConfigError(
            f"filter: budget {budget} by {by!r}: budget must be at least 1, by one of "
            f"{', '.join(BUDGETS)}"
        )
    dropped: collections.Counter[str] = collections.Counter()
    kept: list[Sample] = []
    seen: set[tuple[str, str, str | None]] = set()
    for one in samples:
        reason = _fault(one, correct_only, complete_only, parsable_only)
        spelled = (one.id, " ".join(one.rationale.lower().split()), one.answer)
        if reason is None and dedupe and spelled in seen:
            reason = "duplicate"
        if reason is None:
            seen.add(spelled)
            kept.append(one)
        else:
            dropped[reason] += 1
    if budget is not None or by == "open_endedness":
        chosen = _within_budget(kept, budget, by, seed)
        dropped["over budget"] += len(kept) - len(chosen)
        kept = chosen
    return kept, {reason: count for reason, count in dropped.items() if count}


def _fault(one: Sample, correct_only: bool, complete_only: bool, parsable_only: bool) -> str | None:
    """Why a sample cannot be used, or None."""
    if text_problem(one.completion + one.rationale):  # as a model draws it, now and then
        return "no text that can be trained on"
    if complete_only and one.reason == "length" and one.answer is None:
        return "cut at the limit of tokens"
    if one.answer is None and (parsable_only or correct_only):
        return "no answer could be parsed"
    if not one.rationale and parsable_only:
        return "no rationale"
    if correct_only and one.correct is None:
        return "no gold answer"
    return "wrong answer" if correct_only and not one.correct else None


def _within_budget(samples: list[Sample], budget: int | None, by: str, seed: int) -> list[Sample]:
    groups: dict[str, list[Sample]] = {}
    for one in samples:
        groups.setdefault(one.id, []).append(one)
    if by == "open_endedness":
        sizes = _open_ended(groups)
    else:
        assert budget is not None, "the caller has checked"
        sizes = dict.fromkeys(groups, budget)
    if by == "likelihood" and any(one.logprob is None for one in samples):
        raise ConfigError("filter: by likelihood: the teacher told no log-probabilities")
    chosen: set[tuple[str, int]] = set()
    for number, (name, group) in enumerate(groups.items()):
        rng = np.random.default_rng([seed, number])
        if by == "likelihood":
            order = sorted(group, key=lambda one: -one.mean_logprob)
        elif by == "diversity" and len(group) > sizes[name]:
            order = _one_per_cluster(group, sizes[name], rng)
        else:
            order = [group[place] for place in rng.permutation(len(group))]
        chosen |= {(one.id, one.sample) for one in order[: sizes[name]]}
    return [one for one in samples if (one.id, one.sample) in chosen]


def _one_per_cluster(group: list[Sample], count: int, rng: np.random.Generator) -> list[Sample]:
    from scipy.cluster import hierarchy

    if count == 1:
        return [group[int(rng.integers(len(group)))]]
    tree = hierarchy.linkage(tfidf([one.rationale for one in group]), method="ward")
    labels = hierarchy.fcluster(tree, count, criterion="maxclust")
    return [group[int(rng.choice(np.flatnonzero(labels == name)))] for name in np.unique(labels)]


def _open_ended(groups: Mapping[str, list[Sample]]) -> dict[str, int]:
    """Budget of each question by the quintile of its count of unique bigrams."""
    counts = {
        name: len({pair for one in group for pair in _bigrams(one.rationale)})
        for name, group in groups.items()
    }
    order = sorted(counts, key=lambda name: counts[name])
    return {name: QUINTILES[rank * 5 // len(order)] for rank, name in enumerate(order)}


def _bigrams(text: str) -> list[tuple[str, str]]:
    words = text.lower().split()
    return list(zip(words, words[1:], strict=False))


def records(samples: Sequence[Sample], form: str) -> list[dict[str, Any]]:
    """Training records of the data room's kinds.

    Args:
      samples: kept ones.
      form: `scotd`: the question, then rationale and answer; `label`: the question, then the gold
        answer, once; `step_by_step`: "predict: " and "explain: " tasks; `sequence_kd`: the
        teacher's words as they are; `think`: a chat whose answer begins with <think>...</think>.

    Raises:
      ConfigError: for an unknown form, or gold answers that are missing where they are learned.
    """
    if form not in FORMS:
        raise ConfigError(f"form {form!r}: is not one of {', '.join(FORMS)}")
    rows: list[dict[str, Any]] = []
    labelled: set[str] = set()
    for one in samples:
        if form in ("label", "step_by_step") and one.id not in labelled:
            labelled.add(one.id)
            rows.append(_label(one, form))
        if form == "step_by_step":
            rows.append({"prompt": EXPLAIN + one.question, "completion": f" {one.rationale}"})
        elif form == "sequence_kd":
            rows.append({"prompt": plain(one.question), "completion": one.completion})
        elif form == "scotd":
            worked = f" {one.rationale} {FEW_SHOT_TRIGGER} {one.answer}."
            rows.append({"prompt": plain(one.question), "completion": worked})
        elif form == "think":
            text = f"<think>\n{one.rationale}\n</think>\n\n{FEW_SHOT_TRIGGER} {one.answer}."
            turns = [("user", one.question), ("assistant", text)]
            rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    return rows


def _label(one: Sample, form: str) -> dict[str, str]:
    """The question with the answer it should have: the gold one, or without it the teacher's."""
    answer = one.gold or one.answer
    if not answer:
        raise ConfigError(f"form {form}: question {one.id} has neither a gold nor a parsed answer")
    prompt = PREDICT + one.question if form == "step_by_step" else plain(one.question)
    text = f" {answer}" if form == "step_by_step" else f" {FEW_SHOT_TRIGGER} {answer}."
    return {"prompt": prompt, "completion": text}
