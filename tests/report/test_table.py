import math

import pytest

from jaxdistill.errors import DataError
from jaxdistill.report.table import by_teacher, comparison_table, html_table, recovered


def rows(before=60.0, after=24.0, teacher=20.0, control=30.0):
    values = {"teacher": teacher, "student before": before, "SFT control": control}
    values["student after"] = after
    return [{"name": name, "perplexity": p} for name, p in values.items() if p is not None]


FULL = [
    {
        "name": "student after",
        "perplexity": 23.4,
        "kl_t1": 0.31,
        "agree_top1": 0.702,
        "parameters": 361821120,
        "parameters_non_embedding": 314635200,
        "bytes": 723674912,
        "scored_tokens_per_second": 52200,
    },
    {
        "name": "teacher",
        "perplexity": 18.2,
        "kl_t1": None,
        "agree_top1": None,
        "parameters": 1235814400,
        "parameters_non_embedding": 973146112,
        "bytes": 2471645608,
        "scored_tokens_per_second": 18200.5,
    },
]


def test_plain_is_aligned_in_the_order_of_the_comparison():
    assert comparison_table(FULL).splitlines() == [
        "               perplexity  KL to teacher  top-1 agreement  parameters  non-embedding"
        "      size  scored tokens/s",
        "teacher             18.20              -                -       1.24B           973M"
        "  2.30 GiB            18.2k",
        "student after       23.40          0.310            70.2%        362M           315M"
        "   690 MiB            52.2k",
    ]


def test_a_notebooks_table_has_the_same_cells():
    text = html_table([*FULL, {"name": "<b>x</b>", "perplexity": 9}])
    assert "<th>teacher</th><td>18.20</td><td>-</td>" in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text and "<b>" not in text


def test_a_name_brings_no_terminal_sequence():
    table = comparison_table([*FULL, {"name": "[red]\x1b[2Jx[/red]", "perplexity": 9}])
    assert "[red]x[/red]" in table and "\x1b" not in table


def test_a_column_without_values_is_left_out():
    assert "agreement" not in comparison_table(rows())
    assert "bits/byte" in comparison_table([{**FULL[0], "bits_per_byte": 1.0}])


def test_a_row_needs_a_name():
    with pytest.raises(DataError, match="must be a mapping with a name"):
        comparison_table([{"perplexity": 1.0}])


def test_the_share_of_the_gap_and_that_of_the_control():
    assert recovered(rows()) == (
        "The student recovered 90.0% of the perplexity gap to the teacher: from 60.00 to 24.00 "
        "(teacher: 20.00). Its perplexity is 20.0% below that of the SFT control (30.00), which "
        "recovered 75.0% of the gap."
    )


def test_bits_per_byte_take_the_place_of_perplexities_that_are_of_other_tokens():
    bits = {"teacher": 1.0, "student before": 3.0, "SFT control": 2.0, "student after": 1.5}
    both = [{"name": name, "perplexity": 9.0, "bits_per_byte": b} for name, b in bits.items()]
    assert recovered(both) == (
        "The student recovered 75.0% of the bits per byte gap to the teacher: from 3.000 to 1.500 "
        "(teacher: 1.000). Its bits per byte is 25.0% below that of the SFT control (2.000), which "
        "recovered 50.0% of the gap."
    )
    del both[0]["bits_per_byte"]
    assert "the perplexity gap" in recovered(rows()) and "(perplexity 9.000)" in recovered(both)


def test_a_control_that_did_better_or_the_same_is_told():
    assert "20.0% above that of the SFT control (20.00), which recovered 100.0%" in recovered(
        rows(control=20.0)
    )
    assert "equals that of the SFT control (24.00), which recovered 90.0%" in recovered(
        rows(control=24.0)
    )
    assert "SFT control (64.00), which lost 10.0% of the gap" in recovered(rows(control=64.0))


def test_a_student_that_got_worse_is_not_called_recovered():
    words = recovered(rows(after=70.0))
    assert words.startswith("The student got worse: perplexity from 60.00 to 70.00")
    assert "widens the gap to the teacher by 25.0%" in words
    assert "student recovered" not in words


def test_a_student_that_passes_the_teacher_claims_no_share():
    assert recovered(rows(after=19.0)).startswith(
        "The student's perplexity ends below the teacher's: from 60.00 to 19.00 (teacher: 20.00)."
    )


def test_no_gap_means_no_share():
    for teacher in (60.0, 61.0):
        words = recovered(rows(teacher=teacher))
        assert "no gap to close; the student went from 60.00 to 24.00" in words
        assert "of the gap" not in words


def test_a_gap_too_small_to_mean_much_is_said_to_be_so():
    words = recovered(rows(before=20.1, after=20.05, control=None))
    assert "The gap itself is only 0.5% of the perplexity" in words
    assert "only" not in recovered(rows(before=20.3, after=20.05, control=None))


def test_missing_rows_are_named():
    assert recovered([]) == (
        "Not comparable yet: no perplexity of teacher and student before and student after."
    )
    assert "There is no SFT control" in recovered(rows(control=None))
    alone = [row for row in rows() if row["name"] != "teacher"]
    assert recovered(alone) == (
        "No teacher was measured, so no gap: the student's perplexity went from 60.00 to 24.00."
    )
    assert recovered(rows(before=None)) == "Not comparable yet: no perplexity of student before."


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_numbers_give_no_share(bad):
    words = recovered(rows(before=bad))
    assert words == (
        f"No share of the gap can be given: the perplexity of student before ({bad}) is not finite."
    )
    assert recovered(rows(control=bad)).endswith(
        f"The perplexity of the SFT control ({bad}) is not finite."
    )


def test_almost_all_is_not_called_all_nor_almost_nothing_nothing():
    assert "recovered 99.9% of" in recovered(rows(after=20.001))
    assert "recovered 100.0% of" in recovered(rows(after=20.0))
    assert "recovered less than 0.1% of" in recovered(rows(after=59.999))
    assert "recovered 0.0% of" in recovered(rows(after=60.0))


def test_a_student_that_left_the_teacher_behind_is_told_by_its_distance():
    near = [{**row, "kl_t1": 0.5} for row in rows()]
    assert recovered(near).endswith("Its KL to the teacher stayed the same, from 0.500 to 0.500.")
    near[1]["kl_t1"] = 1.5
    assert recovered(near).endswith("Its KL to the teacher fell from 1.500 to 0.500.")
    near[1]["kl_t1"] = 0.25
    assert recovered(near).endswith("Its KL to the teacher rose from 0.250 to 0.500.")
    near[1]["kl_t1"] = math.nan
    assert "KL" not in recovered(near)


def test_of_several_teachers_each_has_its_own_rows():
    parts = {"math": {"perplexity": 9.0, "kl_t1": 0.5}, "code": {"perplexity": 4.0, "kl_t1": 0.2}}
    given = [row | {"by_teacher": parts} for row in FULL]
    found = by_teacher(given)
    assert list(found) == ["math", "code"]
    assert [row["name"] for row in found["math"]] == ["teacher", "student after"]
    text = comparison_table(found["code"])
    assert "4.00" in text and "9.00" not in text
    assert by_teacher(FULL) == by_teacher([FULL[0] | {"by_teacher": "damaged"}]) == {}
