"""Stored teachers: whole or refused, found by the text, the same bytes again."""

import json
import os
import pathlib
import types

import ml_dtypes
import numpy as np
import pytest

from jaxdistill.data.dataset import Dataset
from jaxdistill.data.teacher_cache import catalog, formats, parts, segments, taught, work
from jaxdistill.data.teacher_cache.objects import Objects
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import ConfigError, DamagedError, DataError, MismatchError, StorageError

D = 6
FORM = formats.choose("hidden", vocab=300, embed=D)


def dataset(texts, seq_len=8, name="train", loss=None) -> Dataset:
    """A data set of one text a row."""
    tokens = np.concatenate(texts).astype(np.int32)
    lengths = np.asarray([len(text) for text in texts])
    counted = np.ones(len(tokens), bool) if loss is None else np.concatenate(loss)
    pieces = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    rows = np.arange(len(texts) + 1)
    arrays = {"tokens": tokens, "loss": counted, "segments": pieces, "rows": rows}
    count = len(texts)
    return Dataset(
        name, pathlib.Path(), "print", "text", seq_len, 0, count, len(tokens), 0, count, count,
        count, 0, 0, 0, 0, 0, 0, arrays=arrays,
    )  # fmt: skip


TEXTS = [np.array([5, 6, 7, 8]), np.array([1, 2]), np.array([299, 4, 3])]


