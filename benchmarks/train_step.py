"""Our training step against PyTorch eager on the same models and tokens, in turn, in one run.

    python -m benchmarks.train_step --torch-python /path/to/python-with-torch

Both train the same student from the same teacher (Llama shapes, random float32 weights that PyTorch
makes and saves and we load): loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), AdamW.
Compilation and two steps come before the clock and before the high-water mark of memory. Both are
also given as multiples of what the step cannot do without, see `benchmarks.floor`.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

from benchmarks import duel, floor

VOCAB, BATCH, LENGTH = 32_000, 4, 256
ALPHA, TEMPERATURE, LEARNING_RATE = 0.5, 2.0, 1e-4
SHAPES = {
    "teacher": {"embed": 512, "layers": 8, "heads": 8, "mlp": 1408},
    "student": {"embed": 256, "layers": 4, "heads": 4, "mlp": 704},
}


def main() -> None:
    """Starts both workers and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker = {"ours": _our_worker, "theirs": _their_worker}[options.worker]
        return worker(options.folder, options.length)
    with tempfile.TemporaryDirectory() as folder:
        common = [
            "-m",
            "benchmarks.train_step",
            "--folder",
            folder,
            "--length",
            str(options.length),
        ]
        theirs = duel.Worker([options.torch_python, *common, "--worker", "theirs"])
        their_facts = theirs.read()
        ours = duel.Worker([sys.executable, *common, "--worker", "ours"])
        our_facts = ours.read()
        result = duel.duel(ours, theirs, options.rounds)
        # In the same run, while neither works: a machine's rates change with its other load.
        least = floor.measure(SHAPES, VOCAB, BATCH, options.length)
        ours.close()
        theirs.close()
    result = {
        "baseline": "PyTorch eager, transformers LlamaForCausalLM",
        "shapes": SHAPES | {"vocab": VOCAB, "batch": BATCH, "length": options.length},
        "ours": our_facts,
        "theirs": their_facts,
        **result,
        "floor": least,
        "over_floor": {who: taken / least["total"] for who, taken in result["seconds"].items()},
    }
    print(json.dumps(result, indent=2))
    difference = abs(our_facts["first_loss"] / their_facts["first_loss"] - 1)
    assert difference < 1e-4, f"the two sides do not compute the same loss: {difference:.1e} apart"
    if options.save:
        print(duel.save(options.save, result))
    return None


def _tokens(length: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCAB, (BATCH, length + 1))


def _their_worker(folder: pathlib.Path, length: int) -> None:
    import torch
    import torch.nn.functional as functional
    import transformers

    torch.manual_seed(0)
    models = {name: _torch_model(shape) for name, shape in SHAPES.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    teacher, student = models["teacher"].eval(), models["student"].train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    tokens = torch.from_numpy(_tokens(length))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]

    def step() -> float:
        with torch.no_grad():
            teacher_logits = teacher(inputs, use_cache=False).logits.float()
        logits = student(inputs, use_cache=False).logits.float()
        ce = functional.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))
        kl = functional.kl_div(
            functional.log_softmax(logits / TEMPERATURE, -1).reshape(-1, VOCAB),
            functional.log_softmax(teacher_logits / TEMPERATURE, -1).reshape(-1, VOCAB),
            reduction="batchmean",
            log_target=True,
        )
        loss = ALPHA * ce + (1 - ALPHA) * TEMPERATURE**2 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    step()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    duel.serve(step, {"first_loss": first, "threads": torch.get_num_threads()} | versions)


def _torch_model(shape: dict):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape["embed"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float()


def _our_worker(folder: pathlib.Path, length: int) -> None:
    import jax
    import numpy as np

    from jaxdistill import models, optim, teachers
    from jaxdistill.methods import kd
    from jaxdistill.sharding import make_mesh
    from jaxdistill.train import state as states
    from jaxdistill.train import step as steps
    from jaxdistill.types import Batch

    mesh = make_mesh()
    load = lambda name: models.load(folder / name, dtype="float32", mesh=mesh, tokenizer=False)
    teacher, student = load("teacher"), load("student")
    objective = kd.objective(vocab=VOCAB)
    signal = teachers.online(teacher.config, compute_dtype="float32")
    tx = optim.optimizer(
        LEARNING_RATE,
        knobs={"alpha": ALPHA, "temperature": TEMPERATURE},
        clip_norm=None,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
    )
    loss = steps.make_loss(student.config, objective, compute_dtype="float32")
    state = states.create(student.params, {}, tx, 0, mesh)
    tokens = _tokens(length)
    ones = np.ones((BATCH, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    batch = steps.place(
        Batch(
            tokens[:, :-1].astype(np.int32),
            tokens[:, 1:].astype(np.int32),
            ones.astype(bool),
            positions,
            ones,
        ),
        mesh,
    )
    began = time.perf_counter()
    program = steps.compiled(steps.make(loss, signal, tx), state, teacher.params, batch, mesh)
    compile_seconds = time.perf_counter() - began
    del student
    held = {"state": state}

    def step() -> float:
        held["state"], means = program(held["state"], teacher.params, batch)
        jax.block_until_ready(held["state"])
        return float(means["loss/total"].value)

    del state
    first = step()
    step()
    memory = program.memory_analysis()
    facts = {"first_loss": first, "jax": jax.__version__, "compile_seconds": compile_seconds}
    facts["temporary_mib"] = round(memory.temp_size_in_bytes / 2**20)
    duel.serve(step, facts)


if __name__ == "__main__":
    main()
