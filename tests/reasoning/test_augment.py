"""New records out of given ones: asked once, filtered, and written whole or not at all."""

import json

import pytest

from jaxdistill.config import generation
from jaxdistill.data.records import Record
from jaxdistill.data.sources import open_source
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.reasoning import asking, duplicates
from jaxdistill.reasoning.asking import SampledAnswer
from jaxdistill.reasoning.duplicates import Sieve
from jaxdistill.run import teacher_generate

WORDS = "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima".split()


class Teacher:
    """Answers in words of its own, as `say` makes them of a job; notes what it was asked."""

    def __init__(self, say=None, die_after=None):
        self.jobs, self.left = [], die_after
        self.say = say or (lambda job: f"{WORDS[len(self.jobs) % 12]} {len(self.jobs)} of {job.id}")

    def ask(self, jobs):
        while jobs:
            job = jobs.popleft()
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.jobs.append(job)
            text = self.say(job)
            yield SampledAnswer(
                job, job.first, text or "", 5, -1.0, "stop" if text else "no", not text
            )

    def spent(self):
        return {"requests": float(len(self.jobs)), "cost": 0.5 * len(self.jobs)}


@pytest.fixture
def teacher(monkeypatch):
    monkeypatch.setattr(teacher_generate._LazyTeacher, "model", lambda self: None)

    def use(**options):
        made = Teacher(**options)
        monkeypatch.setattr(asking, "open_local", lambda *_, **__: made)
        return made

    return use


SEEDS = {
    "completion": [{"prompt": f"What is {w}?\n", "completion": f" It is {w}."} for w in WORDS[:3]],
    "messages": [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f"q {w}"},
                      {"role": "assistant", "content": f"a {w}"}]} for w in WORDS[:3]
    ],
    "text": [{"text": f"once there was {w} and it was good"} for w in WORDS[:3]],
}  # fmt: skip


def config(tmp_path, kind, *overrides):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(row) + "\n" for row in SEEDS[kind]))
    path = tmp_path / "ask.yaml"
    path.write_text(
        f"teacher: {{source: absent}}\ntask: augment\noutput: {tmp_path / 'out'}\n"
        f"augment: {{seeds: {seeds}, near: null}}\nsampling: {{max_new_tokens: 40}}\n"
    )
    return generation.load(str(path), list(overrides))


