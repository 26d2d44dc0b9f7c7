"""The asking loop: every sample once, a second question behind its first, failures with reasons."""

import collections

from jaxdistill.reasoning import asking
from jaxdistill.reasoning.asking import Job, SampledAnswer, SamplingParams

DRAWN = SamplingParams(8, temperature=1.0)


class Scripted:
    """Answers with the prompt in capitals; fails where it holds "bad"."""

    def __init__(self):
        self.asked = []

    def ask(self, jobs):
        assert isinstance(jobs, collections.deque)
        while jobs:
            job = jobs.popleft()
            for sample in range(job.first, job.first + job.count):
                self.asked.append((job.prompt, sample, job.settings.max_new_tokens))
                failed = "bad" in job.prompt
                reason = "too long" if failed else "stop"
                yield SampledAnswer(job, sample, job.prompt.upper(), 1, -1.0, reason, failed=failed)

    def spent(self):
        return {}


def test_one_stage_gives_the_answers():
    jobs = [Job("1", "a", DRAWN, 2, 2, "tag"), Job("2", "bad", DRAWN)]
    replies = list(asking.ask(Scripted(), jobs))
    assert [(r.answer.text, r.answer.sample, r.second, r.problem) for r in replies] == [
        ("A", 2, None, None), ("A", 3, None, None), ("BAD", 0, None, "too long"),
    ]  # fmt: skip
    assert replies[0].answer.job.tag == "tag"


def test_two_stages_ask_behind_each_answer():
    respondent = Scripted()
    second = lambda prompt, text: f"{prompt}{text} so" if prompt != "c" else "bad"
    jobs = [Job("1", "a", DRAWN, 0, 1), Job("2", "bad", DRAWN), Job("3", "c", DRAWN)]
    replies = list(asking.ask(respondent, jobs, second))
    # The second question comes before the next job, short and greedy, of the same sample.
    assert respondent.asked == [
        ("a", 0, 8), ("aA so", 0, 32), ("bad", 0, 8), ("c", 0, 8), ("bad", 0, 32),
    ]  # fmt: skip
    assert [(r.answer.text, r.second and r.second.text, r.problem) for r in replies] == [
        ("A", "AA SO", None), ("BAD", None, "too long"), ("C", "BAD", "too long"),
    ]  # fmt: skip
    assert replies[0].second.job.settings == SamplingParams(32, stop=("\n",))


def test_progress_is_due_once_in_a_while(monkeypatch):
    now = iter([0.0, 10.0, 16.0, 16.0, 20.0, 31.5, 31.5])
    monkeypatch.setattr(asking.time, "monotonic", lambda: next(now))
    due = asking.every(15.0)
    assert [due() for _ in range(4)] == [False, True, False, True]
