"""Tilings of the kernel: what is tuned is what training and `divergence` look up."""

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.bench import tune
from jaxdistill.bench.shapes import LISTS
from jaxdistill.errors import ConfigError
from jaxdistill.kernels import choice, divergence, linear_divergence, linear_logprobs, tiling
from jaxdistill.kernels import statistics as stats

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

    both = ({}, {"labels": None, "alpha": 0.0}, {"temperature": 1.0})
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
    carried = {key.rsplit("|", 1)[1] for key in looked_up}
    at_one = "echo+gap_z+self_s+self_z+sum_s+sum_z"  # each sum once, the metrics' among them
    assert {"2 models, gap_z+sum_s+sum_s1+sum_z", f"2 models, {at_one}"} <= carried
    assert len(looked_up) == (16 if vocab % 64 == 0 else 13)
    # What is tuned and not traced above, such as metrics beside known tokens at other temperatures.
    assert len(tuned - looked_up) <= 5


def test_a_kind_that_is_none_is_named():
    with pytest.raises(ConfigError, match="kind = 'kl': must be one of"):
        list(tune.problems(LISTS["full"][0], ("kl",)))


def test_a_dozen_programs_are_compiled_for_a_problem():
    for shape in LISTS["full"]:
        for problem in tune.problems(shape):
            found = tune.candidates(problem, H100)
            assert 4 <= len(found) <= 13
            sizes = (problem.tokens, problem.vocab, problem.dtype, H100.kind)
            assert found[0] == tiling.heuristic(*sizes, problem.work)


KL = ("sum_s", "sum_z", "gap_z")
TWO_BLOCKS = tiling.Tiling(64, 4, 16)


@pytest.mark.parametrize(
    ("work", "gpu", "dtype", "tiling_"),
    [
        # 147 registers of 128 threads: 3 blocks on each of 132 multiprocessors, 16 to a row.
        (tiling.Work(KL), "H100", "bfloat16", tiling.Tiling(64, 4, 24)),
        (tiling.Work(("sum_s1", *KL)), "H100", "bfloat16", TWO_BLOCKS),  # 182: 2
        (tiling.Work((*KL, "self_z"), mixed=True), "H100", "bfloat16", tiling.Tiling(64, 4, 24)),
        (tiling.Work((*KL, "self_s", "self_z", stats.ECHO)), "H100", "bfloat16", TWO_BLOCKS),
        (tiling.Work(("generalized_jsd",)), "H100", "bfloat16", TWO_BLOCKS),  # 187
        (tiling.Work(("total_variation",)), "H100", "bfloat16", tiling.Tiling(64, 4, 24)),  # 89
        (tiling.Work(("sum_s", "self_s"), 1), "H100", "bfloat16", tiling.Tiling(64, 4, 33)),
        (tiling.Work(("sum_s", "sum_s1"), 1), "H100", "bfloat16", tiling.Tiling(64, 4, 24)),
        # 227 KiB hold two tiles of either model of float32 for each of 3 blocks, 164 KiB three.
        (tiling.Work(KL), "H100", "float32", tiling.Tiling(64, 2, 24)),
        (tiling.Work(KL), "A100", "bfloat16", tiling.Tiling(64, 3, 20)),
        (tiling.Work(KL), "A100", "float32", tiling.Tiling(64, 2, 13)),
    ],
)  # fmt: skip
def test_as_many_blocks_share_a_row_as_run_at_one_time(work, gpu, dtype, tiling_):
    found = tiling.heuristic(1024, 128_256, dtype, f"NVIDIA {gpu}", work)
    assert found == tiling_
    each = work.models * found.stages * 64 * 64 * (4 if dtype == "float32" else 2) + 2048
    blocks = found.split * 16 // tiling.GPUS[gpu].multiprocessors
    assert blocks * each <= tiling.GPUS[gpu].shared_memory


def test_where_no_kernel_runs_there_is_nothing_to_tune(tmp_path):
    with pytest.raises(ConfigError, match="nothing to tune"):
        tune.tune(str(tmp_path / "table.json"), LISTS["quick"], 1, print)


def test_a_table_is_read_by_the_whole_problem(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    entry = tiling.Tiling(128, 2, 5)
    work = tiling.Work(("sum_s", "sum_z", "gap_z", "sum_s1"))
    problem = ("bfloat16", H100.kind)
    tiling.save(path, {tiling.key(1024, 640, *problem, work): entry})
    monkeypatch.setenv(tiling.TABLE_VARIABLE, str(path))
    tiling._table.cache_clear()
    found = lambda work: tiling.tiling(1100, 640, *problem, work)
    assert found(work) == found(work._replace(sums=work.sums[::-1])) == entry
    for other in (
        work._replace(sums=work.sums[:3]),
        work._replace(sums=(*work.sums[:3], "gap_s")),  # as many, of one temperature
        work._replace(models=1),
        work._replace(mixed=True),
    ):
        assert found(other) != entry
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
