"""teacher generate, end to end: local and over HTTP, resumed after a kill, filtered and counted."""

import json
import re

import pytest

from jaxdistill.config import generation
from jaxdistill.errors import ConfigError, DataError, ModelError
from jaxdistill.reasoning import asking
from jaxdistill.reasoning.asking import SampledAnswer
from jaxdistill.run import teacher_generate
from tests.reasoning import teachers

scripted, talker = teachers.scripted, teachers.talker

TASK = "arithmetic?count=6&seed=1"


class Oracle:
    """Answers every third sample wrong, and one with nothing; notes what it was asked."""

    def __init__(self, die_after=None):
        self.asked, self.left = [], die_after

    def ask(self, jobs):
        while jobs:
            job = jobs.popleft()
            for sample in range(job.first, job.first + job.count):
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left = None if self.left is None else self.left - 1
                self.asked.append((job.id, sample, job.prompt))
                yield self.answer(job, sample)

    def answer(self, job, sample):
        gold = job.tag.gold if not isinstance(job.tag, SampledAnswer) else "7"
        text = f" Because {sample}. The answer is {gold}."
        if sample % 3 == 1:
            text = f" Because {sample}. The answer is {gold}1."
        if sample % 3 == 2 and sample > 2:
            text = " Who knows"
        return SampledAnswer(job, sample, text, 5, -1.0 * sample, "stop")

    def spent(self):
        return {"requests": float(len(self.asked))}


def _config(tmp_path, *overrides):
    path = tmp_path / "ask.yaml"
    path.write_text(
        f"teacher: {{source: absent}}\ntask: '{TASK}'\nprompt: {{style: plain}}\n"
        f"output: {tmp_path / 'out'}\n"
    )
    return generation.load(str(path), list(overrides))


@pytest.fixture
def oracle(monkeypatch):
    made = []

    def use(**options):
        made.append(Oracle(**options))
        monkeypatch.setattr(teacher_generate._LazyTeacher, "open", lambda *_: made[-1])
        return made[-1]

    return use


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_judged_filtered_and_counted(tmp_path, oracle):
    oracle()
    config = _config(tmp_path, "sampling.samples=6", "forms=[scotd, label, sequence_kd]")
    found = teacher_generate.generate(config)
    assert (found["questions"], found["samples"]) == (6, 36)
    assert (found["parsed"], found["correct"]) == (30, 18)
    scotd = found["files"]["scotd"]
    assert scotd["samples"] == 18
    assert scotd["dropped"] == {"wrong answer": 12, "no answer could be parsed": 6}
    assert found["files"]["sequence_kd"]["samples"] == 36
    rows = _lines(tmp_path / "out" / "train_scotd.jsonl")
    assert len(rows) == 18 and rows[0]["prompt"].startswith("Q: Work from left to right: ")
    assert rows[0]["completion"].startswith(" Because 0. The answer is ")
    assert len(_lines(tmp_path / "out" / "train_label.jsonl")) == 6
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path, oracle):
    config = _config(tmp_path, "sampling.samples=4")
    first = oracle(die_after=10)
    with pytest.raises(KeyboardInterrupt):
        teacher_generate.generate(config)
    second = oracle()
    found = teacher_generate.generate(config)
    asked = [(name, sample) for name, sample, _ in first.asked + second.asked]
    # The sample under way when the kill came was not kept, and is asked again; no other is.
    assert len(set(asked)) == 24 and len(asked) <= 25
    assert found["samples"] == 24
    keys = [(row["id"], row["sample"]) for row in _lines(tmp_path / "out" / "samples.jsonl")]
    assert len(keys) == len(set(keys)) == 24
    third = oracle()
    assert teacher_generate.generate(config)["samples"] == 24 and not third.asked
    more = oracle()
    assert teacher_generate.generate(_config(tmp_path, "sampling.samples=5"))["samples"] == 30
    assert sorted(sample for _, sample, _ in more.asked) == [4] * 6
    with pytest.raises(ConfigError, match=r"\(sampling changed\): give another `output`"):
        teacher_generate.generate(_config(tmp_path, "sampling.temperature=0.5"))


def test_answers_to_what_a_file_held_before_are_refused(tmp_path, oracle):
    oracle()
    own, examples = tmp_path / "own.jsonl", tmp_path / "examples.jsonl"
    own.write_text('{"question": "1 + 1?", "answer": 2}')
    examples.write_text('{"question": "0 + 1?", "rationale": "Add.", "answer": "1"}')
    options = [f"task={own}", "prompt.style=few_shot", f"prompt.exemplars={examples}"]
    config = _config(tmp_path, *options, "sampling.samples=2")
    teacher_generate.generate(config)
    teacher_generate.generate(config)
    own.write_text('{"question": "1 + 2?", "answer": 3}')
    with pytest.raises(ConfigError, match=r"another question '1': .*own.jsonl has changed"):
        teacher_generate.generate(config)
    own.write_text('{"question": "1 + 1?", "answer": 2}')
    examples.write_text('{"question": "0 + 1?", "rationale": "Count.", "answer": "1"}')
    with pytest.raises(ConfigError, match=r"another configuration \(prompt changed\)"):
        teacher_generate.generate(config)


