"""The page of a workflow: what it says and draws, and that nothing in it comes alive."""

import json
import shutil

import numpy as np
import pytest

from jaxdistill import cli
from jaxdistill.compress import importance
from jaxdistill.errors import DataError
from jaxdistill.report import diagrams, story
from tests.report import test_html

EVIL = "<script>document.title='owned'</script>"


def row(name, kl, size, ms, seeds=1, **fields):
    bars = [{"share": 0.5, "confidence": 0.3, "accuracy": 0.2}] * 2
    numbers = {"perplexity": 20 + kl, "kl_t1": kl, "agree_top1": 1 - kl / 2, "acceptance": 1 - kl}
    return {
        "name": name,
        "bytes": size,
        "parameters": size // 4,
        "decode_ms_p50": ms,
        "ece": 0.05,
        "reliability": bars,
        "seeds": seeds,
        **numbers,
        **fields,
    }


@pytest.fixture
def folder(tmp_path):
    """A finished workflow with a comparison, importance and a pruning."""
    rows = [
        row("teacher", 0.0, 500_000_000, 60.0),
        row("KD", 0.40, 300_000_000, 40.0, 3, spread={"kl_t1": 0.01, "agree_top1": 0.2}),
        row("SFT", 0.55, 300_000_000, 41.0, 3, spread={"kl_t1": 0.02, "agree_top1": 0.2}),
        row(EVIL, 0.43, 100_000_000, 45.0),
    ]
    samples = [{"prompt": EVIL, "KD": EVIL, "SFT": "plain"}]
    (tmp_path / "table").mkdir()
    found = {"held_out": "some text", "rows": rows, "samples": samples}
    (tmp_path / "table" / "comparison.json").write_text(json.dumps(found))
    shape = {"layers": 4, "embed": 6, "mlp": 8, "heads": 4, "kv_heads": 2, "head_dim": 4}
    scores = importance.ImportanceScores(
        neurons=np.ones((4, 8)),
        heads=np.ones((4, 4)),
        channels=np.ones(6),
        shares={"final_norm": np.ones(6)},
        cosines=1 - 0.1 * np.abs(np.subtract.outer(range(5), range(5))),
        loss=np.array([2.0, 0.1, 0.2, 1.0]),
        facts={"shape": shape, "rows": 8, "tokens": 99, "data": "calib.txt"},
    )
    importance.save(scores, tmp_path / "scores" / importance.FILE)
    done = {"status": "done", "seconds": 61.0}
    steps = {
        "scores": done | {"kind": "importance", "found": {"rows": 8, "tokens": 99}, "options": {}},
        "cut": done
        | {
            "kind": "prune",
            "found": {"parameters": [1000, 500], "layers": [0, 3]},
            "options": {"importance": "${scores}"},
        },
        "table": done
        | {"kind": "compare", "options": {"contrast": ["KD", "SFT"]}, "found": {"models": 4}},
    }
    state = {"name": EVIL, "steps": steps, "order": list(steps)}
    (tmp_path / "workflow.json").write_text(json.dumps(state))
    return tmp_path


def test_the_page_says_by_how_much(folder):
    page = story.write_story(folder).read_text()
    assert "KL to the teacher: KD 0.400, SFT 0.550: KD is better by 0.150 (27.3%)." in page
    assert "top-1 agreement: KD 80.0%, SFT 72.5%: KD is better by 7.5%, within the spread" in page
    assert "0.400 ± 0.010" in page and "500 of 1.00k parameters" in page
    assert page.count("<svg") == 3 and "Layer importance (scores, cut)" in page
    assert EVIL not in page and "&lt;script&gt;" in page
    assert page == story.write_story(folder, folder / "again.html").read_text()


def test_sentences_name_what_is_worse_and_what_is_missing():
    rows = [row("KD", 0.6, 4, 1.0), row("SFT", 0.5, 4, 1.0)]
    first = story.contrasted(rows, "KD", "SFT")[0]
    assert "KD is worse by 0.100 (20.0%)" in first
    del rows[0]["kl_t1"]
    assert not any("KL to" in text for text in story.contrasted(rows, "KD", "SFT"))
    assert story.contrasted(rows, "KD", "other") == []


def test_bars_that_are_no_shares_are_left_out():
    bar = {"confidence": 0.5, "accuracy": 0.4, "share": 1.0}
    for name in bar:
        for value in (-0.1, 1.1, None):
            rows = [{"name": "a", "reliability": [bar, bar | {name: value}]}]
            assert story._rows({"rows": rows})[0]["reliability"] == []
    assert story._rows({"rows": [{"name": "a", "reliability": [bar]}]})[0]["reliability"] == [bar]


def test_pictures_that_have_nothing_to_show_are_left_out():
    assert diagrams.reliability([{"name": "a"}], "x") is None
    assert diagrams.pareto([row("a", 0.1, 10, 1.0)], "x") is None
    assert diagrams.pareto([{"name": "a", "kl_t1": 1.0}, {"name": "b", "kl_t1": 2.0}], "x") is None


def test_an_unfinished_workflow_has_a_page(folder):
    shutil.rmtree(folder / "table")
    (folder / "scores" / importance.FILE).write_text("damaged")
    page = story.write_story(folder).read_text()
    assert "<svg" not in page and "importance" in page


def test_a_comparison_alone_has_a_page_too(folder, capsys):
    page = story.write_story(folder / "table").read_text()
    assert "side by side" in page and page.count("<svg") == 2 and "<h2>Steps" not in page
    assert cli.main(["report", str(folder / "table")]) == 0
    assert cli.main(["report", str(folder), "-o", str(folder / "other.html")]) == 0
    assert (folder / "other.html").is_file()
    with pytest.raises(DataError, match="no workflow and no comparison"):
        story.write_story(folder / "scores")


@test_html.needs_chromium
def test_chromium_shows_it_and_nothing_comes_alive(folder, tmp_path):
    page = story.write_story(folder)
    dom = test_html.browse(tmp_path, page, "--dump-dom", "--virtual-time-budget=2000")
    assert "- jaxdistill report</title>" in dom and "<title>owned" not in dom
