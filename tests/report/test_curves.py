import numpy as np
import numpy.testing

from jaxdistill.report import curves, run_files


def run(records, *, events=(), rows=(), name="run"):
    return run_files.RunFiles(
        name=name,
        info={},
        records=list(records),
        events=list(events),
        rows=list(rows),
        held_out="",
        samples=[],
        marks=[],
        samples_step=None,
        samples_page="",
        quarantined=None,
        texts={},
        fingerprints={},
        missing=[],
    )


def panel(runs, title):
    return next((p for p in curves.panels(runs) if p.title == title), None)


def test_series_sorts_takes_the_last_of_a_step_and_breaks_at_nonfinite():
    records = [
        {"step": 3, "a/b": 3.0},
        {"step": 1, "a/b": 1.0},
        {"step": 2, "a/b": None},
        {"step": 3, "a/b": 4},
        {"step": 4},
        {"step": 5, "a/b": 0},
        {"step": 6, "a/b": float("inf")},
        {"step": 7, "a/b": "text"},
    ]
    steps, values = curves.series(records, "a/b")
    numpy.testing.assert_array_equal(steps, [1, 2, 3, 5, 6, 7])
    numpy.testing.assert_array_equal(values, [1.0, np.nan, 4.0, 0.0, np.nan, np.nan])


def test_skipped_steps_from_events_or_else_from_the_total():
    totals = [{"step": i, "guard/skipped": v} for i, v in ((10, 0), (20, 1), (30, 1), (40, 3))]
    assert curves.skipped_steps(run(totals)) == (20, 40)
    assert curves.skipped_steps(run(totals[:1])) == ()
    assert curves.skipped_steps(run(totals[1:2])) == (20,), "skipped before the first record"
    events = [{"kind": "skipped", "step": s} for s in (17, 33, 35, 33)]
    events += [{"kind": "save", "step": 8}, {"kind": "skipped"}]
    assert curves.skipped_steps(run(totals, events=events)) == (17, 33, 35)
    events.append({"kind": "rerun", "step": 35, "verdict": "reproducible"})
    assert curves.skipped_steps(run(totals, events=events)) == (17, 33, 35)
    transient = {"kind": "rerun", "step": 35, "verdict": "transient"}
    assert curves.skipped_steps(run(totals, events=[*events, transient])) == (17, 33)
    events.append({"kind": "rollback", "step": 35, "to": 20})
    assert curves.skipped_steps(run(totals, events=events)) == (17,)


def test_losses_and_their_held_out_companions():
    records = [
        {"step": s, "loss/total": s, "loss/ce": 2 * s, "loss/kl_t1": 9.0, "loss/feature": 1.0}
        for s in (1, 2)
    ]
    records.append({"step": 2, "eval/loss": 5.0})
    lines = panel([run(records)], "Loss").lines
    assert [(line.label, line.number) for line in lines] == [
        ("total", "2.000"),
        ("cross-entropy", "4.000"),
        ("feature", "1.000"),
        ("loss, held-out", "5.000"),
    ]
    assert [line.label for line in panel([run(records)], "Distance to the teacher").lines] == [
        "KL to the teacher"
    ]


def test_perplexity_stands_between_the_levels_of_the_comparison():
    records = [{"step": s, "eval/perplexity": 10.0 - s} for s in (1, 2)]
    rows = [{"name": "teacher", "perplexity": 5.0}, {"name": "SFT control", "perplexity": None}]
    lines = panel([run(records, rows=rows)], "Perplexity on held-out text").lines
    assert [(line.label, line.style) for line in lines] == [
        ("perplexity, held-out", "dots"),
        ("teacher", "level"),
    ]


def test_knobs_that_move_are_drawn_and_the_others_named():
    records = [
        {"step": s, "knobs/alpha": 0.3, "knobs/taid_t": s / 10, "knobs/temperature": 1.0 + s}
        for s in range(5)
    ]
    knobs = panel([run(records)], "Knobs")
    assert [[line.label for line in chart.lines] for chart in knobs.charts] == [
        ["taid_t"],
        ["temperature"],
    ]
    assert knobs.note == "Constant: alpha = 0.300."