def test_zero_shot_asks_twice(tmp_path, oracle):
    asked = oracle()
    found = teacher_generate.generate(
        _config(tmp_path, "prompt.style=zero_shot", "prompt.trigger=3", "sampling.samples=1",
                "limit=1", "filter.correct_only=false")
    )  # fmt: skip
    (_, _, first), (_, _, second) = asked.asked
    assert first.endswith("\nA: First,")
    assert second.startswith(first + " Because 0. The answer is ")
    assert second.endswith(" \nTherefore, the answer (arabic numerals) is")
    (row,) = _lines(tmp_path / "out" / "samples.jsonl")
    assert row["answer"] == "0" and found["samples"] == 1  # the first number of " Because 0."


def test_a_teacher_without_a_usable_answer_is_told(tmp_path, oracle):
    oracle().answer = lambda job, sample: SampledAnswer(job, sample, " hm", 1, -1.0, "stop")
    message = "none of 12 samples can be used for scotd (12 no answer could be parsed)"
    with pytest.raises(DataError, match=re.escape(message)):
        teacher_generate.generate(_config(tmp_path, "sampling.samples=2"))


def test_of_many_reasons_the_most_frequent_are_told(tmp_path, oracle):
    numbers = iter(range(100))
    oracle().answer = lambda job, sample: SampledAnswer(
        job, sample, "", 0, None, f"too long by {next(numbers) // 2}", failed=True
    )
    told = ", ".join(f"2 too long by {n}" for n in range(5))
    with pytest.raises(DataError, match=re.escape(f"({told}, 2 for other reasons)")):
        teacher_generate.generate(_config(tmp_path, "sampling.samples=2"))


def test_auto_cot_makes_its_own_examples_once(tmp_path, oracle):
    asked = oracle()
    asked.answer = lambda job, sample: SampledAnswer(
        job,
        sample,
        " 7" if isinstance(job.tag, SampledAnswer) else " First. So it is 7.",
        5,
        -1.0,
        "stop",
    )
    options = ["prompt.style=auto_cot", "prompt.clusters=2", "sampling.samples=1",
               "filter.correct_only=false"]  # fmt: skip
    teacher_generate.generate(_config(tmp_path, *options))
    shown = _lines(tmp_path / "out" / "auto_cot.jsonl")
    assert len(shown) == 2
    assert shown[0]["rationale"] == "Let's think step by step. First. So it is 7."
    assert asked.asked[-1][2].count("The answer is 7.\n\n") == 2
    unasked = oracle()
    with pytest.raises(
        ConfigError, match="clusters = 7: must be from 1 to the number of questions, 6"
    ):
        teacher_generate.generate(
            _config(tmp_path, *options, "prompt.clusters=7", f"output={tmp_path / 'o'}")
        )
    assert not unasked.asked


def test_auto_cot_tells_what_kept_the_teacher_from_answering(tmp_path, oracle):
    oracle().answer = lambda job, sample: SampledAnswer(
        job, sample, "", 0, None, "too long", failed=True
    )
    message = "the teacher answered 0 of 6 questions, too few for prompt.clusters = 2: 6 too long"
    with pytest.raises(DataError, match=re.escape(message)):
        teacher_generate.generate(_config(tmp_path, "prompt.style=auto_cot", "prompt.clusters=2"))


def test_auto_cot_has_room_for_both_its_questions(tmp_path, talker, monkeypatch):
    opened, lengths = [], []
    answer = lambda job, sample: SampledAnswer(
        job,
        sample,
        " 7" if isinstance(job.tag, SampledAnswer) else " So it is 7.".rjust(128, "x"),
        128,
        -1.0,
        "stop",
    )

    def local(model, *, length, **_):
        opened.append(Oracle())
        opened[-1].answer = answer
        lengths.append(length)
        return opened[-1]

    monkeypatch.setattr(teacher_generate, "load_any", lambda source, **_: teachers.fresh(talker))
    monkeypatch.setattr(asking, "Local", local)
    found = teacher_generate.generate(
        _config(tmp_path, "prompt.style=auto_cot", "prompt.clusters=1", "sampling.samples=1",
                "sampling.max_new_tokens=8", "filter.correct_only=false")
    )  # fmt: skip
    first, second = opened
    made = [prompt for name, _, prompt in first.asked if name.startswith("auto/")]
    # One token per byte, and the published limit of the second answer.
    assert len(made) == 12 and max(map(len, made)) + 32 <= lengths[0] < 512
    # What the examples cost counts too: both questions of each, and then one of each task.
    assert found["spent"] == {"requests": 18.0} and len(second.asked) == 6


