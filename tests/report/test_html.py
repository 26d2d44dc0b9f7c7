import html as html_of
import html.parser
import json
import math
import os
import re
import shutil
import subprocess

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

from jaxdistill.errors import ConfigError, DataError, StorageError, UserError
from jaxdistill.report import build, pictures

HOSTILE = (
    '<script>document.title="owned"</script>',
    "<img src=x onerror=\"document.title='owned'\">",
    "]]></style></svg><svg onload=\"document.title='owned'\">",
    "\x1b[31mred\x1b]0;owned\x07 \u202egpj \x00 {{ 7*7 }} {% raw %} & \" '",
    '<a href="https://evil.example/">x</a><link rel="stylesheet" href="//evil.example/x.css">',
)


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._inside = [], [], []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._inside:
            self.words.append(data)


def record(step):
    decay = math.exp(-step / 50)
    return {
        "step": step,
        "time": 1_780_000_000.0 + 2 * step,
        "loss/total": 1.5 + decay,
        "loss/ce": 3.0 + decay,
        "loss/divergence": 0.25 + decay,
        "loss/kl_t1": 0.2 + decay,
        "agree/top1": 0.75 - 0.5 * decay,
        "teacher/entropy": 2.0,
        "student/entropy": 2.0 + decay,
        "knobs/alpha": 0.3,
        "knobs/taid_t": step / 100,
        "optim/lr": 1e-4 * (1 - step / 100),
        "optim/grad_norm": 0.5 + decay,
        "perf/tokens_per_second": 41_234.0,
        "perf/step_seconds": 2.0,
        "perf/teacher_share": 0.4,
        "perf/data_share": 0.02,
        "perf/checkpoint_share": 0.01,
        "guard/skipped": 1 if step == 40 else 0,
    }


ROWS = [
    {"name": "teacher", "perplexity": 20.0, "parameters": 1_235_814_400, "bytes": 2_471_645_608},
    {"name": "student before", "perplexity": 60.0, "kl_t1": 1.25, "agree_top1": 0.41},
    {"name": "SFT control", "perplexity": 30.0, "kl_t1": 0.75, "agree_top1": 0.61},
    {
        "name": "student after",
        "perplexity": 24.0,
        "kl_t1": 0.31,
        "agree_top1": 0.702,
        "parameters": 361_821_120,
    },
]


@pytest.fixture
def run_dir(tmp_path):
    """A run as it lies on the disk when it is done."""
    folder = tmp_path / "taid-small"
    folder.mkdir()
    lines = [json.dumps(record(step)) for step in range(1, 101)]
    for step in (50, 100):
        evaluation = {"step": step, "time": 1.78e9 + 2 * step, "eval/perplexity": 84.0 - step * 0.6}
        lines.append(json.dumps({**evaluation, "eval/kl_t1": 0.4, "eval/agree_top1": 0.6}))
    put(folder, "metrics.jsonl", "\n".join(lines) + "\n")
    put(folder, "table.json", {"held_out": "validation, 200 rows", "rows": ROWS})
    info = {
        "status": "done",
        "total_steps": 100,
        "method": "taid",
        "device": "NVIDIA H100",
        "mesh": {"data": 1, "fsdp": 8},
        "versions": {"jax": "0.12.0"},
        "teacher": {"source": "models/big", "parameters": 5},
        "attempts": [{"started": 0, "ended": 3600}, {"started": 4000, "ended": 4060}],
    }
    put(folder, "RUN.json", info)
    put(folder, "command.txt", "jaxdistill train configs/taid.yaml api_key=sk-shouldnotbeseen0000")
    put(folder, "config.resolved.yaml", "method:\n  name: taid\n")
    put(folder, "fingerprints.json", {"facts": {"data": "sha256:9f86d081"}})
    put(folder, "quarantine/train.jsonl", "{}\n" * 3)
    rollback = '{"time": 1780000000, "kind": "rollback", "step": 47, "to": 42}\n'
    save = '{"time": 1780000000, "kind": "checkpoint", "step": 50}\n'
    put(folder, "events.jsonl", rollback + save)
    return folder


def put(folder, name, value):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def page_of(*folders):
    return Page(build(list(folders)).read_text(encoding="utf-8"))


