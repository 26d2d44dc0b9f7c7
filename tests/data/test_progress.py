"""A killed build of data resumes: the same bytes, and nothing done twice."""

import re
import shutil

import pytest

from jaxdistill.data import pipeline, progress, shard_build, tokenising
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError
from tests.data.test_tokenising import Here

HEADER = 128  # bytes of a .npy file of numbers
# Prints no message but the last whole: what earlier ones lose is counted for a notice.
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)


def texts(jsonl):
    """Good, rejected, empty, rendered and repeated records in two sources; a field not read."""
    lines = [{"text": f"line {i} of a text", "url": "u"} for i in range(11)]
    lines[2] = {"text": ""}
    lines[3] = {"text": 7}
    lines[5] = {"text": "<|im_start|>user"}
    other = [{"text": f"again {i}", "page": i} for i in range(9)]
    other[8] = {"nothing": 1}
    return [
        open_source(jsonl(lines, "one.jsonl"), weight=1.5),
        open_source(jsonl(other, "two.jsonl"), origin="teacher"),
    ], {}


def chats(jsonl):
    """Conversations whose template leaves text out."""
    turn = lambda role, text: {"role": role, "content": text}
    lines = [
        {
            "messages": [
                turn("user", f"q{i}"),
                turn("assistant", f"<think>why</think>a{i}"),
                turn("user", "and"),
                turn("assistant", f"b{i}"),
            ]
        }
        for i in range(14)
    ]
    lines[1] = {"messages": []}
    lines[6]["messages"][1]["weight"] = 0
    return [jsonl(lines)], {"loss_on": "assistant", "chat_template": DROPS, "seq_len": 64}


class Watched:
    """Builds in batches of three records, each noted; the folder as a kill would leave it."""

    def __init__(self, tmp_path, tokenizer, monkeypatch, workers, sources, options):
        self.tmp_path, self.tokenizer, self.sources = tmp_path, tokenizer, sources
        self.options = {"seq_len": 16, "max_bad_fraction": 1.0, "workers": workers, **options}
        monkeypatch.setattr(tokenising, "ALONE_SECONDS", 0.0)
        monkeypatch.setattr(tokenising, "Pool", Here)
        self.notes, self.taken, self.stop_at = [], 0, None
        monkeypatch.setattr(shard_build, "_BATCH_RECORDS", 3)
        monkeypatch.setattr(shard_build, "_NOTE_SECONDS", 0.0)
        write, take = progress.write, shard_build.ShardBuild.take

        def noted(folder, *rest):
            write(folder, *rest)
            copy = tmp_path / f"note-{len(self.notes)}" / folder.parent.name
            shutil.copytree(folder.parent, copy)
            self.notes.append(copy)
            if len(self.notes) == self.stop_at:
                raise KeyboardInterrupt

        def counted(work, index, batch, made):
            self.taken += len(batch)
            return take(work, index, batch, made)

        monkeypatch.setattr(progress, "write", noted)
        monkeypatch.setattr(shard_build.ShardBuild, "take", counted)

    def files(self, cache):
        """Builds in a cache and returns the bytes of every file there."""
        self.taken = 0
        pipeline.build(self.sources, self.tokenizer, cache_dir=cache, **self.options)
        assert sorted(path.name[:6] for path in cache.iterdir()) == ["tokens", "train-"]
        return {str(path.relative_to(cache)): path.read_bytes() for path in cache.glob("*/*")}


@pytest.fixture(params=[(texts, 1), (chats, 1), (texts, 3)], ids=["texts", "chats", "processes"])
def watched(request, tmp_path, byte_tokenizer, monkeypatch, jsonl):
    records, workers = request.param
    return Watched(tmp_path, byte_tokenizer, monkeypatch, workers, *records(jsonl))


def test_a_kill_behind_any_note_ends_in_the_same_bytes_and_repeats_no_record(watched, tmp_path):
    whole = watched.files(tmp_path / "whole")
    total, notes = watched.taken, list(watched.notes)
    assert len(notes) >= 5 and not any(name.endswith(progress.FILE) for name in whole)
    (told,) = (whole[name] for name in whole if re.match("train-.*manifest.json", name))
    assert b"characters" in told or b"empty" in told  # notices
    left = []
    for number, note in enumerate(notes):
        cache = tmp_path / f"cache-{number}"
        shutil.copytree(note.parent, cache)
        for path in (cache / note.name / "content").iterdir():
            if path.name != progress.FILE:  # what was written behind the note when the kill came
                path.write_bytes(path.read_bytes() + b"torn")
        assert watched.files(cache) == whole
        left.append(watched.taken)
    assert left == sorted(left, reverse=True) and left[0] < total and left[-1] == 0


def test_what_is_damaged_or_noted_of_other_data_is_begun_anew(watched, tmp_path):
    whole = watched.files(tmp_path / "whole")
    total, note = watched.taken, watched.notes[3]
    for number, name in enumerate(path.name for path in (note / "content").iterdir()):
        if (note / "content" / name).stat().st_size == HEADER and name.endswith(".npy"):
            continue  # nothing stands there before the end, or ever
        cache = tmp_path / f"cache-{number}"
        shutil.copytree(note.parent, cache)
        path = cache / note.name / "content" / name
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        assert watched.files(cache) == whole
        assert watched.taken == total


def test_ctrl_c_keeps_what_is_done_and_an_error_keeps_nothing(watched, tmp_path, monkeypatch):
    whole = watched.files(tmp_path / "whole")
    total, cache = watched.taken, tmp_path / "cache"
    watched.stop_at = len(watched.notes) + 3
    with pytest.raises(KeyboardInterrupt):
        watched.files(cache)
    watched.stop_at = None
    assert watched.files(cache) == whole and 0 < watched.taken < total
    monkeypatch.setattr(
        shard_build.ShardBuild, "seal", lambda self: (_ for _ in ()).throw(DataError)
    )
    with pytest.raises(DataError):
        watched.files(tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())