def test_time_shares_add_up_to_one():
    records = [
        {
            "step": s,
            "perf/teacher_share": 0.4,
            "perf/data_share": 0.1,
            "perf/checkpoint_share": 0.2 if s == 3 else 0.0,
        }
        for s in (1, 2, 3)
    ]
    chart = panel([run(records)], "Where the time goes").charts[0]
    assert chart.stacked
    numpy.testing.assert_allclose(sum(line.values for line in chart.lines), 1.0)
    assert chart.lines[0].label == "student and the rest"
    assert chart.lines[0].number == "43.3%"  # (0.5 + 0.5 + 0.3) / 3


def test_an_estimate_of_the_teacher_takes_no_more_than_is_left():
    records = [{"step": 1, "perf/teacher_share": 0.9, "perf/data_share": 0.4}]
    lines = panel([run(records)], "Where the time goes").charts[0].lines
    assert [(line.label, line.number) for line in lines] == [
        ("student and the rest", "0.0%"),
        ("teacher", "60.0%"),
        ("data", "40.0%"),
    ]


def test_what_was_not_recorded_gives_no_picture():
    assert curves.panels([run([])]) == []
    titles = [p.title for p in curves.panels([run([{"step": 1, "optim/lr": 0.1}])])]
    assert titles == ["Optimizer"]
    assert len(panel([run([{"step": 1, "optim/lr": 0.1}])], "Optimizer").charts) == 1
    assert curves.panels([run([{"step": 1, "loss/total": None}])]) == []


def test_several_runs_lie_over_each_other():
    first = run([{"step": s, "loss/total": 1.0} for s in (1, 2)], name="a")
    second = run([{"step": s, "loss/total": 2.0} for s in (1, 9)], name="b")
    loss = panel([first, second], "Loss")
    assert [(line.label, line.number) for line in loss.lines] == [("a", "1.000"), ("b", "2.000")]
    assert loss.lines[0].colour != loss.lines[1].colour
    assert loss.end == 9


def test_rewards_and_shares_of_right_answers_have_a_picture():
    records = [
        {"step": 1, "reward/mean": 0.1},
        {"step": 2, "reward/mean": 0.3, "eval/pass_at_1": 0.25, "eval/pass_at_8": 0.5},
        {"step": 2, "eval/maj_at_8": 0.375, "eval/reward_mean": 0.2, "eval/questions": 8.0},
    ]
    earned, right = panel([run(records)], "Rewards").charts
    assert [line.label for line in earned.lines] == ["reward", "reward, held-out"]
    assert {line.label: line.values.tolist() for line in right.lines} == {
        "maj at 8": [0.375],
        "pass at 1": [0.25],
        "pass at 8": [0.5],
    }
    assert panel([run([{"step": 1, "loss/total": 1.0}])], "Rewards") is None


def test_of_several_teachers_each_has_its_lines():
    records = [
        {"step": 1, "teachers/math/kl_t1": 0.5, "teachers/math/share": 1.0, "loss/total": 1.0},
        {"step": 2, "teachers/math/kl_t1": 0.4, "teachers/math/share": 0.75, "loss/total": 1.0,
         "teachers/code/kl_t1": 0.2, "teachers/code/share": 0.25},
        {"step": 2, "eval/teachers/code/kl_t1": 0.3},
    ]  # fmt: skip
    found = panel([run(records)], "By teacher")
    kl, share = found.charts
    assert [line.label for line in kl.lines] == ["code", "code, held-out", "math"]
    assert [line.label for line in share.lines] == ["code", "math"] and share.percent
    numpy.testing.assert_array_equal(kl.lines[2].values, [0.5, 0.4])
    assert panel([run([{"step": 1, "loss/total": 1.0}])], "By teacher") is None