def lines(tmp_path):
    text = (tmp_path / "out/train_augmented.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("kind", SEEDS)
def test_every_kind_makes_records_of_the_seeds_kind_and_says_of_which(tmp_path, teacher, kind):
    asked = teacher()
    magpie = ["augment.magpie=1", "augment.user_turn=<|user|>"] if kind != "text" else []
    found = teacher_generate.generate(config(tmp_path, kind, "augment.paraphrase=2", *magpie))
    rows = lines(tmp_path)
    kinds = {"paraphrase": 6, "continuation": 3, "question": 3, **({"magpie": 3} if magpie else {})}
    assert {name: row["records"] for name, row in found["kinds"].items()} == kinds
    assert found["records"] == len(rows) == sum(kinds.values()) and found["seeds"] == 3
    assert sum(row["share"] for row in found["kinds"].values()) == pytest.approx(1, abs=1e-3)
    assert found["spent"] == asked.spent()
    assert json.loads((tmp_path / "out/summary.json").read_text()) == found
    # The data room reads what was made; where it came from is no part of it.
    source = open_source(tmp_path / "out/train_augmented.jsonl")
    records = list(source)
    assert all(isinstance(one, Record) and one.kind == kind for one in records)
    assert source.unread == {"made"}
    assert {row["made"]["of"] for row in rows} == {f"{tmp_path}/seeds.jsonl:{n}" for n in (1, 2, 3)}
    assert {row["made"]["by"] for row in rows} == {"absent"}
    said = {job.id: asked.say for job in asked.jobs}
    first = {
        "completion": "What is alpha?\n",
        "messages": "q alpha",
        "text": "once there was alpha",
    }
    going_on = next(job for job in asked.jobs if job.id.startswith("continuation/"))
    assert going_on.prompt == first[kind] and said
    if kind == "completion":
        assert rows[0]["completion"] == " It is alpha." and rows[0]["prompt"].endswith("\n")
    if kind == "messages":
        assert [turn["role"] for turn in rows[0]["messages"]] == ["system", "user", "assistant"]
        assert rows[0]["messages"][2]["content"] == "a alpha"
        [raw] = {job.prompt for job in asked.jobs if job.raw}
        assert raw == "<|user|>"


def test_a_new_question_is_asked_in_the_manner_of_others_and_then_answered(tmp_path, teacher):
    asked = teacher(
        say=lambda job: f"Question: new {job.id}" if "New question" in job.prompt else "y"
    )
    options = ["augment.paraphrase=0", "augment.continuation=0", "augment.shown=2"]
    teacher_generate.generate(config(tmp_path, "completion", *options))
    ask, answer = asked.jobs[0], asked.jobs[3]
    assert ask.prompt.count("Question: What is") == 2 and "What is alpha?" in ask.prompt
    assert answer.id == f"{ask.id}/0/answer" and answer.prompt == f"new {ask.id}"
    assert lines(tmp_path)[0] | {"made": 0} == {
        "prompt": f"new {ask.id}\n", "completion": " y", "made": 0
    }  # fmt: skip


def test_a_killed_run_asks_nothing_twice_and_costs_add_up(tmp_path, teacher):
    first = teacher(die_after=5)
    with pytest.raises(KeyboardInterrupt):
        teacher_generate.generate(config(tmp_path, "completion"))
    assert not (tmp_path / "out/train_augmented.jsonl").exists()
    second = teacher()
    found = teacher_generate.generate(config(tmp_path, "completion"))
    names = [job.id for job in first.jobs + second.jobs]
    assert len(names) - len(set(names)) <= 1 and found["records"] == 9
    assert found["spent"]["requests"] == len(names)
    again = teacher()
    assert teacher_generate.generate(config(tmp_path, "completion"))["records"] == 9
    assert not again.jobs
    with pytest.raises(ConfigError, match="another configuration .sampling changed"):
        teacher_generate.generate(config(tmp_path, "completion", "sampling.seed=1"))


@pytest.mark.parametrize(
    ("say", "reason"),
    [
        (lambda job: " ", "empty"),
        (lambda job: "the same", "duplicate"),
        (lambda job: None, "failed"),
        (lambda job: "x" * 100, "too long"),
    ],
)
def test_where_nearly_all_is_dropped_nothing_is_written(tmp_path, teacher, say, reason):
    teacher(say=say)
    options = ["augment.max_characters=50", "augment.continuation=0", "augment.max_dropped=0.5"]
    with pytest.raises(DataError, match=f"of 6 texts are dropped .*{reason}.*max_dropped 0.5"):
        teacher_generate.generate(config(tmp_path, "completion", *options))
    assert not (tmp_path / "out/train_augmented.jsonl").exists()
    assert not (tmp_path / "out/summary.json").exists()


def test_what_is_dropped_is_counted_by_kind_and_reason(tmp_path, teacher):
    teacher(say=lambda job: "What is alpha?" if job.prompt.startswith("Write") else f"z {job.id}")
    found = teacher_generate.generate(config(tmp_path, "completion"))
    assert found["kinds"]["paraphrase"] == {
        "records": 0, "share": 0.0, "dropped": {"duplicate": 3}
    }  # fmt: skip
    assert found["kinds"]["question"]["records"] == 3


def test_near_duplicates_are_those_of_the_definition():
    pytest.importorskip("datasketch", reason="the extra `augment` is not installed")
    pieces = lambda text: {text[i : i + 5] for i in range(len(text) - 4)}
    base = "the quick brown fox jumps over the lazy dog near the river bank at noon"
    for near in (0.5, 0.7, 0.9):
        for change in ("noon", "night", "the end of a long and windy day", "noon today"):
            other = base.replace("noon", change)
            left, right = pieces(base), pieces(other)
            same = len(left & right) / len(left | right) >= near
            sieve = Sieve(near=near)
            assert sieve.add(base) is None
            found = sieve.add(other)
            assert (found is not None) is same, (near, change)
    sieve = Sieve(near=0.7)
    assert sieve.add("Hello,  World!") is None and sieve.add("hello world") == "duplicate"


def test_the_language_of_a_text():
    pytest.importorskip("py3langid", reason="the extra `augment` is not installed")
    sieve = Sieve(language="en")
    assert sieve.problem("How many apples are left in the basket after lunch?") is None
    german = "Wie viele Äpfel liegen nach dem Essen noch in dem Korb?"
    assert sieve.problem(german) == "another language"


def test_missing_libraries_are_named(monkeypatch):
    for name in ("datasketch", "py3langid", "py3langid.langid"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for options in ({"near": 0.5}, {"language": "en"}):
        with pytest.raises(ConfigError, match=r"pip install 'jaxdistill\[augment\]'"):
            Sieve(**options)
    assert duplicates.Sieve(min_characters=3).problem("ab") == "too short"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task=svamp_train", "has no effect without task: augment"),
        ("augment=null", "needed by task: augment"),
        ("sampling.samples=3", "say augment.question: N"),
        ("prompt.style=plain", "prompt: has no effect with task: augment"),
        ("augment.question=-1", "must be at least 0"),
        ("augment.min_characters=30000", "must be at most max_characters"),
        ("augment.near=1.5", "must be below 1"),
    ],
)
def test_rules_of_the_configuration(tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, "text", override)
    none = ["augment.paraphrase=0", "augment.continuation=0", "augment.question=0"]
    with pytest.raises(ConfigError, match="makes nothing"):
        config(tmp_path, "text", *none)
    server = "teacher={api: {base_url: x, model: m}}"
    with pytest.raises(ConfigError, match="needed for magpie from a server"):
        config(tmp_path, "completion", server, "augment.magpie=1")


def test_seeds_that_are_none(tmp_path, teacher):
    teacher()
    with pytest.raises(ConfigError, match="augment.magpie: makes questions"):
        teacher_generate.generate(
            config(tmp_path, "text", "augment.magpie=1", "augment.user_turn=x")
        )
    loaded = config(tmp_path, "text")
    (tmp_path / "seeds.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="augment.seeds: .* 1 no question with an answer"):
        teacher_generate.generate(loaded)
