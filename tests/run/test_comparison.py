"""Models side by side: one table, seeds with their spread, samples, and clear refusals."""

import json
import math
import statistics

import pytest

from jaxdistill import api, cli, commands
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.report import comparison_table

OPTIONS = {"seq_len": 32, "max_rows": 8, "prompt_tokens": 8, "new_tokens": 2, "repeats": 2}


@pytest.fixture(scope="module")
def result(finished, load_config, data, tmp_path_factory):
    """The student twice, at two steps: as seeds of one name, and the last one alone."""
    run = str(finished.run_dir)
    settings = commands.Compare(
        data=[str(data / "eval.txt")], format="paragraphs", prompts=["the quick"], **OPTIONS
    )
    out = tmp_path_factory.mktemp("compared")
    pair = [("both", f"{run}@3"), ("both", f"{run}@6"), ("last", f"{run}@6")]
    return api.compare_models(pair, settings, teacher=f"{run}@3", out=out), out


def test_every_column_is_measured(result, finished):
    found, out = result
    both, last = found["rows"]
    for field in (
        "perplexity bits_per_byte kl_t1 reverse_kl agree_top1 agree_top5 acceptance ece parameters "
        "parameters_non_embedding bytes peak_bytes prefill_ms_p50 prefill_ms_p95 decode_ms_p50 "
        "decode_ms_p95 decode_tokens_per_second"
    ).split():
        assert math.isfinite(both[field]), field
    assert json.loads((out / "comparison.json").read_text()) == found
    table = finished.rows[-1]
    assert last["parameters"] == table["parameters"]
    # The same rows and weights as the run's own evaluation, by another program.
    assert math.isclose(last["perplexity"], table["perplexity"], rel_tol=1e-4)


def test_eval_shows_all_that_compare_shows(result, finished, data, tmp_path, capsys):
    run, text = str(finished.run_dir), str(data / "eval.txt")
    options = commands.Evaluate(
        data=[text], format="paragraphs", seq_len=32, max_rows=8, cache_dir=str(tmp_path)
    )
    metrics = api.evaluate(f"{run}@6", options, teacher=f"{run}@3")
    row = result[0]["rows"][1]
    shared = {key.removeprefix("eval/"): value for key, value in metrics.items()}
    sizes = {"peak_bytes", "prefill_ms_p50", "prefill_ms_p95", "decode_ms_p50", "decode_ms_p95"}
    assert set(row) - set(shared) == sizes | {"name", "seeds", "decode_tokens_per_second"}
    for name in set(row) & set(shared):
        assert shared[name] == row[name], name
    command = ["eval", f"{run}@6", "--data", text, "--seq-len", "32", "--max-rows", "8"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "eval/ece" in printed and "eval/reliability" not in printed


def test_bits_per_byte_count_the_texts_bytes(result):
    """One token is one byte here, and the end of a text is a token of no bytes."""
    last = result[0]["rows"][1]
    bits = math.log2(last["perplexity"])
    assert bits <= last["bits_per_byte"] < 1.1 * bits


def test_seeds_give_a_mean_and_a_spread(result):
    both, last = result[0]["rows"]
    assert (both["seeds"], last["seeds"]) == (2, 1) and "spread" not in last
    first = 2 * both["perplexity"] - last["perplexity"]
    want = statistics.stdev([first, last["perplexity"]])
    assert math.isclose(both["spread"]["perplexity"], want, rel_tol=1e-6) and want > 0
    # Against itself at step 3 the first of the two does not differ.
    assert math.isclose(both["kl_t1"], last["kl_t1"] / 2, rel_tol=1e-3)
    assert "±" in comparison_table(result[0]["rows"])


def test_samples_stand_side_by_side(result):
    (sample,) = result[0]["samples"]
    assert sample["prompt"] == "the quick" and {"both", "last"} <= set(sample)


def test_the_command_prints_the_table(finished, data, tmp_path, capsys):
    run, text = str(finished.run_dir), str(data / "eval.txt")
    words = ["compare", f"student={run}@6", "--data", text, "--seq-len", "32", "--no-speed"]
    assert cli.main([*words, "-o", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert "student" in printed and "perplexity" in printed and "decode" not in printed
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["name"] == "student"
    assert cli.main(["compare", run, "--data", text]) == 2
    assert "write NAME=MODEL" in capsys.readouterr().err


def test_questions_are_made_of_the_held_out_text(finished, tmp_path):
    words = lambda i: " ".join(f"{chr(97 + (i * j) % 26)}{j}" for j in range(70))
    (tmp_path / "e.txt").write_text("\n\n".join(words(i) for i in range(1, 7)))
    settings = commands.Compare(
        data=[str(tmp_path / "e.txt")],
        format="paragraphs",
        seq_len=512,
        questions="texts",
        speed=False,
        cache_dir=str(tmp_path / "cache"),
    )
    run = str(finished.run_dir)
    (row,) = api.compare_models([("s", run)], settings)["rows"]
    assert row["questions"] == 6 and 0 <= row["accuracy"] <= 1


def test_what_cannot_be_compared_is_told(finished, data, tmp_path):
    run, text = str(finished.run_dir), str(data / "eval.txt")
    with pytest.raises(ConfigError, match="at least one model"):
        api.compare_models([], commands.Compare(data=[text]))
    with pytest.raises(ValueError, match="at least 1 item"):
        commands.Compare(data=[])
    with pytest.raises(DataError, match="texts of 60 words"):
        api.compare_models(
            [("s", run)], commands.Compare(data=[text], seq_len=32, questions="texts")
        )
    with pytest.raises(DataError, match="cannot be read"):
        settings = commands.Compare(data=[text], seq_len=32, questions=str(tmp_path / "no"))
        api.compare_models([("s", run)], settings)