def test_a_local_model_is_asked_through_the_engine(tmp_path, talker, monkeypatch):
    monkeypatch.setattr(teacher_generate, "load_any", lambda source, **_: teachers.fresh(talker))
    options = ["sampling.samples=3", "sampling.max_new_tokens=12", "limit=2", "forms=[sequence_kd]",
               "teacher.dtype=float32"]  # fmt: skip
    cut = "none of 6 samples can be used for sequence_kd (6 cut at the limit of tokens)"
    with pytest.raises(DataError, match=re.escape(cut)):
        teacher_generate.generate(_config(tmp_path, *options))
    rows = {(r["id"], r["sample"]): r for r in _lines(tmp_path / "out" / "samples.jsonl")}
    assert all(row["logprob"] < 0 and row["tokens"] <= 12 for row in rows.values())
    # What a question gets does not depend on who else asks, or on how often it was stopped.
    path = tmp_path / "out" / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for key, row in rows.items() if key[1] != 1))
    with pytest.raises(DataError, match=re.escape(cut)):
        teacher_generate.generate(_config(tmp_path, *options))
    again = {(r["id"], r["sample"]): r for r in _lines(path)}
    for key, row in rows.items():
        assert again[key]["completion"] == row["completion"]


@pytest.mark.parametrize("chat", [True, False])
def test_a_plain_question_is_a_turn_of_a_chat_as_it_stands(chat, tmp_path, oracle):
    made = oracle()
    more = (f"teacher.chat={str(chat).lower()}", "sampling.samples=1", "forms=[think]")
    teacher_generate.generate(_config(tmp_path, *more))
    turns = [row["messages"][0]["content"] for row in _lines(tmp_path / "out/train_think.jsonl")]
    assert turns[0].startswith("Work from left to right: ")
    expected = turns if chat else [f"Q: {turn}\nA:" for turn in turns]
    assert [prompt for _, _, prompt in made.asked] == expected


def test_over_http_a_dead_server_leaves_a_run_to_go_on_with(tmp_path, scripted):
    pytest.importorskip("openai", reason="needs the extra api")
    path = tmp_path / "ask.yaml"
    path.write_text(
        f"teacher: {{api: {{base_url: '{scripted.url}', model: m, concurrency: 1, retries: 0, "
        f"max_failures: 1}}}}\ntask: '{TASK}'\nprompt: {{style: plain}}\n"
        f"filter: {{correct_only: false, dedupe: false}}\noutput: {tmp_path / 'out'}\n"
        "sampling: {samples: 2}\n"
    )
    scripted.faults = [None, None, 400]
    with pytest.raises(ModelError, match="what was received is kept"):
        teacher_generate.generate(generation.load(str(path)))
    assert len(_lines(tmp_path / "out" / "samples.jsonl")) == 4
    found = teacher_generate.generate(generation.load(str(path)))
    # Two answers before the server died, four after it: what was paid for adds up.
    assert found["samples"] == 12 and found["spent"]["requests"] == 6
    assert len(scripted.seen) == 7
    asked = dict(found["spent"])
    found = teacher_generate.generate(generation.load(str(path), ["forms=[label]"]))
    assert found["spent"] == asked and len(scripted.seen) == 7  # filtered again, nothing asked
    (tmp_path / "out" / "spent.json").write_text("{")
    with pytest.raises(ConfigError, match=r"spent.json: is damaged.*mend or remove it"):
        teacher_generate.generate(generation.load(str(path)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.api={base_url: x, model: m}"], "needs one of source, api"),
        (["prompt.exemplars=x"], 'prompt.exemplars = "x": belongs to style: few_shot'),
        (["prompt.style=few_shot"], "prompt.exemplars: needed by few_shot"),
        (["sampling.temperature=0"], "must be 1 at temperature 0"),
        (["sampling.temprature=1"], 'unknown key; did you mean "temperature"?'),
        (["prompt.style=poem"], "must be one of zero_shot"),
        (["prompt.trigger=3"], "has no effect without style: zero_shot"),
        (["prompt.embed=hidden"], "has no effect without style: auto_cot"),
        (["filter.by=diversity"], "has no effect without filter.budget"),
        (["filter.by=open_endedness", "filter.budget=5"], "has no effect by open_endedness"),
        (
            ["teacher={api: {base_url: x, model: m}}", "sampling.stop=[a, b, c, d, e]"],
            "must be at most 4 strings",
        ),
        (
            [
                "teacher={api: {base_url: x, model: m, logprobs: false}}",
                "filter={by: likelihood, budget: 2}",
            ],
            "likelihood needs teacher.api.logprobs: true",
        ),
        (["task=poems"], "unknown; use one of svamp"),
    ],
)
def test_wrong_files_are_named(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        teacher_generate.generate(_config(tmp_path, *overrides))
