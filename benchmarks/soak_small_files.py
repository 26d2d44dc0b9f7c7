"""Small files of runs, workflows, stores and tasks, damaged in every way; and what reads them.

A reader reads around the damage or ends with one message: anything else is a traceback.
"""

import contextlib
import copy
import io
import json
import pathlib

import numpy as np

from jaxdistill.compress import command
from jaxdistill.data.prompts import Prompt
from jaxdistill.errors import UserError
from jaxdistill.evaluate import choices
from jaxdistill.reasoning import prompts, tasks
from jaxdistill.reasoning.judging import TIMED_OUT, Verdict
from jaxdistill.reasoning.store import AnswerStore
from jaxdistill.report import answers, html, story
from jaxdistill.rollouts import decisions, verdicts
from jaxdistill.rollouts.answers import Answer
from jaxdistill.run import anew, changes, run_table, workflow
from jaxdistill.run.folder import RunDir
from jaxdistill.safe import manifest
from jaxdistill.train import guard

HUGE = 7 * 10**400
WRONG = (None, True, -1, 1.5, "", "x" * 50, "\ud800", [], [[]], [None], {}, {"a": {"b": [1]}}, HUGE)
WHOLE = (
    b"",
    b" \n",
    b"null",
    b"[]",
    b"7",
    b"{}",
    b'"text"',
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"\xff\xfe\x00",
    b"\x00" * 40,
    b'{"step": NaN, "a": Infinity}',
    b'{"a": 1, "a": 2}',
    b'{"a": 1e999}\n' * 3,
)
SHARE = {"value": 0.5, "low": 0.4, "high": 0.6}
ROW = {
    "name": "teacher",
    "perplexity": 5.5,
    "kl_t1": 0.2,
    "agree_top1": 0.7,
    "scored_tokens_per_second": 120.5,
    "parameters": 1000,
    "bytes": 4000,
    "spread": {"perplexity": 0.1},
    "reliability": [{"confidence": 0.5, "accuracy": 0.4, "share": 1.0}],
}
ROWS = [ROW | {"name": name, "perplexity": 5.0 + i} for i, name in enumerate(run_table.ORDER)]
RUN = {
    "schema": 1,
    "name": "tiny",
    "id": "0123456789abcdef" * 2,
    "callbacks": {"mlflow": {"run_id": "a"}},
    "sealed": True,
    "status": "done",
    "step": 3,
    "attempts": [{"started": 10.0, "ended": 20.0, "from_step": 0, "pid": 1}] * 2,
    "command": ["jaxdistill", "train", "a.yaml"],
    "saved": {"student": 3},
    "total_steps": 3,
    "method": "kd",
    "teacher": {"source": "t", "parameters": 2000},
    "student": {"source": "s", "parameters": 1000},
    "versions": {"jax": "0.12"},
    "device": "1 x cpu",
    "mesh": {"data": 1},
    "exit_reason": "",
}
RECORDS = [
    {"step": step, "time": 10.0 + step, "loss/total": 2.0, "optim/lr": 0.1, "guard/skipped": 0}
    | ({"eval/perplexity": 5.0, "eval/kl_t1": 0.1, "eval/loss": 2.0} if step == 3 else {})
    for step in (1, 2, 3)
]
EVENTS = [
    {"time": 10.0, "kind": "save", "step": 1},
    {"time": 11.0, "kind": "skipped", "step": 2, "first_row": 1, "end_row": 2, "in_a_row": 1},
    {"time": 12.0, "kind": "rollback", "step": 2, "to": 1, "first_row": 1, "end_row": 2},
]
SAMPLES = [{"step": 3, "prompt": "a", "student": "b", "teacher": "c"}]
STEP = {"kind": "prune", "fingerprint": "a", "started": 1.0, "status": "done", "seconds": 2.0}
STATE = {
    "name": "flow",
    "order": ["cut", "side", "train"],
    "steps": {
        "cut": STEP
        | {"options": {"importance": "i"}, "found": {"parameters": [9, 5], "layers": [0]}},
        "side": STEP | {"kind": "compare", "options": {"contrast": ["a", "b"]}, "output": ["x"]},
        "train": STEP | {"kind": "train", "found": {"tables": {"f": ROWS}}},
        "score": STEP | {"kind": "importance", "found": {"rows": 3, "tokens": 9}},
    },
}
COMPARISON = {
    "held_out": "x",
    "rows": [ROW | {"name": "a"}, ROW | {"name": "b", "bytes": 10}],
    "samples": [{"prompt": "p", "a": "x", "b": "y"}],
}
NOTE = {"parameters": [9, 5], "layers": [0, 1], "channels": [0], "by": "influence", "experts": None}
TASKS = {
    "svamp": {
        "greedy": SHARE,
        "unparsable": SHARE,
        "questions": 3,
        "maj_at": {"1": SHARE, "8": SHARE},
        "pass_at": {"1": SHARE, "8": SHARE},
        "seconds": 1.5,
    }
}
ANSWER = {"id": "1", "question": "q", "gold": "1", "answer": "2", "correct": False, "text": "t"}
ANSWERS = [ANSWER | {"votes": ["1", "2"], "texts": ["a", "b"], "problem": None}]
SAMPLE = {
    "id": "q",
    "sample": 0,
    "question": "a",
    "gold": "1",
    "completion": "b",
    "rationale": "c",
    "answer": "1",
    "correct": True,
    "logprob": -1.5,
    "tokens": 3,
    "reason": "stop",
}
ASKED = {"task": "x"}
_IDS = np.arange(3, dtype=np.int32)
JUDGED = [
    Answer(Prompt(_IDS, {"answer": "5"}), 0, sample, 0, _IDS, True, _IDS / 2, _IDS / 2)
    for sample in range(2)
]
VERDICTS = {
    "answers": decisions.hash_of(JUDGED, notes=True),
    "verdicts": [[1.0, [1.0], None], [None, [None], TIMED_OUT]],
}
ROLLBACK = {"step": 2, "to": 1, "first_row": 1, "end_row": 2, "blamed": "batches", "numbers": ""}


