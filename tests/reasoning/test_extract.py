"""Answers are found as the papers' code finds them; its data have the published accuracies."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.errors import ConfigError
from jaxdistill.reasoning import extract
from jaxdistill.reasoning.extract import answer, canonical, cleanse, step_by_step


@pytest.mark.parametrize(
    ("split", "files", "right", "unparsable"),
    [("train", ("train_CoT_0", "train_CoT_1"), 588, 13), ("test", ("test_CoT_0",), 148, 2)],
)
def test_palm_rationales_have_their_published_accuracy(
    reference_data, split, files, right, unparsable
):
    """73.5 % of 800 and 74.0 % of 200, with 13 and 2 that cannot be parsed.

    The published code runs answers as Python, where "(34 + 40) and (62 - 17)" is 45: two of its 588
    hits are such sentences, which are no arithmetic here.
    """
    folder = reference_data / "dss" / "svamp"
    lines = (folder / f"svamp_{split}.json").read_text().splitlines()
    golds = [json.loads(line)["label"] for line in lines]
    texts = [t for f in files for t in json.loads((folder / "palm" / f"{f}.json").read_text())]
    parsed = [step_by_step(text, "expression") for text in texts]
    assert sum(row.answer is None for row in parsed) == unparsable
    spelled = [canonical(row.answer, "expression") for row in parsed]
    wanted = [canonical(gold, "expression") for gold in golds]
    assert None not in wanted
    hits = sum(a is not None and a == b for a, b in zip(spelled, wanted, strict=True))
    python_only = {"((29/2) and (30/2))", "(34 + 40) and (62 - 17)"} & {r.answer for r in parsed}
    assert (hits + len(python_only), len(golds)) == (right, {"train": 800, "test": 200}[split])
    sizes = [len(row.rationale) for row in parsed if row.answer is not None]
    assert sum(sizes) / len(sizes) == pytest.approx({"train": 129.0, "test": 130.6}[split], abs=0.1)


def test_the_official_solutions_hold_their_answers(reference_data):
    lines = (reference_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [canonical(answer(row["answer"], "number"), "number") for row in rows]
    assert None not in found and found[0] == "18" and len(found) == 1319


@pytest.mark.parametrize(
    ("text", "kind", "few_shot", "expected"),
    [
        (" 1,200 apples, or 7.", "number", False, "1200"),
        ("It was 5. The answer is 7. Or 8.", "number", True, "7"),
        ("First 5 then 6.", "number", True, "6"),
        ("First 5 then 6.", "number", False, "5"),
        ("-3.50 degrees", "number", False, "-3.50"),
        ("none", "number", False, None),
        ("So the answer is (C) or D", "choice", False, "C"),
        ("Nothing here", "choice", False, None),
        ("Yes, it is.", "yes_no", False, "yes"),
        ("I know nothing", "yes_no", False, None),
        ('"n y".', "letters", False, "ny"),
        ("The answer is blue.", "text", True, "blue"),
        ("", "text", False, None),
    ],
)
def test_cleansing_is_the_published_one(text, kind, few_shot, expected):
    assert cleanse(text, kind, few_shot=few_shot) == expected


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("a <think>so 4\n</think> The answer is 5.", "number", "5"),
        ("<think>it must be 4", "number", None),
        (r"\boxed{7} no, \boxed{{8}}", "number", "8"),
        ("2 * 3 = 6\n#### 1,6", "number", "16"),
        ("the answer is 4.\n\nQ: what is 9?\nA: 9", "number", "4"),
        ("It is (A), no: so the answer is (B).", "choice", "B"),
        ("A or B? B", "choice", "B"),
        ("I'd say it's hard", "choice", None),
        ("The answer is (2 * 3).", "expression", "(2 * 3)"),
        ("So the answer is barn damp.\nmore", "text", "barn damp"),
    ],
)
def test_free_form_solutions_have_a_final_answer(text, kind, expected):
    assert answer(text, kind) == expected


def test_step_by_step_parses_choices_and_refuses_doubles():
    text = "A bee flies. So the answer is (b) hive.\n\nQ: next"
    assert step_by_step(text, "choice") == ("A bee flies.", "(b)")
    assert step_by_step("The answer is (1). The answer is (2).", "expression").answer is None
    assert step_by_step("no answer", "expression") == ("no answer", None)
    assert step_by_step("So 4. The answer is 4.", "number") == ("So 4.", "4")


def test_equal_answers_have_one_spelling():
    assert canonical("$1,200.00", "number") == canonical("1200", "number") == "1200"
    assert canonical("9" * 10**6, "number") is None and canonical(None, "text") is None
    assert canonical("( b )", "choice") == "B" and canonical(" A  b. ", "text") == "a b"
    with pytest.raises(ConfigError, match="answer kind 'poem': is not one of number"):
        cleanse("x", "poem")


HOSTILE = st.one_of(
    st.text(max_size=400),
    st.text(alphabet="()\\boxed{}<think>/QA:#The answer is 0123456789,.-\n", max_size=400),
    st.sampled_from(
        ["9" * 200_000, "(" * 100_000, "\\boxed{" * 20_000, "<think>" * 30_000, "Q:" * 9]
    ),
)


@given(HOSTILE, st.sampled_from(extract.KINDS))
def test_any_text_is_survived(text, kind):
    found = answer(text, kind)
    assert found is None or isinstance(found, str)
    spelled = canonical(found, kind)
    assert spelled is None or len(spelled) <= extract.LONGEST
    assert step_by_step(text, kind).answer is None or found is not None or text
    if kind != "expression":
        cleanse(text, kind, few_shot=True)
