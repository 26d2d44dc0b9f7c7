"""What formats hold: ids, sizes, rounding, and what no format takes."""

import math

import ml_dtypes
import numpy as np
import pytest

from jaxdistill.data.teacher_cache import formats
from jaxdistill.errors import ConfigError


@pytest.mark.parametrize(("width", "ids"), [(2, [0, 65_535]), (3, [0, 65_536, 131_072, 2**24 - 1])])
def test_ids_of_two_and_three_bytes_come_back(width, ids):
    packed = formats.pack_ids(np.array([ids]), width)
    assert packed.shape == (1, len(ids), width)
    np.testing.assert_array_equal(formats.unpack_ids(packed), [ids])


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("hidden", {"vocab": 49152, "embed": 2048}, 4096),
        ("hidden", {"vocab": 49152, "embed": 2048, "dtype": "int8"}, 2050),
        ("topk", {"vocab": 65536, "embed": 8, "k": 50}, 50 * 4 + 4),
        ("topk", {"vocab": 65537, "embed": 8, "k": 50, "temperatures": (2.0,)}, 50 * 5 + 12),
        ("topk", {"vocab": 128_256, "embed": 8}, 64 * 5 + 4),
        ("sampled", {"vocab": 128_256, "embed": 8}, 50 * 4 + 2),
        ("sampled", {"vocab": 128_256, "embed": 8, "draws": 4}, 4 * 50 * 4 + 2),
    ],
)
def test_bytes_of_a_token(name, options, size):
    assert formats.choose(name, **options).bytes_per_token() == size


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("topk", {"k": 301}, "k = 301: the vocabulary has 300"),
        ("hidden", {"k": 3}, "k = 3: belongs to format topk or sampled"),
        ("hidden", {"temperatures": (2.0,)}, "belongs to format topk"),
        ("topk", {"draws": 2}, "draws = 2: belongs to format sampled"),
        ("topk", {"dtype": "int8"}, "dtype = int8: topk holds float16, float32"),
        ("sampled", {"k": 70_000}, "at most 65535"),
    ],
)
def test_settings_that_do_not_fit(name, options, words):
    with pytest.raises(ConfigError, match=words):
        formats.choose(name, vocab=300, embed=8, **options)


def test_whole_numbers_of_hidden_states_are_within_half_a_scale():
    hidden = np.random.default_rng(0).normal(size=(50, 64)) * 10.0 ** np.arange(-25, 25)[:, None]
    hidden = hidden.astype(np.float32)
    whole, scale = formats.quantised(hidden)
    wide = scale.astype(np.float64)[:, None]
    assert np.abs(whole).max() <= 127
    assert np.abs(whole).max(axis=1).min() >= 126  # the scale is no larger than it must be
    assert (np.abs(whole * wide - hidden) <= 0.5000001 * wide).all()
    zero, none = formats.quantised(np.zeros((1, 4), np.float32))
    assert not zero.any() and not none.astype(np.float32).any()


def test_float16_keeps_a_log_probability_to_what_is_promised():
    logp = -np.linspace(0, 16, 10_001)[:-1]
    error = np.abs(logp.astype(np.float16).astype(np.float64) - logp)
    for below, bound in ((4, 2.0**-10), (8, 2.0**-9), (16, 2.0**-8)):
        assert error[-logp < below].max() <= bound
    assert math.isclose(np.exp(error[-logp < 4].max()) - 1, 0.001, rel_tol=0.05)


def test_numbers_that_were_never_written_are_seen():
    form = formats.choose("topk", vocab=300, embed=8)
    assert form.unsound("logprobs", np.array([[np.nan]], np.float16))
    assert not form.unsound("logprobs", np.array([[-1.0]], np.float16))
    assert form.unsound("ids", formats.pack_ids(np.array([[299, 300]]), 2))
    assert not form.unsound("ids", formats.pack_ids(np.array([[299, 0]]), 2))
    hidden = formats.choose("hidden", vocab=300, embed=8)
    assert hidden.unsound("hidden", np.array([[np.inf]], ml_dtypes.bfloat16))
    drawn = formats.choose("sampled", vocab=300, embed=8, k=5)
    assert drawn.unsound("counts", np.array([[[0, 0]]], np.uint8))
    assert not drawn.unsound("counts", np.array([[[3, 2]]], np.uint8))


def test_each_epoch_has_its_draw():
    form = formats.choose("sampled", vocab=300, embed=8, k=5, draws=3)
    row = {name: np.zeros((7, *shape), dtype) for name, (dtype, shape) in form.fields().items()}
    row["counts"][:] = np.arange(3)[None, :, None]
    for epoch in range(7):
        carried = form.in_epoch(row, epoch)
        assert (carried["counts"] == epoch % 3).all()
        for name, (dtype, shape) in form.batch_fields().items():
            assert carried[name].shape == (7, *shape) and carried[name].dtype == dtype


def test_facts_come_back():
    form = formats.choose("topk", vocab=300, embed=8, k=7, temperatures=(3.0, 1.0, 2.0, 2.0))
    assert form.temperatures == (2.0, 3.0)
    assert formats.of_facts(form.facts()) == form
