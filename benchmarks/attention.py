"""Attention of long rows on this machine: a small model's gradient, in blocks and all at once.

    python -m benchmarks.attention --save attention_cpu

One row of 1,024 to 4,096 tokens in three documents; both forms take turns, and the least of their
times counts, for other work on the machine only adds to it.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp

from benchmarks import duel
from jaxdistill import models
from jaxdistill.models import architecture, attention, decoder

CONFIG = models.DecoderConfig(
    "llama", vocab_size=512, embed=128, mlp=384, layers=2, heads=4, kv_heads=2, head_dim=32
)
LENGTHS = (1024, 2048, 4096)


def main() -> None:
    """Measures and prints; with --save it also writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    options = parser.parse_args()
    result = {
        "model": {name: getattr(CONFIG, name) for name in ("embed", "mlp", "layers", "heads")},
        "rounds": options.rounds,
        "rows": [row for length in LENGTHS for row in measure(length, options.rounds)],
    }
    print(json.dumps(result, indent=2))
    if options.save:
        print(duel.save(options.save, result))


def measure(length: int, rounds: int) -> list[dict]:
    """A row of the table for each form."""
    params = models.random(CONFIG).params
    tokens = jnp.arange(length)[None] % CONFIG.vocab_size
    segments = jnp.minimum(1 + jnp.arange(length)[None] * 3 // length, 3)
    programs = {}
    for form in ("blocks", "at once"):
        name = "blocks" if form == "blocks" else "xla"
        short, attention.attention_blocks.SHORT = attention.attention_blocks.SHORT, 10**9

        def loss(params, name=name):
            outputs = decoder.apply(
                CONFIG, params, tokens, segment_ids=segments, compute_dtype="float32",
                attention=name,
            )  # fmt: skip
            return jnp.mean(jnp.square(outputs.hidden))

        programs[form] = jax.jit(jax.grad(loss)).lower(params).compile()
        attention.attention_blocks.SHORT = short
        jax.block_until_ready(programs[form](params))
    seconds = {form: [] for form in programs}
    for _ in range(rounds):
        for form, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(params))
            seconds[form].append(time.perf_counter() - began)
    flops = 3 * length * architecture.forward_flops_per_token(CONFIG, length)
    return [
        {
            "tokens": length,
            "form": form,
            "seconds": min(seconds[form]),
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "model_flops": flops,
        }
        for form, program in programs.items()
    ]


if __name__ == "__main__":
    main()
