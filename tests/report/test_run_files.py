import json

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.report import run_files


def write(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such run directory"):
        run_files.load(tmp_path / "absent")
    with pytest.raises(ConfigError, match="not a run directory: it holds none of RUN.json"):
        run_files.load(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    write(tmp_path, "RUN.json", {"status": "new"})
    words = " ".join(run_files.load(tmp_path).missing)
    assert "No metrics yet" in words
    assert "No comparison" in words
    assert "No config.resolved.yaml" in words


def test_damage_is_named_and_costs_only_itself(tmp_path):
    write(tmp_path, "metrics.jsonl", '{"step": 1, "loss/total": 1.0}\nrubbish\n{"step": 2}\n{"st')
    write(tmp_path, "RUN.json", "{not json")
    write(tmp_path, "table.json", [1])
    run = run_files.load(tmp_path)
    assert [record["step"] for record in run.records] == [1, 2]
    words = " ".join(run.missing)
    assert "metrics.jsonl: 1 damaged line(s) were left out (line 2)" in words
    assert "RUN.json is damaged" in words and "table.json is damaged" in words


def test_the_latest_samples_are_taken(tmp_path):
    write(tmp_path, "RUN.json", {})
    write(tmp_path, "samples/step_000100.jsonl", '{"step": 100, "prompt": "old"}\n')
    write(tmp_path, "samples/step_000200.jsonl", '{"step": 200, "prompt": "new", "n": 1}\n')
    run = run_files.load(tmp_path)
    assert (run.samples, run.samples_step) == ([{"prompt": "new"}], 200)


def test_marks_of_samples_are_all_good_or_none(tmp_path):
    rows = [
        {"step": 1, "student": "ab", "marks": [["a", 0.5], ["b", -1]]},
        {"step": 1, "student": "cd", "marks": [["c", "0.5"], ["d", -1]]},
        {"step": 1, "student": "ef"},
    ]
    write(tmp_path, "RUN.json", {})
    write(tmp_path, "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    run = run_files.load(tmp_path)
    assert run.marks == [[("a", 0.5), ("b", -1.0)], [], []] and len(run.samples) == 3


def test_samples_of_one_file_keep_its_last_step(tmp_path):
    lines = [{"step": s, "student": f"at {s}"} for s in (1, 2, 2)]
    write(tmp_path, "RUN.json", {})
    write(tmp_path, "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert run_files.load(tmp_path).samples == [{"student": "at 2"}] * 2


def test_a_page_of_samples_stands_in_where_there_is_nothing_else(tmp_path):
    write(tmp_path, "RUN.json", {})
    write(tmp_path, "samples/step_000100.md", "# text")
    run = run_files.load(tmp_path)
    assert (run.samples, run.samples_step, run.samples_page) == ([], 100, "# text")
    write(tmp_path, "samples/step_000100.jsonl", '{"step": 100, "student": "s"}\n')
    assert run_files.load(tmp_path).samples_page == ""


def test_long_texts_are_cut_and_say_so(tmp_path):
    write(tmp_path, "RUN.json", {})
    write(tmp_path, "config.resolved.yaml", "x" * 300_000)
    rows = [{"step": 1, "student": "y" * 10_000}] * 30
    write(tmp_path, "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    run = run_files.load(tmp_path)
    config = run.texts["Configuration with every default"]
    assert len(config) < 210_000 and config.endswith("[the rest is not shown]")
    assert len(run.samples) == 24 and run.samples[0]["student"].endswith("y [...]")
    assert "6 more samples are in samples.jsonl." in run.missing


def test_quarantine_fingerprints_and_command(tmp_path):
    write(tmp_path, "RUN.json", {"command": ["/usr/bin/jaxdistill", "train", "a b.yaml"]})
    assert run_files.load(tmp_path).quarantined is None
    write(tmp_path, "quarantine/train.jsonl", "{}\n\n")
    write(tmp_path, "quarantine/eval.jsonl", "{}\n")
    facts = {"data": "a", "weights": {"teacher": "b"}, "config.seed": "3"}
    write(tmp_path, "fingerprints.json", {"crc32": 1, "facts": facts})
    run = run_files.load(tmp_path)
    assert run.quarantined == 2
    assert run.fingerprints == {"data": "a", "weights.teacher": "b"}
    assert run.texts["Command"] == "jaxdistill train 'a b.yaml'"
    write(tmp_path, "RUN.json", {"command": ["/src/jaxdistill/__main__.py", "ls"]})
    assert run_files.load(tmp_path).texts["Command"] == "jaxdistill ls"
    write(tmp_path, "RUN.json", {"command": []})
    assert "Command" not in run_files.load(tmp_path).texts


def test_a_run_is_called_by_its_name_or_its_folder(tmp_path):
    write(tmp_path, "RUN.json", {})
    assert run_files.load(tmp_path).name == tmp_path.name
    write(tmp_path, "RUN.json", {"name": "given"})
    assert run_files.load(tmp_path).name == "given"