def test_the_page_holds_the_right_numbers(run_dir):
    path = build(run_dir)
    assert path == run_dir / "report.html"
    text = Page(path.read_text()).text
    for words in (
        "The student recovered 90.0% of the perplexity gap to the teacher",
        "20.0% below that of the SFT control (30.00), which recovered 75.0% of the gap.",
        "Compression 3.42× parameters",
        "Teacher 1.24B big",
        "Student 362M",
        "Perplexity 24.00 before: 60.00",
        "Top-1 agreement 70.2% before: 41.0%",
        "Steps 100 of 100",
        "Time 1h01m 2 attempts",
        "Device NVIDIA H100 mesh data 1, fsdp 8",
        "measured on validation, 200 rows",
        "total 1.635",  # 1.5 + exp(-2)
        "top-1 68.2%",  # 0.75 - 0.5 exp(-2)
        "perplexity, held-out 24.00",
        "taid_t 1.000",
        "Constant: alpha = 0.300.",
        "student and the rest 57.0%",
        "trained tokens/s 41.2k",
        "Red ticks on the axis: 1 skipped step(s).",
        "1 step(s) skipped: 40.",
        "1 rollback(s) to a checkpoint, with batches left out: at step 47.",
        "3 record(s) of the data set aside",
        "The run was resumed 1 time(s).",
        "jaxdistill train configs/taid.yaml api_key= [redacted]".replace("= ", "="),
        "name: taid",
        "sha256:9f86d081",
        "taid-small: 102 records, the last of step 100 at 2026-05-28 20:30 UTC",
    ):
        assert words in text, words
    assert "shouldnotbeseen" not in text
    assert "model FLOP utilisation" not in text, "what was not measured is not shown"


def test_bars_are_in_proportion_and_the_better_way_to_train_is_marked(run_dir):
    page = build(run_dir).read_text()
    widths = re.findall(r'<td[^>]*>([\d.]+)<span class="bar"><span style="width:([\d.]+)%"', page)
    assert dict(widths) == {
        "20.00": "33.33",
        "60.00": "100.0",
        "30.00": "50.0",
        "24.00": "40.0",
        "1.250": "100.0",
        "0.750": "60.0",
        "0.310": "24.8",
    }
    assert re.findall(r'<td data-label="[^"]*" class="best">([^<]+)', page) == [
        "24.00",
        "0.310",
        "70.2%",
    ]


def test_the_same_run_gives_the_same_bytes(run_dir, tmp_path):
    first = build(run_dir).read_bytes()
    moved = tmp_path / "elsewhere" / run_dir.name
    shutil.copytree(run_dir, moved)
    (moved / "report.html").unlink()
    assert build(moved, out=tmp_path / "again.html").read_bytes() == first
    assert not list(tmp_path.glob("*.tmp"))


def test_the_page_loads_nothing_and_forbids_it(run_dir):
    page = page_of(run_dir)
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    # The policy must come before anything it is to govern.
    assert [tag for tag, _ in page.tags].index("meta") < [tag for tag, _ in page.tags].index(
        "style"
    )
    assert not {t for t, _ in page.tags} & {"script", "link", "iframe", "object", "img", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "xlink:href", "src", "action"):
                assert value.startswith("#"), (tag, name, value)
            elif not name.startswith("xmlns"):
                assert "//" not in (value or ""), (tag, name, value)
    source = (run_dir / "report.html").read_text()
    assert "@import" not in source and not re.search(r"url\((?!#)", source)


def plant(run_dir):
    """Hostile text in every place a run can carry text to the page."""
    text = " ".join(HOSTILE)
    sample = {"step": 1, "prompt": text, "teacher": text, "student": text, text: text}
    put(run_dir, "samples/step_000001.jsonl", json.dumps(sample) + "\n")
    rows = [*ROWS, {"name": text, "perplexity": 5.0}]
    put(run_dir, "table.json", {"held_out": text, "rows": rows})
    info = {name: text for name in ("status", "method", "device", "git_sha", "exit_reason", text)}
    info |= {"versions": {text: text}, "mesh": {text: text}, "teacher": {"source": text}}
    put(run_dir, "RUN.json", info)
    put(run_dir, "command.txt", text)
    put(run_dir, "config.input.yaml", text)
    put(run_dir, "fingerprints.json", {"facts": {text: text}})
    put(run_dir, "events.jsonl", json.dumps({"kind": text, text: text}) + "\n")
    extra = {"step": 100, "time": 1.78e9, f"knobs/{text}": 0.5, f"loss/{text}": 1.0}
    extra[f"knobs/still {text}"] = 2.0
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(extra) + "\n")
        file.write(json.dumps({**extra, "step": 99, f"knobs/{text}": 0.6}) + "\n")


