"""Makes new records out of given ones by asking a teacher, and says where each came from.

paraphrase      the record's question in other words; the record's own answer
continuation    the record's question; the teacher's answer. Of a text: its beginning, continued
question        a new question in the manner of a few given ones; the teacher's answer
magpie          what the teacher writes in place of a user; the teacher's answer

References: Wang et al. 2023, Self-Instruct, arXiv 2212.10560; Xu et al. 2024, Magpie,
arXiv 2406.08464; Kim and Rush 2016, Sequence-Level Knowledge Distillation, arXiv 1606.07947.
"""

import collections
import dataclasses
import json
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.data.record_hash import fingerprint_of
from jaxdistill.data.records import Record
from jaxdistill.data.sources import Source
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.reasoning import asking
from jaxdistill.reasoning.asking import Job, OpenRespondent, Respondent, SamplingParams
from jaxdistill.reasoning.duplicates import Sieve
from jaxdistill.reasoning.rationales import Sample
from jaxdistill.reasoning.store import AnswerStore, write_records
from jaxdistill.safe import whole_file

KINDS = ("paraphrase", "continuation", "question", "magpie")
FILE = "train_augmented.jsonl"
_REWORD = (
    "Write the text below in other words. Keep its meaning, every name and every number, and write "
    "nothing else.\n\nText: {text}\n\nIn other words:"
)
_NEW = (
    "Here are some {name}s.\n\n{shown}\n\nWrite one new {name} of the same kind about something "
    "else, and nothing else.\n\nNew {name}:"
)


@dataclasses.dataclass(frozen=True)
class Seed:
    """A given record.

    Attributes:
      id: of what it says, whatever its file.
      place: file and line.
      kind: text, completion or messages, which is also that of what is made out of it.
      question, answer: the first ones; of a text its first half and the rest.
      system: what stands before the question, or "".
    """

    id: str
    place: str
    kind: str
    question: str
    answer: str
    system: str = ""

    @property
    def asked(self) -> str:
        """What new records must differ from: its question, or the whole text."""
        return f"{self.question}{self.answer}" if self.kind == "text" else self.question


def load_seeds(source: Source, limit: int | None) -> tuple[list[Seed], dict[str, int]]:
    """(seeds in the order of the file, why records are none of them: how many).

    Raises:
      DataError: if there is none, or they are of several kinds.
    """
    seeds: dict[str, Seed] = {}
    left: collections.Counter[str] = collections.Counter()
    for item in source:
        if not isinstance(item, Record):
            left[item.reason] += 1
            continue
        seed = _seed(item, source.name)
        if seed is None:
            left["no question with an answer"] += 1
        elif seed.id in seeds:
            left["duplicate"] += 1
        elif limit is None or len(seeds) < limit:
            seeds[seed.id] = seed
    kinds = sorted({seed.kind for seed in seeds.values()})
    if len(kinds) != 1:
        why = f"records of several kinds ({', '.join(kinds)})" if kinds else _told(left)
        raise DataError(f"augment.seeds: {source.name}: cannot be used: {why or 'no records'}")
    return list(seeds.values()), dict(left)


