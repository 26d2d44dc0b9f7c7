"""The floor of a training step: the products it counts, and what it makes of a machine's rates."""

import pytest

from benchmarks import floor

SHAPES = {
    "teacher": {"embed": 32, "layers": 2, "heads": 4, "mlp": 48},
    "student": {"embed": 16, "layers": 1, "heads": 2, "mlp": 24},
}
VOCAB, BATCH, LENGTH = 64, 2, 8
ALL = SHAPES, VOCAB, BATCH, LENGTH


def flops(shape, times):
    """2 tokens weights, and 4 batch length^2 embed in each layer's attention."""
    inside = shape["layers"] * (4 * shape["embed"] ** 2 + 3 * shape["embed"] * shape["mlp"])
    of_weights = 2 * BATCH * LENGTH * (inside + VOCAB * shape["embed"])
    attention = 4 * BATCH * LENGTH**2 * shape["embed"] * shape["layers"]
    return times * (of_weights + attention)


def test_the_products_are_the_teachers_once_and_the_students_three_times():
    found = floor.products(*ALL)
    total = sum(2 * times * rows * k * n for (rows, k, n), times in found.items())
    assert total == flops(SHAPES["teacher"], 1) + flops(SHAPES["student"], 3)


def test_each_part_is_taken_at_its_best_rate():
    """With every product 2 ms by one maker and 3 by the other; the first round is disturbed."""
    least = floor.Floor(*ALL)
    first = [True]

    def clock(seconds):
        return lambda: 9.0 if first[0] else seconds

    clocks = {part: {"numpy": 0.003, "xla": 0.002} for part in floor.products(*ALL)}
    clocks |= {"exponential": {"numpy": 5e-9, "xla": 7e-9}, "byte": {"copy": 3e-9}}
    for part, makers in clocks.items():
        assert least.clocks[part].keys() == makers.keys()
        least.clocks[part] = {name: clock(seconds) for name, seconds in makers.items()}
    for first[0] in (True, False, False):
        least.measure()
    found = least.result()
    assert found["products"] == pytest.approx(0.002 * floor.products(*ALL).total())
    assert found["fastest_for_shapes"] == {"xla": len(floor.products(*ALL))}
    assert found["exponentials"] == pytest.approx(3 * 16 * 64 * 5e-9)
    student = 4 * 16**2 + 3 * 16 * 24 + 2 * 64 * 16
    assert found["optimizer"] == pytest.approx(28 * student * 3e-9)
    assert found["total"] == sum(found[part] for part in ("products", "exponentials", "optimizer"))
    teacher = 2 * (4 * 32**2 + 3 * 32 * 48) + 2 * 64 * 32
    assert found["held_mib"] == 4 * (teacher + 4 * student) / 2**20


def test_rates_are_those_of_one_product_exponential_and_byte():
    """A clock divides by what its call makes, and torch's is asked for the product by its shape."""

    class Torch:
        def ask(self, words):
            return {"seconds": float(len(words))}

    least = floor.Floor(*ALL, Torch())
    shapes = [part for part in least.clocks if isinstance(part, tuple)]
    for shape in shapes:
        assert least.clocks[shape]["torch"]() == len(" ".join(map(str, shape)))
    assert 1e-11 < least.clocks["byte"]["copy"]() < 1e-6
    assert 1e-12 < least.clocks["exponential"]["numpy"]() < 1e-6


@pytest.mark.parametrize(
    ("flags", "bits"), [("fma avx2 avx512f", 512), ("sse2 avx2", 256), ("fp asimd", 128)]
)
def test_the_width_of_vectors_is_read(tmp_path, flags, bits):
    path = tmp_path / "cpuinfo"
    path.write_text(f"flags\t: fpu {flags}\n")
    assert floor.vector_bits(path) == bits
    assert floor.vector_bits(tmp_path / "none") is None