def test_hostile_text_stays_text(run_dir):
    clean = page_of(run_dir)
    plant(run_dir)
    source = build(run_dir).read_text(encoding="utf-8")
    page = Page(source)
    assert {t for t, _ in page.tags} - {t for t, _ in clean.tags} <= {"article", "h4", "div"}
    for piece in ("<script", "<img", "<a ", "<link", "]]>", "{{ 7*7", "\x1b", "\x00", "\u202e"):
        assert (piece in source) == (piece == "{{ 7*7"), piece
    assert source.count("</style>") == 1 and " 49 " not in page.text
    for piece in HOSTILE[:3]:
        assert piece in page.text, "the reader sees what was said"
    assert "\u241b[31mred" in page.text
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]


def test_a_hostile_page_of_samples_stays_text(run_dir):
    put(run_dir, "samples/step_000001.md", " ".join(HOSTILE))
    source = build(run_dir).read_text(encoding="utf-8")
    assert HOSTILE[0] in Page(source).text
    assert "<script" not in source and "\x1b" not in source


def test_hostile_names_of_runs_stay_text(run_dir, tmp_path):
    other = tmp_path / "<b onclick=x>{{7}}"
    shutil.copytree(run_dir, other)
    page = page_of(other, run_dir)
    assert not [a for _, a in page.tags if "onclick" in a]
    assert "<b onclick=x>{{7}}" in page.text


def test_a_run_that_is_going_on_says_what_is_missing(run_dir):
    (run_dir / "table.json").unlink()
    put(run_dir, "RUN.json", {"status": "running", "total_steps": 500})
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 101, "loss/to')  # it is writing just now
    text = page_of(run_dir).text
    assert "running" in text
    assert "The run is at step 100 of 500. The comparison with teacher" in text
    assert "No comparison with the teacher and the student before" in text


def test_the_time_of_an_attempt_that_was_killed_ends_with_its_last_record(run_dir):
    began = 1_780_000_000.0  # records follow every 2 seconds, the last 200 seconds later
    attempts = [{"started": began}, {"started": began + 100.5, "ended": began + 160.5}]
    put(run_dir, "RUN.json", {"attempts": attempts})
    assert "Time 2m40s 2 attempts" in page_of(run_dir).text  # 100 s and 60 s
    put(run_dir, "RUN.json", {"attempts": attempts[:1]})
    assert "Time 3m20s Training" in page_of(run_dir).text.replace("Result", "Training")
    put(run_dir, "RUN.json", {})
    assert "Time 3m18s first record to last" in page_of(run_dir).text


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    put(tmp_path, "RUN.json", {"status": "new"})
    text = page_of(tmp_path).text
    assert "Nothing has been recorded yet." in text and "No metrics yet" in text


def test_numbers_that_are_not_finite_are_told(run_dir):
    rows = [{"name": "teacher", "perplexity": 20.0}, {"name": "student after"}]
    rows.append({"name": "student before", "perplexity": 30.0})
    put(run_dir, "table.json", {"rows": rows})
    bad = {"step": 100, "time": 0, "loss/total": None, "nonfinite": ["loss/total"]}
    put(run_dir, "metrics.jsonl", json.dumps(record(99)) + "\n" + json.dumps(bad) + "\n")
    text = page_of(run_dir).text
    assert "no perplexity of student after" in text
    assert "1 record(s) hold numbers that are not finite" in text


def test_several_runs_are_compared_on_one_page(run_dir, tmp_path):
    other = tmp_path / "gkd-small"
    shutil.copytree(run_dir, other)
    put(other, "table.json", {"rows": [*ROWS[:3], {**ROWS[3], "perplexity": 40.0}]})
    path = build([run_dir, other])
    assert path == run_dir / "comparison.html"
    text = Page(path.read_text()).text
    assert "2 runs compared" in text
    assert "taid-small The student recovered 90.0%" in text
    assert "gkd-small The student recovered 50.0%" in text
    assert "taid-small 1.635 gkd-small 1.635" in text


