"""Values and gradients of the losses on the device at hand, beside their definition in float64.

Rows are apart from each other, so a few of them are enough of a reference, at any size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import kernels
from jaxdistill.kernels import choice
from jaxdistill.kernels import statistics as stats
from jaxdistill.kernels.operands import Coefficients
from jaxdistill.kernels.tiling import Tiling

TEMPERATURES = (0.3, 0.7, 1.0, 2.0)


def interpreter() -> Any:
    """JAX's interpreter of GPU kernels where it has one; on a GPU itself nothing interprets."""
    if choice.current_device().platform == "gpu":
        return None
    try:
        from jax.experimental.pallas import mosaic_gpu as plgpu
    except ImportError:
        return None
    return plgpu.InterpretGPUParams() if hasattr(plgpu, "InterpretGPUParams") else None


def statistics(tokens: int, vocab: int, split: int) -> dict[str, Any]:
    """All statistics of the kernel, with a first tile and last columns of nothing possible."""
    from jaxdistill.kernels import mosaic_gpu

    student, teacher = (_spoiled(x) for x in _logits(tokens, vocab, "float32"))
    names, worst = (*stats.MOMENTS, stats.ECHO), 0.0

    @jax.jit
    def measured(student, teacher, temperature):
        coefficients = Coefficients(jnp.float32(0), temperature)
        logits = {"s": student, "t": teacher}
        return mosaic_gpu.statistics(
            names, logits, coefficients, Tiling(64, 2, split), interpreter()
        )

    for temperature in TEMPERATURES:
        measures = measured(student, teacher, jnp.float32(temperature))
        picked = _some(tokens)
        with jax.enable_x64(True):
            logits = {
                model: jnp.maximum(jnp.asarray(np.float64(x[picked])), stats.LOWEST)
                for model, x in (("s", student), ("t", teacher))
            }
            want = stats.in_passes(names, logits, stats.Scales(1 / temperature, 1.0))
        for name in names:
            error = np.abs(np.asarray(measures[name], np.float64)[picked] - np.asarray(want[name]))
            worst = max(worst, float((error / (1 + np.abs(want[name]))).max()))
    return {"ok": worst < 1e-5, "error": worst}


def dense(kind: str, dtype: str, tokens: int, vocab: int) -> dict[str, Any]:
    """Value and gradients of `divergence` at every temperature, with impossible entries."""
    student, teacher = (_spoiled(x) for x in _logits(tokens, vocab, dtype))
    labels = 64 + jnp.arange(tokens) % (vocab - 67)  # of possible entries
    picked = _some(tokens)

    def total(student, temperature, teacher, labels, implementation):
        values = kernels.divergence(
            student, teacher, kind=kind, labels=labels, alpha=0.3, temperature=temperature,
            implementation=implementation,
        )  # fmt: skip
        return jnp.sum(values), values

    run = jax.jit(
        jax.value_and_grad(total, argnums=(0, 1), has_aux=True), static_argnames="implementation"
    )
    chosen = choice.choose(None, vocab, dtype, tokens=tokens)
    errors = _Errors(dtype)
    for temperature in TEMPERATURES:
        T = jnp.full(tokens, temperature) if chosen == "xla" else jnp.float32(temperature)
        (_, values), (slope, by_t) = run(student, T, teacher, labels, implementation=chosen)
        with jax.enable_x64(True):
            wide = (jnp.asarray(np.float64(x[picked])) for x in (student, teacher))
            s, t = wide
            (_, want), (exact, exact_t) = run(
                s, jnp.full(len(picked), temperature), t, labels[picked],
                implementation=choice.REFERENCE,
            )  # fmt: skip
        errors.value(np.asarray(values)[picked], want)
        errors.slope(np.asarray(slope)[picked], exact)
        if chosen == "xla":
            errors.by_temperature(np.asarray(by_t)[picked], exact_t)
    return errors.facts() | {"implementation": chosen}


