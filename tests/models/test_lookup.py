"""The rows of an embedding table, beside `jnp.take` and JAX's own gradient of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.lookup import take


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_and_their_gradient_are_those_of_take(dtype):
    rng = np.random.default_rng(0)
    table, by_rows = (jnp.asarray(rng.normal(size=s), dtype) for s in ((7, 5), (2, 4, 5)))
    ids = jnp.asarray([[3, 3, 0, 6], [3, 9, 6, -1]])  # twice the same, beyond, and from the end
    run = lambda function: jax.vjp(lambda table: function(table, ids), table)
    (found, pull), (want, own_pull) = run(take), run(lambda t, i: jnp.take(t, i, axis=0))
    wide = lambda x: np.asarray(x, np.float32)
    np.testing.assert_array_equal(wide(found), wide(want))
    np.testing.assert_array_equal(wide(pull(by_rows)[0]), wide(own_pull(by_rows)[0]))
    assert np.isnan(wide(found)[1, 1]).all()  # as JAX has it, for no row


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the XLA of jax 0.10 places it so in either case"
)
def test_the_gradient_of_the_table_is_not_held_through_the_step():
    rows, width, tokens, vocab = 8192, 64, 64, 32_768
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    arguments = shape(rows, width), shape(width, vocab), shape(tokens, dtype=jnp.int32)

    def temporaries(function):
        def update(table, head, ids):
            loss = lambda t: jnp.sum(jax.nn.logsumexp(function(t, ids) @ head, axis=1))
            return table - 0.1 * jax.grad(loss)(table)

        compiled = jax.jit(update, donate_argnums=0).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    of_jax = temporaries(lambda table, ids: jnp.take(table, ids, axis=0))
    assert temporaries(take) <= of_jax - rows * width * 4
