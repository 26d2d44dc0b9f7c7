"""Tilings of the kernel: what is tuned is what training and `divergence` look up."""

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.bench import tune
from jaxdistill.bench.shapes import LISTS
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice, divergence, linear_divergence, linear_logprobs, tiling

H100 = choice.Device("gpu", "NVIDIA H100 80GB HBM3")
if jax.__version_info__ < (0, 11):
    pytest.skip("Pallas kernels for GPUs need jax 0.11", allow_module_level=True)


KINDS = ("forward_kl", "generalized_jsd", "taid")


@pytest.mark.parametrize("name", ["llama-3", "gpt-2"])
def test_every_kernel_of_a_loss_finds_its_entry(name, monkeypatch):
    """Traced for a described GPU: no key is looked up that was not tuned, and none for nothing."""
    monkeypatch.setattr(choice, "current_device", lambda: H100)
    shape = next(shape for shape in LISTS["full"] if shape.name == name)
    looked_up, right = set(), tiling.key

    def key(*problem):
        looked_up.add(right(*problem))
        return right(*problem)

    tuned = {problem.key(H100) for problem in tune.problems(shape, KINDS)}
    monkeypatch.setattr(tiling, "key", key)
    array = lambda *dims: jax.ShapeDtypeStruct(dims, shape.dtype)
    tokens, vocab = shape.tokens, shape.vocab
    ids = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    student = array(tokens, shape.student), array(vocab, shape.student)
    teacher = array(tokens, shape.teacher), array(vocab, shape.teacher)
    known = jax.ShapeDtypeStruct((tokens, 4), jnp.int32), array(tokens, 4)
    monitor = jax.ShapeDtypeStruct((), bool)
    traced = lambda function, *arrays: jax.eval_shape(function, *arrays)

    def head(hidden, head, taught, teacher, given, monitor, **options):
        more = {"labels": given, "alpha": 0.5, "monitor": monitor, "temperature": 2.0} | options
        return linear_divergence(hidden, head, taught, teacher, **more)

    both = ({}, {"labels": None, "alpha": 0.0})
    for options in (*both, {"kind": "generalized_jsd"}, {"taid_t": 0.5, "temperature": 1.0}):
        traced(lambda *x, o=options: head(*x, **o), *student, *teacher, ids, monitor)
    traced(lambda *x: head(*x[:2], None, None, *x[2:], alpha=1.0), *student, ids, monitor)
    for options in both:
        with_known = lambda *x, o=options: head(
            *x[:2], None, None, *x[2:4], teacher_ids=x[4], teacher_logprobs=x[5], **o
        )
        traced(with_known, *student, ids, monitor, *known)
    shared = {"student_columns": jnp.arange(9), "teacher_columns": jnp.arange(9)}
    traced(lambda *x: head(*x, **shared), *student, *teacher, ids, monitor)
    traced(linear_logprobs, *student, ids)
    if vocab % 64 == 0:
        for kind in ("forward_kl", "generalized_jsd"):
            dense = lambda s, t, k=kind: divergence(s, t, temperature=2.0, kind=k)
            traced(dense, *[array(tokens, vocab)] * 2)
    assert looked_up <= tuned
    assert len(looked_up) == (11 if vocab % 64 == 0 else 8)
    # What is tuned and not traced above: divergences without labels, of given logits with them.
    assert len(tuned - looked_up) <= 5


def test_a_kind_that_is_none_is_named():
    with pytest.raises(ConfigError, match="kind = 'kl': must be one of"):
        list(tune.problems(LISTS["full"][0], ("kl",)))


def test_a_dozen_programs_are_compiled_for_a_problem():
    for shape in LISTS["full"]:
        for problem in tune.problems(shape):
            found = tune.candidates(problem, H100)
            assert 4 <= len(found) <= 13
            assert found[0] == tiling.heuristic(
                problem.tokens, problem.vocab, problem.dtype, H100.kind,
                problem.values, problem.models,
            )  # fmt: skip


def test_where_no_kernel_runs_there_is_nothing_to_tune(tmp_path):
    with pytest.raises(ConfigError, match="nothing to tune"):
        tune.tune(str(tmp_path / "table.json"), LISTS["quick"], 1, print)


def test_a_table_is_read_by_the_whole_problem(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    entry = tiling.Tiling(128, 2, 5)
    tiling.save(path, {tiling.key(1024, 640, "bfloat16", H100.kind, 9, 2): entry})
    monkeypatch.setenv(tiling.TABLE_VARIABLE, str(path))
    tiling._table.cache_clear()
    assert tiling.tiling(1100, 640, "bfloat16", H100.kind, 9, 2) == entry
    assert tiling.tiling(1100, 640, "bfloat16", H100.kind, 5, 2) != entry
    assert tiling.tiling(1100, 640, "bfloat16", H100.kind, 9, 1) != entry
    tiling._table.cache_clear()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a": {}}', '{"a": {"columns": 64, "stages": 4, "split": true}}',
     '{"a": {"columns": 64, "stages": 4, "split": 1}, "a": {"columns": 64, "stages": 4}}',
     '{"a": {"columns": 65, "stages": 4, "split": 1}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_table_is_one_message(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ConfigError, match="not a table of tilings"):
        tiling.load(tmp_path / "table.json")