def head_loss(
    tokens: int, vocab: int, width: int, taid_t: float | None, at_one: bool
) -> dict[str, Any]:
    """Value and all gradients of `linear_divergence`, some tokens masked; or at a known T = 1."""
    hidden, head = _states_and_head(1, tokens, vocab, width)
    teacher_hidden, teacher_head = _states_and_head(2, tokens, vocab, width)
    labels = jnp.where(jnp.arange(tokens) % 5 == 0, -100, jnp.arange(tokens) % vocab)
    mask = jnp.arange(tokens) % 7 > 0

    def loss(hidden, head, temperature, teacher_hidden, teacher_head, implementation):
        return kernels.linear_divergence(
            hidden, head, teacher_hidden, teacher_head, labels=labels, mask=mask, alpha=0.4,
            temperature=1.0 if at_one else temperature, taid_t=taid_t, label_smoothing=0.1,
            implementation=implementation,
        )[0]  # fmt: skip

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnames="implementation")
    errors = _Errors("float32")
    arrays = (hidden, head, teacher_hidden, teacher_head)
    with jax.default_matmul_precision("highest"):
        for temperature in (1.0,) if at_one else TEMPERATURES:
            h, w, ht, wt = arrays
            value, slopes = run(h, w, jnp.float32(temperature), ht, wt, implementation=None)
            with jax.enable_x64(True):
                h, w, ht, wt = (jnp.asarray(np.float64(x)) for x in arrays)
                T = jnp.float64(temperature)
                want, exact = run(h, w, T, ht, wt, implementation=choice.REFERENCE)
            errors.value(np.asarray(value), want)
            for got, expected in zip(slopes[:2], exact[:2], strict=True):
                errors.slope(np.asarray(got), expected)
            errors.by_temperature(np.asarray(slopes[2]), exact[2])
    return errors.facts()


def logprobs(tokens: int, vocab: int, width: int) -> dict[str, Any]:
    """Every number of `linear_logprobs`, and all gradients of their sum, some tokens masked."""
    arrays = _states_and_head(1, tokens, vocab, width)
    ids, mask = jnp.arange(tokens) * 7 % vocab, jnp.arange(tokens) % 7 > 0

    def total(hidden, head, temperature, implementation):
        said = kernels.linear_logprobs(
            hidden, head, ids, mask=mask, sets=[range(3, 9)], top_k=2, temperature=temperature,
            implementation=implementation,
        )  # fmt: skip
        numbers = (x for x in jax.tree.leaves(said) if jnp.issubdtype(x.dtype, jnp.floating))
        return sum(jnp.sum(x) for x in numbers), said

    run = jax.jit(
        jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True), static_argnames="implementation"
    )
    errors = _Errors("float32")
    with jax.default_matmul_precision("highest"):
        for temperature in TEMPERATURES:
            (_, said), slopes = run(*arrays, jnp.float32(temperature), implementation=None)
            with jax.enable_x64(True):
                wide = (*(jnp.asarray(np.float64(x)) for x in arrays), jnp.float64(temperature))
                (_, want), exact = run(*wide, implementation=choice.REFERENCE)
            for got, expected in zip(said, want, strict=True):
                errors.value(np.asarray(got), expected)
            for got, expected in zip(slopes[:2], exact[:2], strict=True):
                errors.slope(np.asarray(got), expected)
            errors.by_temperature(np.asarray(slopes[2]), exact[2])
    return errors.facts()


def _states_and_head(seed: int, tokens: int, vocab: int, width: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return draw(tokens, width), draw(vocab, width) / np.sqrt(width)


class _Errors:
    """The largest errors of a part, each beside what its dtype allows."""

    def __init__(self, dtype: str):
        self._eps = float(jnp.finfo(dtype).eps)
        self._found = {"value": 0.0, "slope": 0.0, "temperature": 0.0}
        self._ok = True

    def value(self, got: Any, want: Any) -> None:
        want = np.asarray(want)
        self._add("value", np.abs(np.float64(got) - want) / (1 + np.abs(want)), 1e-5)

    def slope(self, got: Any, want: Any, ulps: int = 2) -> None:
        want = np.asarray(want)
        error = np.abs(np.asarray(got, np.float64) - want) / max(np.abs(want).max(), 1e-30)
        self._add("slope", error, max(ulps * self._eps, 2e-5))

    def by_temperature(self, got: Any, want: Any) -> None:
        want = np.asarray(want)
        self._add("temperature", np.abs(np.float64(got) - want) / (1 + np.abs(want)), 1e-3)

    def _add(self, name: str, error: Any, most: float) -> None:
        largest = float(np.max(error))
        self._ok = self._ok and largest <= most  # false for NaN
        self._found[name] = max(self._found[name], largest) if largest == largest else largest

    def facts(self) -> dict[str, Any]:
        return {"ok": self._ok, "error": self._found}


def _logits(tokens: int, vocab: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(tokens), 2)
    draw = lambda key: 3 * jax.random.normal(key, (tokens, vocab), jnp.float32)
    return draw(keys[0]).astype(dtype), draw(keys[1]).astype(dtype)


def _spoiled(logits: jax.Array) -> jax.Array:
    """With a first tile and a tail of impossible entries, as a shard or padding has them."""
    return logits.at[:, :64].set(-jnp.inf).at[:, -3:].set(-jnp.inf)


def _some(tokens: int) -> np.ndarray:
    """Rows that are compared: the first, the last, and those at the edge of a tile."""
    wanted = {0, 1, 63, 64, tokens // 2, tokens - 2, tokens - 1}
    return np.array(sorted(row for row in wanted if 0 <= row < tokens))