def _run(folder: pathlib.Path) -> None:
    run = RunDir.open(folder)
    for read in (
        anew.check,
        changes.kept,
        run_table._stored,
        lambda run: guard._read(folder / guard.FILE, None),
    ):
        with contextlib.suppress(UserError):
            read(run)
    with run.held():
        pass


def _flow(folder: pathlib.Path) -> None:
    file = folder.parent / "flow.yaml"
    file.write_text(f"dir: {folder}\nsteps: [{{kind: export, name: cut, model: m}}]\n")
    workflow.Runner(file).plan()


def _tasks(folder: pathlib.Path) -> None:
    for name in ("svamp", "gsm8k", "aqua", "bbh_navigate", str(folder / "own.jsonl")):
        if name.endswith("l") or list(folder.rglob(f"*{name.rpartition('_')[2]}*")):
            tasks.load(name, folder=folder)


def _verdicts(folder: pathlib.Path) -> None:
    judges = lambda questions: [Verdict(0.5, (0.5,)) for _ in questions]
    read = verdicts.Verdicts(lambda: judges, str, folder, 1)  # pyrefly: ignore
    for _ in range(2):
        said = read(JUDGED)
        assert [len(one.values) for one in said] == [1, 1]
        np.asarray([np.nan if one.reward is None else one.reward for one in said], np.float32)


