"""Tasks: published files read as they are, generated ones right, damage named."""

import json
import re
import sys

import pytest

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.reasoning import tasks
from jaxdistill.reasoning.extract import canonical


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("svamp", 200, "expression"),
        ("svamp_train", 800, "expression"),
        ("gsm8k", 1319, "number"),
        ("aqua", 254, "choice"),
        ("aqua_dev", 254, "choice"),
        ("bbh_navigate", 250, "yes_no"),
        ("bbh_word_sorting", 250, "text"),
        ("bbh_date_understanding", 250, "choice"),
        ("bbh_object_counting", 250, "number"),
        ("bbh_multistep_arithmetic_two", 250, "number"),
        ("bbh_boolean_expressions", 250, "text"),
    ],
)
def test_published_tasks_are_read(reference_data, name, count, kind):
    task = tasks.load(name, folder=reference_data)
    assert (len(task.items), task.kind) == (count, kind)
    assert len({item.id for item in task.items}) == count
    verify = task.verifier()
    for item in task.items:  # the gold answer, said in words, is right; something else is not
        assert canonical(item.gold, kind) is not None
        assert verify(f"So the answer is {item.gold}.", item.gold).correct
    assert not verify("hm", task.items[0].gold).correct


def test_aqua_lists_its_options(reference_data):
    question = tasks.load("aqua", folder=reference_data, limit=1).items[0].question
    assert " Answer Choices: (A) 5(√3 + 1) (B) 6(√3 + √2) (C) " in question


def test_generated_arithmetic_is_right_and_repeatable():
    task = tasks.load("arithmetic?count=50&terms=4&digits=2&seed=3")
    assert task == tasks.load("arithmetic?count=50&terms=4&digits=2&seed=3")
    assert task.items != tasks.load("arithmetic?count=50&terms=4&digits=2").items
    for item in task.items:
        words = item.question.removeprefix("Work from left to right: ").split()
        value = int(words[0])
        for sign, term in zip(words[1::2], words[2::2], strict=True):
            value = {"+": value.__add__, "-": value.__sub__, "*": value.__mul__}[sign](int(term))
        assert item.gold == str(value) and item.rationale.endswith(f"= {value}.")


def test_own_files(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"question": "1 + 1?", "answer": 2}, {"question": "x?", "answer": "7", "id": "b"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = tasks.load(f"{path}?kind=number")
    assert [(item.id, item.gold) for item in task.items] == [("1", "2"), ("b", "7")]
    path.write_text('{"question": "x"}')
    with pytest.raises(DataError, match="mine.jsonl:1: field `answer` must be"):
        tasks.load(str(path))
    path.write_text("{")
    with pytest.raises(DataError, match="mine.jsonl:1: bad JSON"):
        tasks.load(str(path))
    path.write_text("")
    with pytest.raises(DataError, match="has no questions"):
        tasks.load(str(path))
    path.write_text(
        '{"question": "a\u2028b\x85c", "answer": 2}\n', encoding="utf-8"
    )  # one line of JSON
    assert [item.question for item in tasks.load(str(path)).items] == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [
                {"id": "a", "question": "x?", "answer": 1},
                {"id": "a", "question": "y?", "answer": 2},
            ],
            "mine.jsonl:2: id 'a': another question has it",
        ),
        (
            [{"question": "x?", "answer": "yes"}],
            "mine.jsonl:1: answer 'yes': no number, so nothing",
        ),
        (
            [{"question": "a\ud800", "answer": 1}],
            "mine.jsonl:1: bad JSON: it holds a lone surrogate",
        ),
    ],
)
def test_own_questions_that_could_not_be_told_apart_judged_or_asked(tmp_path, rows, message):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=re.escape(message)):
        tasks.load(str(path))


def test_a_right_answer_may_be_unknown_or_of_another_kind(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "x?", "answer": ""}')
    assert tasks.load(str(path)).items[0].gold == ""
    path.write_text('{"question": "x?", "answer": "yes"}')
    assert tasks.load(f"{path}?kind=yes_no").items[0].gold == "yes"
    with pytest.raises(DataError, match="answer 'yes': no choice"):
        tasks.load(f"{path}?kind=choice")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("poems", ConfigError, "task 'poems': unknown; use one of svamp"),
        ("svamp?count=3", ConfigError, "takes no options"),
        ("arithmetic?terms=1", ConfigError, "terms must be 2 to 12"),
        ("arithmetic?words=1", ConfigError, "option words='1'"),
        ("arithmetic?count=-1", ConfigError, "option count='-1'"),
        ("x.jsonl?kind=poem", ConfigError, "takes kind, one of number"),
        ("gsm8k", DataError, "put the file of openai/grade-school-math there"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, error, message):
    with pytest.raises(error, match=re.escape(message)):
        tasks.load(name, folder=tmp_path)


def test_reasoning_gym_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as where it is not installed
    with pytest.raises(ConfigError, match="pip install 'jaxdistill\\[gym\\]'"):
        tasks.load("gym:leg_counting")


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [("leg_counting", "number"), ("fraction_simplification", "text"), ("syllogism", "text")],
)
def test_generated_tasks_are_those_of_reasoning_gym(dataset, kind):
    gym = pytest.importorskip("reasoning_gym", reason="needs the extra gym")
    task = tasks.load(f"gym:{dataset}?count=12&seed=4")
    theirs = gym.create_dataset(dataset, size=12, seed=4)
    assert [(i.question, i.gold) for i in task.items] == [
        (row["question"], row["answer"]) for row in theirs
    ]
    assert task.kind == kind
    judge = task.verifier()
    for row in theirs:
        verdict = judge(f"I think.\nThe answer is {row['answer']}.", row["answer"])
        assert verdict.correct and theirs.score_answer(row["answer"], row) == 1.0
        assert not judge("The answer is 1234567.", row["answer"]).correct
    assert task.items != tasks.load(f"gym:{dataset}?count=12&seed=5").items


def test_what_cannot_be_generated_or_judged_is_told():
    pytest.importorskip("reasoning_gym", reason="needs the extra gym")
    with pytest.raises(ConfigError, match="gym:no_such.*no_such"):
        tasks.load("gym:no_such")
    with pytest.raises(ConfigError, match="several right answers"):
        tasks.load("gym:propositional_logic?count=3")
    with pytest.raises(ConfigError, match="takes whole numbers for count, seed"):
        tasks.load("gym:leg_counting?size=3")