def _seed(record: Record, name: str) -> Seed | None:
    number, place = f"{fingerprint_of(record):016x}", f"{name}:{record.line}"
    if record.kind == "text":
        words = record.texts[0].split(" ")
        half = (len(words) + 1) // 2
        first, rest = " ".join(words[:half]), " ".join(words[half:])
        return Seed(number, place, "text", first, f" {rest}") if rest else None
    if record.kind == "completion":
        return Seed(number, place, "completion", *record.texts)
    turns = list(zip(record.roles, record.texts, strict=True))
    system = turns.pop(0)[1] if turns[0][0] == "system" else ""
    if [role for role, _ in turns[:2]] != ["user", "assistant"]:
        return None
    return Seed(number, place, "messages", turns[0][1], turns[1][1], system)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A record that is to be made.

    Attributes:
      kind: a value of KINDS.
      seed: what it is made out of.
      number: which of the seed's candidates of this kind.
      question: its question, once there is one.
      answer: its answer, once there is one.
    """

    kind: str
    seed: Seed
    number: int
    question: str | None = None
    answer: str | None = None

    @property
    def id(self) -> str:
        """Of what is asked for it first; it names the random stream too."""
        return f"{self.kind}/{self.seed.id}"


class Augmenter:
    """Asks for what a store lacks, in two rounds: for texts or questions, then for answers.

    Args:
      seeds: from `load_seeds`.
      store: keeps every answer as it comes; only those that it lacks are asked for.
      open: opens the teacher for given prompts.
      sampling: how answers are drawn.
      candidates: how many of each kind, for each seed.
      shown: questions that are shown for a new one.
      user_turn: what the template prints before a user's text, for magpie.

    Raises:
      ConfigError: for questions where the seeds are texts.
    """

    def __init__(
        self,
        seeds: Sequence[Seed],
        store: AnswerStore,
        open: OpenRespondent,
        sampling: SamplingParams,
        candidates: Mapping[str, int],
        *,
        shown: int,
        user_turn: str,
    ):
        self._seeds, self._store, self._open, self._sampling = seeds, store, open, sampling
        self._shown, self._user_turn = shown, user_turn
        self._respondent: Respondent | None = None
        self._before: dict[str, float] = {}  # spent by teachers that were opened earlier
        self.failed: collections.Counter[str] = collections.Counter()
        if candidates.get("magpie") and any(seed.kind == "text" for seed in seeds):
            raise ConfigError("augment.magpie: makes questions and answers, the seeds are texts")
        self._wanted = [
            Candidate(kind, seed, number)
            for kind in KINDS
            for seed in seeds
            for number in range(candidates.get(kind, 0))
        ]

    def make(self, sieve: Sieve) -> tuple[list[Candidate], dict[str, collections.Counter[str]]]:
        """(records in order, by kind why others are none: how many).

        A question that is dropped is not answered.
        """
        dropped = {kind: collections.Counter() for kind in KINDS}
        for seed in self._seeds:
            sieve.add(seed.asked)
        self._ask([self._first(one) for one in self._wanted])
        questions: list[Candidate] = []
        for one in self._wanted:
            sample = self._store.samples.get((one.id, one.number))
            made, reason = self._read(one, sample, sieve)
            if reason:
                dropped[one.kind][reason] += 1
            elif made is not None:
                questions.append(made)
        self._ask([self._second(one) for one in questions if one.answer is None])
        whole: list[Candidate] = []
        for one in questions:
            reason = None
            if one.answer is None:
                sample = self._store.samples.get((f"{one.id}/{one.number}/answer", 0))
                text = "" if sample is None else sample.completion
                reason = _fault(sample, "failed") or sieve.problem(text)
                one = dataclasses.replace(one, answer=text)
            if reason:
                dropped[one.kind][reason] += 1
            else:
                whole.append(one)
        return whole, dropped

    def spent(self) -> dict[str, float]:
        """Requests, tokens and cost of all that was asked here."""
        now = {} if self._respondent is None else self._respondent.spent()
        return asking.added(self._before, now)

    def _first(self, one: Candidate) -> Job:
        """What is asked for a candidate first."""
        seed, raw = one.seed, False
        if one.kind == "paraphrase":
            prompt = _REWORD.format(text=seed.asked)
        elif one.kind == "continuation":
            prompt = seed.question
        elif one.kind == "magpie":
            prompt, raw = self._user_turn, True
        else:
            # Others for every candidate, but always the same ones: a resumed run asks no other.
            others = [other for other in self._seeds if other is not seed]
            rng = random.Random(f"{self._sampling.seed}/{one.id}/{one.number}")
            some = [seed, *rng.sample(others, min(self._shown - 1, len(others)))]
            name = "text" if seed.kind == "text" else "question"
            shown = "\n\n".join(f"{name.title()}: {other.asked.strip()}" for other in some)
            prompt = _NEW.format(shown=shown, name=name)
        return Job(one.id, prompt, self._sampling, one.number, 1, raw=raw)

    def _second(self, one: Candidate) -> Job:
        return Job(f"{one.id}/{one.number}/answer", one.question or "", self._sampling, 0, 1)

    def _read(
        self, one: Candidate, sample: Sample | None, sieve: Sieve
    ) -> tuple[Candidate | None, str | None]:
        """(the candidate with its question, why there is none)."""
        reason = _fault(sample, "failed")
        if reason or sample is None:
            return None, reason
        seed, text = one.seed, sample.completion
        if one.kind == "continuation":
            # Its question is a seed's: only the answer, or the whole text, can be new.
            space = "" if seed.kind == "text" else "\n"
            reason = sieve.problem(text) or sieve.add(f"{seed.question}{space}{text}")
            return dataclasses.replace(one, question=seed.question, answer=text), reason
        label = "Text:" if seed.kind == "text" else "Question:"
        question = text.strip().removeprefix(label).strip()
        reason = sieve.problem(question) or sieve.add(question)
        # A text needs no answer, and words of the same meaning have the same one.
        answer = "" if seed.kind == "text" else seed.answer
        done = one.kind == "paraphrase" or seed.kind == "text"
        return dataclasses.replace(one, question=question, answer=answer if done else None), reason

    def _ask(self, jobs: list[Job]) -> None:
        """Asks for what the store lacks and keeps each answer at once."""
        lacking = [job for job in jobs if (job.id, job.first) not in self._store.samples]
        if not lacking:
            return
        before = self.spent()
        opened = self._open([job.prompt for job in lacking], self._sampling.max_new_tokens)
        if opened is not self._respondent:  # a server is opened once and counts on
            self._before, self._respondent = before, opened
        due = asking.every(asking.PROGRESS_SECONDS)
        for done, reply in enumerate(asking.ask(opened, lacking), start=1):
            answer = reply.answer
            if answer.failed:
                self.failed[answer.reason] += 1
            else:
                self._store.add(_sample(answer))
            if due() or done == len(lacking):
                self._store.spend(self.spent())
                print(f"{done} of {len(lacking)} texts", file=sys.stderr)


def _sample(answer: asking.SampledAnswer) -> Sample:
    return Sample(
        id=answer.job.id,
        sample=answer.sample,
        question=answer.job.prompt,
        gold="",
        completion=answer.text,
        rationale="",
        answer=None,
        correct=None,
        logprob=answer.logprob,
        tokens=answer.tokens,
        reason=answer.reason,
    )


def _fault(sample: Sample | None, missing: str) -> str | None:
    if sample is None:
        return missing
    return "cut at the limit of tokens" if sample.reason == "length" else None


def _told(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered[:5])


def record_of(one: Candidate, teacher: str) -> dict[str, Any]:
    """A training record of the seed's kind; `made` says where it came from."""
    made = {"by": teacher, "kind": one.kind, "seed": one.seed.id, "of": one.seed.place,
            "number": one.number}  # fmt: skip
    question, answer = one.question or "", one.answer or ""
    if one.seed.kind == "text":
        text = f"{question}{answer}" if one.kind == "continuation" else question
        return {"text": text, "made": made}
    if one.seed.kind == "completion":
        space = one.seed.question[len(one.seed.question.rstrip()) :]
        first = one.seed.answer[: len(one.seed.answer) - len(one.seed.answer.lstrip())]
        if one.kind not in ("paraphrase", "continuation"):
            answer = first + answer.strip()
        return {"prompt": question.rstrip() + space, "completion": answer, "made": made}
    turns = [("user", question), ("assistant", answer.strip())]
    turns = [("system", one.seed.system), *turns] if one.seed.system else turns
    return {"messages": [{"role": r, "content": c} for r, c in turns], "made": made}