def test_runs_of_the_same_name_are_told_apart(run_dir, tmp_path):
    twin = tmp_path / "b" / run_dir.name
    shutil.copytree(run_dir, twin)
    text = page_of(run_dir, twin).text
    assert "taid-small (1)" in text and "taid-small (2)" in text


def test_errors_name_the_remedy(run_dir, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no run directory given"):
        build([])
    with pytest.raises(ConfigError, match="no such run directory"):
        build(tmp_path / "absent")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        build(run_dir, out=tmp_path / "no" / "folder" / "x.html")
    assert caught.value.exit_code == 9
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib, which is not installed"):
        build(run_dir)


# A real browser: what it draws, and that nothing planted in a run comes alive in it.


def test_a_sweep_has_a_small_picture_for_each_run(run_dir, tmp_path):
    from jaxdistill.report import sweep

    for name in ("alpha=0.1", "alpha=0.5"):
        shutil.copytree(run_dir, tmp_path / "sweep" / name)
    runs = [{"name": "alpha=0.1"}, {"name": "alpha=0.5"}, {"name": "not begun"}]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"runs": runs, "rows": []}))
    text = sweep.write(tmp_path / "sweep").read_text()
    small = text[text.index("<h2>Run by run") : text.index("<h2>Result")]
    assert small.count("<figure>") == 2 and 'class="pictures small"' in small
    assert "step 50: alpha=0.5 0.400; alpha=0.1 0.400" in small


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def browse(tmp_path, page, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode("utf-8", "replace")


@needs_chromium
def test_chromium_draws_the_page_light_and_dark(run_dir, tmp_path):
    from matplotlib.image import imread

    path = build(run_dir)
    for scheme, index in (("1", 0), ("0", 1)):
        shot = tmp_path / f"shot{scheme}.png"
        browse(
            tmp_path,
            path,
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1180,1800",
            f"--screenshot={shot}",
        )
        image = (imread(shot)[..., :3] * 255).round().astype(int)
        assert image.shape[0] == 1800
        page = image[0, 0].mean()
        assert page > 240 if index == 0 else page < 40
        # Both the pictures' lines and the text must be there, in the colours of this scheme.
        for token, least in (("blue", 300), ("orange", 100), ("ink", 300)):
            colour = [int(pictures.PALETTE[token][index][i : i + 2], 16) for i in (1, 3, 5)]
            seen = (abs(image - colour).max(axis=-1) <= 6).sum()
            assert seen >= least, (scheme, token, seen)


@needs_chromium
def test_a_phone_shows_the_whole_table_and_letters_that_can_be_read(run_dir, tmp_path):
    """A frame of 390 pixels is a phone to the page's style; a script beside it looks inside."""
    page = build(run_dir)
    outer = tmp_path / "phone.html"
    outer.write_text(
        f'<iframe src="{page.as_uri()}" style="width:390px;height:3000px;border:0"></iframe>'
        "<script>onload=()=>{const d=frames[0].document,w=d.documentElement.scrollWidth;"
        "const cells=[...d.querySelectorAll('.result td')].map(e=>e.getBoundingClientRect().right);"
        "const text=[...d.querySelectorAll('figure svg text')].map(e=>e.getBoundingClientRect());"
        "document.title=JSON.stringify({w,cells:Math.max(...cells),"
        "letters:Math.min(...text.map(r=>r.height)),right:Math.max(...text.map(r=>r.right)),"
        "left:Math.min(...text.map(r=>r.left))})}</script>"
    )
    dom = browse(tmp_path, outer, "--dump-dom", "--allow-file-access-from-files")
    seen = json.loads(html_of.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert seen["w"] <= 390 and seen["cells"] <= 390
    assert seen["left"] >= 0 and seen["right"] <= 390
    assert seen["letters"] >= 11


@needs_chromium
def test_nothing_planted_comes_alive_in_chromium(run_dir, tmp_path):
    plant(run_dir)
    dom = browse(tmp_path, build(run_dir), "--dump-dom", "--virtual-time-budget=2000")
    assert "<title>taid-small - jaxdistill report</title>" in dom
    assert "owned" in dom, "the planted text is shown"
