"""Prompts are the published strings; exemplar files are checked."""

import json
import re

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.reasoning import prompts
from jaxdistill.reasoning.prompts import Exemplar


def test_the_two_stages_are_the_published_strings():
    first = prompts.zero_shot_cot("How many?")
    assert first == "Q: How many?\nA: Let's think step by step."
    second = prompts.second_stage(first, " Two and two.", "number")
    assert second == (
        "Q: How many?\nA: Let's think step by step. Two and two. \n"
        "Therefore, the answer (arabic numerals) is"
    )
    assert prompts.answer_trigger("yes_no") == "\nTherefore, the answer (Yes or No) is"
    assert prompts.answer_trigger("choice") == "\nTherefore, among A through E, the answer is"
    assert len(set(prompts.TRIGGERS)) == 14
    assert prompts.zero_shot_cot("x", 14).endswith("Let's be realistic and think step by step.")
    for wrong in (0, 15):
        with pytest.raises(ConfigError, match=f"trigger {wrong}: must be a number from 1 to 14"):
            prompts.zero_shot_cot("x", wrong)


def test_few_shot_shows_worked_examples():
    examples = [Exemplar("One?", "It is one.", "1"), Exemplar("Two?", "It is two.", "2")]
    assert prompts.few_shot_cot("Three?", examples) == (
        "Q: One?\nA: It is one. The answer is 1.\n\n"
        "Q: Two?\nA: It is two. The answer is 2.\n\n"
        "Q: Three?\nA:"
    )
    assert prompts.few_shot_cot("x", [], symbolic=True).startswith("Write the answer as one arith")


def test_exemplar_files_of_both_forms(tmp_path, reference_data):
    row = {"question": "One?", "rationale": "It is\u2028one.", "answer": "1"}  # U+2028 ends no line
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\n", "utf-8")
    assert prompts.load_exemplars(tmp_path / "a.jsonl") == [Exemplar(*row.values())]
    shipped = prompts.load_exemplars(reference_data / "auto_cot" / "multiarith_auto")
    assert len(shipped) == 8 and shipped[0].answer == "2"
    assert shipped[0].question.startswith("Wendy uploaded") and "A:" not in shipped[0].question
    manual = prompts.load_exemplars(reference_data / "auto_cot" / "multiarith_manual")
    assert prompts.worked(manual[0]).endswith("21 - 15 = 6. The answer is 6.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "x", "answer": "1"}', "example 1: field `rationale` must be a text"),
        ('{"question": "x", "rationale": " ", "answer": "1"}', "field `rationale` must be a text"),
        ('{"question": "x", "rationale": "y", "answer": 1}', "field `answer` must be a text"),
        ("[1]", "example 1: field `question`"),
        ("nonsense", "is neither JSON Lines nor an object"),
        ("", "holds no example"),
        ('{\n"demo": []}', "is neither JSON Lines nor an object"),
    ],
)
def test_damaged_exemplars_are_named(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        prompts.load_exemplars(tmp_path / "x.jsonl")


def test_a_preamble_stands_behind_the_dashes(tmp_path, reference_data):
    path = reference_data / "bbh" / "cot-prompts" / "navigate.txt"
    preamble = prompts.load_preamble(path)
    assert preamble.startswith("Given a series of navigation instructions")
    asked = prompts.with_preamble(preamble, "Turn left?")
    assert asked.endswith("\n\nQ: Turn left?\nA: Let's think step by step.\n")
    (tmp_path / "e.txt").write_text("canary\n-----\n")
    with pytest.raises(ConfigError, match="is empty"):
        prompts.load_preamble(tmp_path / "e.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        prompts.load_preamble(tmp_path / "absent.txt")
