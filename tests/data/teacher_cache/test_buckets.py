"""A store behind gs:// and s3://: the same objects, the same checks."""

import numpy as np
import pytest

from jaxdistill.data.teacher_cache import taught
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import DamagedError
from tests.data import fake_buckets
from tests.data.teacher_cache.test_store import TEXTS, Words, dataset, files, fill


@pytest.fixture(params=["gs", "s3"])
def bucket(request, monkeypatch):
    """(URL, objects) of a bucket in this process."""
    with fake_buckets.running(request.param, monkeypatch) as bucket:
        yield f"{bucket.url}/a/b", bucket.objects


def content(objects):
    """Name -> bytes, without the path of the store."""
    bare = lambda stored: stored[0] if isinstance(stored, tuple) else stored
    return {name.removeprefix("a/b/"): bare(stored) for name, stored in objects.items()}


def test_a_bucket_holds_what_a_folder_holds(bucket, tmp_path):
    url, objects = bucket
    data = dataset(TEXTS)
    store = fill(url, {"train": data})
    fill(tmp_path / "c", {"train": data})
    assert content(objects) == files(tmp_path / "c")
    here = taught.beside(data, Store(str(tmp_path / "c")), Words())
    there = taught.beside(data, store, Words())
    for row in range(3):
        ours, theirs = (one[row]["teacher"]["hidden"] for one in (there, here))
        np.testing.assert_array_equal(ours.view(np.uint16), theirs.view(np.uint16))
    name = next(name for name in objects if "/hidden/c/" in name)
    del objects[name]
    with pytest.raises(DamagedError, match="is missing since it was captured"):
        Store(url)