class Words:
    """Stands in for a tokenizer."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def answer(one: parts.Wanted) -> np.ndarray:
    """bfloat16 [rows, D], different numbers for different texts."""
    rows = np.flatnonzero(one.mask)[:, None] * 10 + np.arange(D)[None] + one.tokens[0]
    return rows.astype(ml_dtypes.bfloat16)


def fill(place, data, base=None, seal=True) -> Store | None:
    objects = Objects(str(place))
    catalog.begin(objects, {"format": FORM.facts(), "x": 1}, {"seq_len": 8, "loss_on": "all"})
    rows = work.lacking(data, base)
    for part in work.in_parts(rows, 2, 4):
        wanted = work.wanted_of(part, [0, 0], 0)
        parts.write(objects, FORM, wanted, {"hidden": np.concatenate(list(map(answer, wanted)))})
    if not seal:
        return None
    catalog.seal(objects)
    return Store(str(place))


def files(place) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def test_a_row_carries_the_answer_to_each_of_its_texts_in_its_places(tmp_path):
    data = dataset(TEXTS)
    store = fill(tmp_path / "c", {"train": data})
    # One row of all texts, in another order: what was stored is found by the text.
    order = [2, 0, 1]
    other = dataset([TEXTS[i] for i in order], seq_len=10)
    other.arrays["rows"] = np.array([0, 3])
    packed = taught.beside(Dataset(**{**vars(other), "num_rows": 1}), store, Words())
    row = packed[0]["teacher"]["hidden"].astype(np.float32)
    expected, place = np.zeros((10, D), np.float32), 0
    for i in order:
        n = len(TEXTS[i])
        mask = np.arange(n) < n - 1
        one = parts.Wanted(b"", mask, TEXTS[i])
        expected[place : place + n - 1] = answer(one)
        place += n
    np.testing.assert_array_equal(row, expected)
    assert packed.empty_row()["teacher"]["hidden"].shape == (10, D)


def routed(texts, rows) -> Dataset:
    """A data set for two teachers: the first rows are for math, the others for code."""
    data = dataset(texts)
    routes = np.repeat([1, 2], [rows, len(texts) - rows])
    teachers = (("math", rows, 0), ("code", len(texts) - rows, 0))
    named = {**vars(data), "teachers": teachers, "arrays": data.arrays | {"row_routes": routes}}
    return Dataset(**named)


def test_a_row_carries_the_answers_of_its_own_teacher_by_name(tmp_path):
    data = routed(TEXTS, 1)
    stores = {
        name: fill(tmp_path / name, {"train": data.of_teacher(name)}) for name in ("math", "code")
    }
    both, one = (
        taught.beside(data, given, Words()) for given in (stores, {"code": stores["code"]})
    )
    own = both.of_teacher("code")
    for index, text in enumerate(TEXTS):
        expected = np.zeros((8, D), np.float32)
        counted = np.arange(len(text)) < len(text) - 1
        expected[: len(text) - 1] = answer(parts.Wanted(b"", counted, text))
        name, other = ("math", "code") if index == 0 else ("code", "math")
        row = both.in_epoch(both[index], 0)["teacher"]
        np.testing.assert_array_equal(row[name]["hidden"].astype(np.float32), expected)
        assert not row[other]["hidden"].astype(np.float32).any()
        alone = one[index]["teacher"]
        assert alone.keys() == {"code"} == one.empty_row()["teacher"].keys()
        np.testing.assert_array_equal(alone["code"]["hidden"], row["code"]["hidden"])
        if index:
            again = own[index - 1]["teacher"]["code"]["hidden"]
            np.testing.assert_array_equal(again, row["code"]["hidden"])
    with pytest.raises(
        DataError, match=r"teachers.math.cache = \S+ lacks 1 of 2 segments; the .*'1 "
    ):
        taught.beside(routed(TEXTS, 2), stores, Words())


def test_texts_that_come_again_are_asked_once_and_all_their_positions_count():
    loss = [np.array([0, 1, 0, 0], bool), np.ones(2, bool), np.array([0, 0, 0, 1], bool)]
    data = {"train": dataset([TEXTS[0], TEXTS[1], TEXTS[0]], loss=loss)}
    rows = work.lacking(data, None)
    assert [(row.index, row.positions) for row in rows] == [(0, 2), (1, 1)]
    np.testing.assert_array_equal(rows[0].pieces[0][1].mask, [True, False, True, False])


def test_what_is_missing_is_told_with_its_number_and_the_first_text(tmp_path):
    store = fill(tmp_path / "c", {"train": dataset(TEXTS[:2])})
    with pytest.raises(DataError, match=r"lacks 1 of 3 segments; the first is '299 4 3' \(row 2"):
        taught.beside(dataset(TEXTS), store, Words())
    with pytest.raises(DataError, match=r"data.seq_len = 8, here it is 16: another length"):
        taught.beside(dataset(TEXTS, seq_len=16), store, Words())


def test_positions_that_were_not_stored_are_missing(tmp_path):
    half = [np.array([0, 1, 0, 0], bool)]
    store = fill(tmp_path / "c", {"train": dataset(TEXTS[:1], loss=half)})
    with pytest.raises(DataError, match="captured with loss_on: all, other positions"):
        taught.beside(dataset(TEXTS[:1]), store, Words())


def test_capturing_again_adds_what_is_missing_and_leaves_the_rest(tmp_path):
    place = tmp_path / "c"
    store = fill(place, {"train": dataset(TEXTS[:2])})
    before = files(place)
    more = dataset(TEXTS)
    assert [row.index for row in work.lacking({"train": more}, store)] == [2]
    store = fill(place, {"train": more}, base=store)
    assert len(store) == 3
    after = files(place)
    kept = [name for name in before if name != catalog.MANIFEST]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    taught.beside(more, store, Words())


def test_a_capture_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    data = {"train": dataset(TEXTS)}
    fill(tmp_path / "whole", data)
    fill(tmp_path / "killed", data, seal=False)
    with pytest.raises(ConfigError, match="its capture has not ended"):
        Store(str(tmp_path / "killed"))
    objects = Objects(str(tmp_path / "killed"))
    lost = sorted(parts.whole(objects))[0]
    objects.drop(f"parts/{lost}/{parts.NOTE}")  # it died before the note
    (tmp_path / "killed" / "parts" / lost / "hidden" / "c" / "0" / "0").write_bytes(b"half")
    objects.put("parts/ffff/hidden/zarr.json", b"{}")  # half of another part
    assert lost not in parts.whole(objects)
    fill(tmp_path / "killed", data)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_two_processes_store_a_share_each(tmp_path):
    data = {"train": dataset(TEXTS)}
    objects = Objects(str(tmp_path / "c"))
    catalog.begin(objects, {"format": FORM.facts()}, {})
    (part,) = work.in_parts(work.lacking(data, None), 2, 100)
    shares = [work.wanted_of(part, [0, 1], process) for process in range(2)]
    assert [len(share) for share in shares] == [2, 1]
    for share in shares:
        parts.write(objects, FORM, share, {"hidden": np.concatenate(list(map(answer, share)))})
    assert parts.whole(objects) == work.names(part, [0, 1])
    catalog.seal(objects)
    taught.beside(data["train"], Store(str(tmp_path / "c")), Words())


def test_one_share_is_captured_by_one_process(tmp_path):
    place = tmp_path / "c"
    objects = Objects(str(place))
    with catalog.alone(objects, (1, 2)), catalog.alone(objects, (2, 2)):
        with pytest.raises(ConfigError, match="1-of-2: is being written by process"):
            with catalog.alone(Objects(str(place)), (1, 2)):
                pass
        fill(place, {"train": dataset(TEXTS)})  # a lock is no object
    assert len(Store(str(place))) == len(TEXTS) and not (place / "locks").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(ConfigError, match="holds no teacher's answers"):
        with catalog.alone(Objects(str(tmp_path / "other")), (1, 1)):
            pass
    assert os.listdir(tmp_path / "other") == ["file"]


def test_another_identity_is_refused_by_its_fields(tmp_path):
    fill(tmp_path / "c", {"train": dataset(TEXTS)})
    objects = Objects(str(tmp_path / "c"))
    given = {"format": FORM.facts(), "x": 2}
    with pytest.raises(MismatchError, match="x: 1 there, 2 here"):
        catalog.begin(objects, given, {})
    given = {
        "format": formats.choose("hidden", vocab=300, embed=D, dtype="float32").facts(),
        "x": 1,
    }
    with pytest.raises(MismatchError, match="format: .*bfloat16.* there"):
        catalog.begin(objects, given, {})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        catalog.begin(Objects(str(tmp_path / "d")), {}, {})


def read_all(place) -> None:
    store = Store(str(place))
    for entry in range(len(store)):
        store.reading(entry)()
        store.tokens(entry)


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_of_any_object_is_found(seed, tmp_path):
    place = tmp_path / "c"
    fill(place, {"train": dataset(TEXTS)})
    random = np.random.default_rng(seed)
    paths = sorted(p for p in place.rglob("*") if p.is_file())
    path = paths[seed % len(paths)]
    content = bytearray(path.read_bytes())
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    path.write_bytes(content)
    with pytest.raises((DamagedError, ConfigError)):
        read_all(place)
    with pytest.raises((DamagedError, ConfigError)):
        Store(str(place), thorough=True)


def test_objects_that_are_missing_new_or_cut_are_named(tmp_path):
    place = tmp_path / "c"
    store = fill(place, {"train": dataset(TEXTS)})
    shard = sorted(place.rglob("c/0/0"))[0]
    content = shard.read_bytes()
    name = str(shard.relative_to(place))
    os.remove(shard)
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        Store(str(place))
    with pytest.raises(DamagedError, match="lacks numbers"):  # under the hand of a run
        [store.reading(entry)() for entry in range(len(store))]
    shard.write_bytes(content[:-1])
    with pytest.raises(DamagedError, match=f"{name} has {len(content) - 1} bytes"):
        Store(str(place))
    shard.write_bytes(content)
    (shard.parent / "1").write_bytes(b"x")
    with pytest.raises(DamagedError, match="is new"):
        Store(str(place))


def test_zeros_are_written_too(tmp_path):
    objects = Objects(str(tmp_path))
    for name, value in (("zeros", 0), ("fill", 255)):
        objects.put_array(name, np.full((4, 2), value, np.uint8))
        assert f"{name}/c/0/0" in objects.names()


@pytest.mark.parametrize(
    ("name", "field"), [("topk", "ids"), ("sampled", "ids"), ("sampled", "counts")]
)
def test_a_shard_that_is_lost_under_a_run_is_seen(name, field, tmp_path):
    form = formats.choose(name, vocab=300, embed=D, k=2)
    objects = Objects(str(tmp_path))
    catalog.begin(objects, {"format": form.facts()}, {})
    mask = np.array([True, True, False])
    one = parts.Wanted(segments.key_of(TEXTS[2], np.arange(3)), mask, TEXTS[2].astype(np.int32))
    arrays = {n: np.zeros((2, *shape), dtype) for n, (dtype, shape) in form.fields().items()}
    if name == "sampled":
        arrays["counts"][:] = 1  # both are token 0, which a lost shard must not look like
    parts.write(objects, form, [one], arrays)
    catalog.seal(objects)
    store = Store(str(tmp_path))
    [shard] = [path for path in tmp_path.rglob(f"{field}/c/**/0") if path.is_file()]
    content = shard.read_bytes()
    os.remove(shard)
    with pytest.raises(DamagedError, match=f"{field} lacks numbers"):
        store.reading(0)()
    shard.write_bytes(content)
    assert not Store(str(tmp_path)).reading(0)()["ids"].any()


def test_a_place_that_cannot_be_is_told():
    with pytest.raises(ConfigError, match="begins with gs://, s3://"):
        Objects("ftp://x/y")
    with pytest.raises(ConfigError, match="names no bucket"):
        Objects("gs://")


def test_a_full_disk_is_told_and_leaves_no_part(tmp_path, monkeypatch):
    objects = Objects(str(tmp_path / "c"))
    rows = work.lacking({"train": dataset(TEXTS)}, None)
    wanted = work.wanted_of([rows], [0] * 3, 0)
    arrays = {"hidden": np.concatenate(list(map(answer, wanted)))}

    def full(*arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(
        objects, "_ts", types.SimpleNamespace(open=full, KvStore=objects._ts.KvStore)
    )
    with pytest.raises(StorageError, match="No space left on device: free space there"):
        parts.write(objects, FORM, wanted, arrays)
    assert not parts.whole(objects)


def test_the_key_of_a_segment_is_that_of_its_tokens_and_positions():
    tokens = np.array([1, 2, 3])
    one = segments.key_of(tokens, np.arange(3))
    assert one == segments.key_of(tokens.astype(np.int64), np.arange(3))
    assert one != segments.key_of(tokens, np.arange(1, 4))
    assert one != segments.key_of(tokens[::-1], np.arange(3))
    assert len(one) == segments.KEY_BYTES


def test_the_manifest_is_strict(tmp_path):
    place = tmp_path / "c"
    fill(place, {"train": dataset(TEXTS)})
    sealed = json.loads((place / catalog.MANIFEST).read_text())
    sealed["content"]["rows"] += 1
    (place / catalog.MANIFEST).write_text(json.dumps(sealed))
    with pytest.raises(DamagedError, match="another digest"):
        Store(str(place))


@pytest.mark.parametrize("damage", ["empty", "list", "twice", "nan", "deep", "latin", "type"])
def test_a_damaged_note_is_one_message(damage, tmp_path):
    place = tmp_path / "c"
    fill(place, {"train": dataset(TEXTS)})
    part = sorted(parts.whole(Objects(str(place))))[0]
    readers = {
        catalog.IDENTITY: lambda: catalog.read_identity(Objects(str(place))),
        catalog.MANIFEST: lambda: catalog.read(Objects(str(place))),
        f"{parts.FOLDER}{part}/{parts.NOTE}": lambda: parts.note(Objects(str(place)), part),
    }
    for name, read in readers.items():
        read()
        good = (place / name).read_bytes()
        first = next(iter(json.loads(good)))
        (place / name).write_bytes(
            {
                "empty": b"",
                "list": b"[]",
                "twice": good.replace(b"{", b'{"%s": 0, ' % first.encode(), 1),
                "nan": good.replace(b"{", b'{"x": NaN, ', 1),
                "deep": b"[" * 100_000,
                "latin": b"\xff\xfe{}",
                "type": json.dumps(dict.fromkeys(json.loads(good), 7)).encode(),
            }[damage]
        )
        with pytest.raises(DamagedError, match=f"damaged: {name}"):
            read()
        (place / name).write_bytes(good)
