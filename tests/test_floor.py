"""The floor of a training step: the products it counts, and what it makes of a machine's rates."""

import pytest

from benchmarks import floor

SHAPES = {
    "teacher": {"embed": 32, "layers": 2, "heads": 4, "mlp": 48},
    "student": {"embed": 16, "layers": 1, "heads": 2, "mlp": 24},
}
VOCAB, BATCH, LENGTH = 64, 2, 8


def flops(shape, times):
    """2 tokens weights, and 4 batch length^2 embed in each layer's attention."""
    inside = shape["layers"] * (4 * shape["embed"] ** 2 + 3 * shape["embed"] * shape["mlp"])
    of_weights = 2 * BATCH * LENGTH * (inside + VOCAB * shape["embed"])
    attention = 4 * BATCH * LENGTH**2 * shape["embed"] * shape["layers"]
    return times * (of_weights + attention)


def test_the_products_are_the_teachers_once_and_the_students_three_times():
    found = floor.products(SHAPES, VOCAB, BATCH, LENGTH)
    total = sum(2 * times * rows * k * n for (rows, k, n), times in found.items())
    assert total == flops(SHAPES["teacher"], 1) + flops(SHAPES["student"], 3)


def test_each_part_is_taken_at_its_best_rate(monkeypatch):
    """With every product 2 ms by one maker and 3 by the other, 1 s per block of exponentials."""

    def in_turn(makers):
        if "copy" in makers:
            return {"copy": 2.0}
        first, second = (0.002, 0.003) if len(makers) == 3 else (1.0, 4.0)
        return {"numpy": first, "xla": second}

    monkeypatch.setattr(floor, "_in_turn", in_turn)
    monkeypatch.setattr(floor, "_makers", lambda *_: dict.fromkeys(("numpy", "xla", "torch")))
    found = floor.measure(SHAPES, VOCAB, BATCH, LENGTH)
    count = sum(floor.products(SHAPES, VOCAB, BATCH, LENGTH).values())
    assert found["products"] == pytest.approx(0.002 * count)
    assert found["exponentials"] == pytest.approx(3 * 16 * 64 / (64 * 2**16))
    weights = 4 * 16**2 + 3 * 16 * 24 + 2 * 64 * 16
    assert found["optimizer"] == pytest.approx(28 * weights * 2.0 / (2 * 4 * 2**25))
    assert found["total"] == sum(found[part] for part in ("products", "exponentials", "optimizer"))


@pytest.mark.parametrize(
    ("flags", "bits"), [("fma avx2 avx512f", 512), ("sse2 avx2", 256), ("fp asimd", 128)]
)
def test_the_width_of_vectors_is_read(tmp_path, flags, bits):
    path = tmp_path / "cpuinfo"
    path.write_text(f"flags\t: fpu {flags}\n")
    assert floor.vector_bits(path) == bits
    assert floor.vector_bits(tmp_path / "none") is None
