"""eval --tasks: greedy and voted accuracy of a model whose answers are known."""

import json
import re

import pytest

from jaxdistill import cli
from jaxdistill.commands import Tasks
from jaxdistill.errors import DataError, StorageError
from jaxdistill.evaluate import accuracy
from jaxdistill.reasoning import asking
from jaxdistill.reasoning.asking import SampledAnswer
from tests.reasoning import teachers

talker = teachers.talker


class Scripted:
    """Answers questions by a table: (question number, sample or "greedy") -> words."""

    def __init__(self, words):
        self.words, self.asked = words, []

    def __call__(self, model, **options):
        self.options = options
        return self

    def spent(self):
        return {}

    def ask(self, jobs):
        while jobs:
            job = jobs.popleft()
            for sample in range(job.first, job.first + job.count):
                self.asked.append(job.prompt)
                drawn = job.settings.temperature > 0
                words = self.words(job, sample if drawn else "greedy")
                failed = words is None
                yield SampledAnswer(job, sample, words or "", 3, -1.0, "stop", failed=failed)


def _questions(tmp_path, count=4):
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_accuracies_are_those_of_the_answers(tmp_path, talker, monkeypatch):
    def words(job, sample):
        gold = int(job.id)  # ids count from 1, as do the answers
        if sample == "greedy":
            return [" so it is 1", "The answer is 2.", "hm", None][gold - 1]
        if gold == 1:  # 1 1 1 9 9: the majority of 5 is right, of the first 3 too
            return f"The answer is {1 if sample < 3 else 9}."
        if gold == 2:  # 9 2 2 9 9: wrong by majority of 5
            return f"The answer is {2 if sample in (1, 2) else 9}."
        return "hm"

    script = Scripted(words)
    monkeypatch.setattr(asking, "Local", script)
    name = _questions(tmp_path)
    found = accuracy.evaluate(talker, [name], Tasks(self_consistency=5), output=tmp_path / "out")[
        name
    ]
    assert found["greedy"]["value"] == 0.5 and found["unparsable"]["value"] == 0.5
    assert found["greedy"]["low"] < 0.5 < found["greedy"]["high"]
    assert found["unparsable_drawn"] == 0.5
    assert found["maj_at"][5]["value"] == 0.25 and found["maj_at"][3]["value"] == 0.5
    assert found["maj_at"][1]["value"] == pytest.approx(0.25)
    assert found["pass_at"][5]["value"] == 0.5
    # One of four, by Wilson's formula; a bootstrap of few votes that agree would be sure of itself.
    interval = found["maj_at"][5]
    assert [interval["low"], interval["high"]] == pytest.approx([0.0456, 0.6994], abs=1e-4)
    assert found["pass_at"][1]["value"] == pytest.approx(0.25)
    text = next((tmp_path / "out").glob("answers_*")).read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["correct"] for row in rows] == [True, True, False, False]
    assert rows[0]["votes"] == ["1", "1", "1", "9", "9"] and len(rows[0]["texts"]) == 5


def test_zero_shot_asks_a_second_time(tmp_path, talker, monkeypatch):
    script = Scripted(lambda job, sample: " 1" if "Therefore" in job.prompt else " It is 5.")
    monkeypatch.setattr(asking, "Local", script)
    name = _questions(tmp_path, 1)
    found = accuracy.evaluate(talker, [name], Tasks(style="zero_shot"))[name]
    assert found["greedy"]["value"] == 1.0 and "maj_at" not in found
    assert script.asked == [
        "Q: 0 + 1?\nA: Let's think step by step.",
        "Q: 0 + 1?\nA: Let's think step by step. It is 5. \n"
        "Therefore, the answer (arabic numerals) is",
    ]


def test_a_real_model_through_the_command(tmp_path, talker, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "load_any", lambda source, **_: teachers.fresh(talker))
    command = ["eval", "absent", "--tasks", "arithmetic?count=3", "--self-consistency", "4",
               "--max-new-tokens", "6", "--json"]  # fmt: skip
    assert cli.main(command) == 0
    first = json.loads(capsys.readouterr().out)["arithmetic?count=3"]
    assert first["questions"] == 3 and set(first["maj_at"]) == {"1", "2", "3", "4"}
    assert cli.main([*command, "--batch-size", "2"]) == 0  # other slots, the same answers
    second = json.loads(capsys.readouterr().out)["arithmetic?count=3"]
    drop = lambda row: {key: value for key, value in row.items() if key != "seconds"}
    assert drop(first) == drop(second)
    assert cli.main(command[:-1]) == 0 and "maj@4" in capsys.readouterr().out


def test_a_prompt_longer_than_the_context_is_unparsable_and_told(tmp_path, talker):
    path = tmp_path / "long.jsonl"
    rows = [{"question": "x" * 600, "answer": "1"}, {"question": "y", "answer": "1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = accuracy.evaluate(talker, [str(path)], Tasks(max_new_tokens=2))[str(path)]
    assert found["questions"] == 2 and found["unparsable"]["value"] >= 0.5
    assert found["not_asked"]["questions"] == 1
    assert re.search(r"\b6\d\d\b.*context", found["not_asked"]["reason"])
    both = accuracy.evaluate(talker, [str(path)], Tasks(max_new_tokens=2, self_consistency=2))[
        str(path)
    ]
    assert both["not_asked"] == found["not_asked"]  # questions, not samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "poem"}, "Input should be 'plain'"),
        ({"style": "few_shot"}, "a file belongs to few_shot"),
        ({"exemplars": "x"}, "a file belongs to few_shot"),
        ({"self_consistency": 3, "temperature": 0.0}, "3 answers at temperature 0"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Tasks(**options)


def test_what_would_be_lost_is_told_before_anybody_is_asked(tmp_path, talker, monkeypatch):
    monkeypatch.setattr(asking, "Local", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file: cannot be written"):
        accuracy.evaluate(talker, [_questions(tmp_path)], output=tmp_path / "file")
    (tmp_path / "open.jsonl").write_text('{"question": "x?", "answer": ""}')
    with pytest.raises(DataError, match="question '1' has no right answer"):
        accuracy.evaluate(talker, [str(tmp_path / "open.jsonl")])


def test_eval_wants_data_or_tasks(capsys):
    assert cli.main(["eval", "absent"]) == 2
    assert "give --data, for perplexity, or --tasks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data x -o y", "--output: has no effect with --data"),
        ("--data x --self-consistency 3", "--self-consistency: has no effect with --data"),
        ("--tasks x --teacher y", "--teacher: has no effect with --tasks"),
        ("--tasks x --seq-len 8", "--seq-len: has no effect with --tasks"),
    ],
)
def test_eval_ignores_no_option(capsys, words, message):
    assert cli.main(["eval", "absent", *words.split()]) == 2
    assert message in capsys.readouterr().err