def finish(
    store: AnswerStore,
    made: Sequence[Candidate],
    dropped: Mapping[str, Mapping[str, int]],
    failed: Mapping[str, int],
    spent: Mapping[str, float],
    *,
    seeds: int,
    teacher: str,
    max_dropped: float,
) -> dict[str, Any]:
    """Writes the training file and summary.json, or neither.

    Raises:
      DataError: if nothing was made, or more than max_dropped was dropped.
    """
    lost = {kind: sum(reasons.values()) for kind, reasons in dropped.items()}
    total = len(made) + sum(lost.values())
    kept = collections.Counter(one.kind for one in made)
    if not made or sum(lost.values()) > max_dropped * total:
        reasons: collections.Counter[str] = collections.Counter()
        for counts in dropped.values():
            reasons.update(counts)
        raise DataError(
            f"{store.folder}: {sum(lost.values())} of {total} texts are dropped "
            f"({_told({**reasons, **failed})}), more than augment.max_dropped {max_dropped:g} "
            "allows: look at samples.jsonl, and change augment, sampling or the teacher"
        )
    path = store.folder / FILE
    write_records(path, [record_of(one, teacher) for one in made])
    summary = {
        "path": str(path),
        "seeds": seeds,
        "records": len(made),
        "kinds": {
            kind: {
                "records": kept[kind],
                "share": round(kept[kind] / len(made), 4),
                "dropped": dict(dropped[kind]),
            }
            for kind in KINDS
            if kept[kind] or lost.get(kind)
        },
        "failed": dict(failed),
        "spent": dict(spent),
    }
    whole_file.write_text(store.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