# reader -> its files, as lists of lines or as one value
READERS = {
    "report": (
        html.build,
        {
            "RUN.json": RUN,
            "metrics.jsonl": RECORDS,
            "events.jsonl": EVENTS,
            "table.json": {"held_out": "x", "rows": ROWS},
            "fingerprints.json": {"crc32": 1, "facts": {"code": "a"}},
            "samples/step_000003.jsonl": SAMPLES,
        },
    ),
    "resume": (
        _run,
        {
            "RUN.json": RUN,
            "fingerprints.json": {"crc32": 1, "facts": {"code": "a"}},
            "table.json": {"held_out": "x", "rows": ROWS},
            "rollbacks.json": (ROLLBACK,),
            "LOCK": {"pid": 1, "host": "h", "started": 10},
        },
    ),
    "workflow": (_flow, {"workflow.json": STATE}),
    "story": (
        story.write_story,
        {"workflow.json": STATE, "side/comparison.json": COMPARISON, "cut/pruning.json": NOTE},
    ),
    "pruning": (command.pruning_note, {"pruning.json": NOTE}),
    "answers": (
        lambda folder: answers.write_answers([folder]),
        {"tasks.json": TASKS, "answers_svamp.jsonl": ANSWERS},
    ),
    "store": (
        lambda folder: AnswerStore(folder, ASKED).close(),
        {"samples.jsonl": [SAMPLE], "asked.json": ASKED, "spent.json": {"requests": 1.0}},
    ),
    "verdicts": (_verdicts, {verdicts.FILE: [VERDICTS]}),
    "tasks": (
        _tasks,
        {
            "dss/svamp/svamp_test.json": [{"input": "a", "label": "b"}],
            "gsm8k/test.jsonl": [{"question": "a", "answer": "b #### 1"}],
            "aqua/test.json": [{"question": "a", "correct": "A", "options": ["A)1", "B)2"]}],
            "bbh/bbh/navigate.json": {"examples": [{"input": "a", "target": "b"}]},
            "own.jsonl": [{"question": "a", "answer": "1", "id": "x", "rationale": "y"}],
        },
    ),
    "exemplars": (
        lambda folder: prompts.load_exemplars(folder / "own.jsonl"),
        {"own.jsonl": [{"question": "a", "rationale": "b", "answer": "c"}]},
    ),
    "demos": (
        lambda folder: prompts.load_exemplars(folder / "demo.json"),
        {"demo.json": {"demo": [{"question": "Q: a\nA:", "rationale": "b", "pred_ans": "c"}]}},
    ),
    "choices": (
        lambda folder: choices.read(folder / "own.jsonl"),
        {
            "own.jsonl": [
                {"prompt": "a", "choices": ["b", "c"], "answer": 0},
                {"question": "a", "options": ["A)b", "B)c"], "correct": "A"},
            ]
        },
    ),
    "manifest": (manifest.verify, {"manifest.json": {"crc32": 1, "content": {"files": {}}}}),
}
CASES = [(reader, name) for reader, (_, files) in READERS.items() for name in files]


def _text(value) -> bytes:
    if isinstance(value, list):
        return b"".join(json.dumps(line).encode() + b"\n" for line in value)
    return json.dumps(value, indent=1).encode()


def _places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list | tuple):
            yield from _places(item, (*path, key))


def _damaged(draw, value):
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places:
        return value
    *path, last = places[draw.integers(len(places))]
    node = value
    for key in path:
        node = node[key]
    if draw.random() < 0.2 and isinstance(node, dict):
        del node[last]
    else:
        node[last] = copy.deepcopy(WRONG[draw.integers(len(WRONG))])
    return value


def _variants(draw, value, count):
    yield from WHOLE
    raw = _text(value)
    yield from (raw[: draw.integers(1, len(raw))] for _ in range(3))
    for _ in range(count):
        one = _damaged(draw, value)
        yield _text(one if isinstance(one, list) == isinstance(value, list) else one)


def fuzz(
    reader: str, name: str, folder: pathlib.Path, count: int, seed: int = 0, every: int = 1
) -> tuple[int, list[str]]:
    """Damages one file in all ways and reads it.

    Args:
      reader: a key of READERS.
      name: one of its files.
      folder: does not exist yet.
      count: of variants with a single value changed.
      seed: of their choice.
      every: only every so many of all variants are read.

    Returns:
      (variants, those that ended in a traceback, each with its error).
    """
    read, files = READERS[reader]
    draw = np.random.default_rng(seed)
    for other, value in files.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(_text(value))
    good = {other: (folder / other).read_bytes() for other in files}
    variants, wrong = list(_variants(draw, files[name], count))[::every], []
    for data in variants:
        (folder / name).write_bytes(data)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what readers tell of the damage
                read(folder)
        except UserError as error:
            str(error).encode()  # it can be printed
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}: {data[:2000]!r}")
        for other, content in good.items():
            (folder / other).write_bytes(content)
    return len(variants), wrong


def soak(folder: pathlib.Path, count: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """Counts of variants and tracebacks, by reader and file."""
    found = {}
    for reader, name in CASES:
        place = folder / f"{reader}-{name.replace('/', '-')}"
        variants, wrong = fuzz(reader, name, place, count, seed)
        found[f"{reader} {name}"] = {"variants": variants, "tracebacks": len(wrong)}
    return found
