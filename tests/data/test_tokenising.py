"""Records become documents here or in processes: the same bytes, whatever is killed meanwhile."""

import json
import os
import signal

import pytest

from jaxdistill.data import pipeline, shard_build, tokenising, worker
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.second_view import SecondView
from jaxdistill.errors import ConfigError, DataError
from jaxdistill.safe import pool
from tests.data.test_alignment import TOKENIZERS
from tests.data.test_privileged import chats, completion, conversation

TALK = [{"role": "user", "content": "q <|im_end|>"}, {"role": "assistant", "content": "a"}]
TOOLS = [
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        "weight": 0,
    },
    {"role": "tool", "content": "42", "tool_call_id": "1"},
    {"role": "assistant", "content": "it is 42", "reasoning_content": "hm"},
]
PRINTS_ALL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{{ m.reasoning_content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
)


class Here:
    """What a pool of three does, in this process; how often one was opened."""

    opened = 0

    def __init__(self, name, setup, workers):
        assert name == worker.MAIN and workers == 3
        self._answer = worker.opened(setup)
        Here.opened += 1

    def answers(self, messages):
        return ((place, self._answer(message)) for place, message in messages)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def kinds():
    """(records, options of the build) of every kind of documents there is."""
    texts = [{"text": f"the cat {n} sat on ünïcode 😀"} for n in range(9)]
    pair = {"prompt": "two? ", "chosen": "yes", "rejected": "no"}
    turns = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [TALK[1] | {"content": "b"}]}
    every, answers = {"loss_on": "completion"}, {"loss_on": "assistant"}
    context = PrivilegedView(chats(), 96, "It is {solution}. {prompt}")
    pairs = {"loss_on": "completion", "seq_len": 96}
    return {
        "text": ([*texts, {"text": ""}, {"text": "<|im_end|>"}, {"text": 3}], {}),
        "parse": ([{"text": "hi<|im_end|> \n"}, *texts], {"special_tokens": "parse"}),
        "completion": ([completion("a" * 40, "b"), completion(), completion("x", " ")] * 4, every),
        "messages": ([{"messages": TALK, "tools": []}, {"messages": TALK * 2}] * 5, answers),
        "each": ([{"messages": TALK * 3}] * 7, answers | {"turns": "each"}),
        "tools": ([{"messages": TOOLS, "chat_template_kwargs": {"m": 2}}, {"messages": TOOLS}] * 4,
                  answers | {"chat_template": PRINTS_ALL, "seq_len": 160}),
        "pairs": ([pair, pair | {"rejected": "x" * 90}] * 4, pairs),
        "turns": ([turns] * 5, pairs),
        "second": (texts, {"second": SecondView(TOKENIZERS["metaspace"], 20)}),
        "chats": ([conversation("2+2", "4"), conversation("1", "2" * 30)] * 4,
                  answers | {"seq_len": 64, "second": SecondView(chats(), 48)}),
        "context": ([completion(solution="s"), completion(answer="s", solution="s")] * 5,
                    every | {"second": context}),
        "told": ([conversation("2+2", "4", solution="s"), conversation("2", "3")] * 4,
                 answers | {"second": context, "seq_len": 64}),
    }  # fmt: skip


def built(path, folder, **options):
    """Every file of a build by its place, and how many records it uses."""
    given = {"seq_len": 32, "max_bad_fraction": 1.0, **options}
    data = pipeline.build(path, chats(), cache_dir=folder, **given)
    files = (one for one in folder.rglob("*") if one.is_file())
    return {str(one.relative_to(folder)): one.read_bytes() for one in files}, data.used


@pytest.mark.parametrize("kind", list(kinds()))
def test_documents_are_those_of_one_process(kind, tmp_path, monkeypatch):
    records, options = kinds()[kind]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(shard_build, "_BATCH_RECORDS", 2)
    alone, used = built(path, tmp_path / "alone", **options, workers=1)
    monkeypatch.setattr(tokenising, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(tokenising, "Pool", Here)
    Here.opened = 0
    together, _ = built(path, tmp_path / "together", **options, workers=3)
    assert Here.opened == 1 and used >= 4
    assert together == alone


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A file of 40 records, which are read 4 at a time; processes begin at once."""
    monkeypatch.setattr(shard_build, "_BATCH_RECORDS", 4)
    monkeypatch.setattr(tokenising, "ALONE_SECONDS", 0.0)
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    return path


def test_processes_that_are_killed_change_nothing_and_are_told(many, tmp_path, monkeypatch, caplog):
    alone = built(many, tmp_path / "alone", workers=1)
    taken, pools = shard_build.ShardBuild.take, []

    class Kept(pool.Pool):
        def __init__(self, *given):
            super().__init__(*given)
            pools.append(self)

    def take(work, index, batch, made):
        if batch[0].line == 13:
            for process in pools[0]._all:
                os.kill(process._process.pid, signal.SIGKILL)
        return taken(work, index, batch, made)

    monkeypatch.setattr(tokenising, "Pool", Kept)
    monkeypatch.setattr(shard_build.ShardBuild, "take", take)
    assert built(many, tmp_path / "together", workers=2) == alone
    assert len(pools) == 1 and "was ended by SIGKILL" in caplog.text
    for process in pools[0]._all:
        with pytest.raises(ProcessLookupError):
            os.kill(process._process.pid, 0)


def test_records_that_end_every_process_are_named(many, tmp_path, monkeypatch):
    class Ends(Here):
        def answers(self, messages):
            place, _ = next(messages)
            raise pool.Died(place, "process 7 was ended by SIGKILL")

    monkeypatch.setattr(tokenising, "Pool", Ends)
    words = r"data.train: .*many.jsonl:5 to 8: each process .* ends \(process 7 was ended by SIGK"
    with pytest.raises(DataError, match=words):
        built(many, tmp_path / "together", workers=3)


def test_a_bad_record_is_met_before_what_reading_ahead_meets(many, tmp_path, monkeypatch):
    lines = many.read_text().splitlines()
    lines[9], lines[30] = "{", json.dumps({"messages": TALK})
    many.write_text("\n".join(lines))
    monkeypatch.setattr(tokenising, "Pool", Here)
    with pytest.raises(DataError, match="many.jsonl:10: bad JSON"):
        built(many, tmp_path / "cache", workers=3, on_bad_record="fail")
    with pytest.raises(ConfigError, match="data.workers: 0: must be at least 1"):
        built(many, tmp_path / "cache", workers=0)
