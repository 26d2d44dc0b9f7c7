"""Where the time of an on-policy update goes, and the rate of its answers beside transformers.

    python -m benchmarks.on_policy --torch-python PYTHON --save on_policy_cpu   # on a quiet machine
    python -m benchmarks.on_policy --tiny                                       # no claim

The quickstart's models: SmolLM2-135M-Instruct and 22 of its 30 layers. One update is timed part by
part: handing the weights to the decoder, writing, packing, the teacher's reading alone (timed
beside the update, not part of it), and the compiled step, which reads and updates. Where PYTHON has
torch, transformers' `generate` answers the same prompts with the same student afterwards, in a
process of its own.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import duel

TINY = (
    "teacher={random: {layers: 4, embed: 64, mlp: 128, heads: 4}, dtype: float32}",
    "student={random: {layers: 2, embed: 64, mlp: 128, heads: 4}, compute_dtype: float32}",
    "tokenizer.from=bytes",
)
ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    """Times the parts of some updates, and transformers' answers where it is installed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="random models, to see that it runs")
    parser.add_argument("--prompts", type=int, default=16, help="answered in an update")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-python", metavar="PYTHON", help="a Python that has torch")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--asked", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.asked:
        return print(json.dumps(_generate(options.asked, options.tokens, options.rounds)))
    if options.tiny:
        options.prompts, options.tokens, options.rounds = 4, 8, 2
    with tempfile.TemporaryDirectory() as name:
        result = _measured(pathlib.Path(name), options)
    print(json.dumps(result, indent=1))
    if options.save:
        print(duel.save(options.save, result))


def _measured(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    from jaxdistill import config as configs
    from jaxdistill.rollouts import rows
    from jaxdistill.run import on_policy, participants, setup, states, texts
    from jaxdistill.train import step as steps

    asked = folder / "prompts.jsonl"
    questions = [f"Explain in one sentence what number {n} is used for." for n in range(64)]
    asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    config = configs.load(
        ROOT / "configs" / "quickstart.yaml",
        (
            "data.train=[]",
            f"data.prompts=[{{path: {asked}}}]",
            "method={name: reverse_kd, alpha: 0.0}",
            f"train={{steps: 1000, batch_size: {options.prompts}, log_every: 1000}}",
            f"rollout={{prompts_per_step: {options.prompts}, max_new_tokens: {options.tokens}}}",
            "eval={compare: false}",
            *(TINY if options.tiny else ()),
        ),
    )
    mesh = setup.mesh_of(config)
    models = participants.load_models(config, participants.shapes_of(config, mesh), mesh)
    method = setup.method_of(config, models)
    state = states.create(config, models.student, method.objective, method.tx, mesh)
    prompts = texts.prompts_of(config.data, config.data.seq_len - options.tokens, models.tokenizer)
    assert models.teacher is not None
    feed = on_policy.feed_of(
        config,
        models,
        prompts,
        mesh,
        asked=method.asked,
        corpus=None,
        folder=folder,
        params_of=lambda state: state.params["student"],
        left_out=lambda: (),
        stop=lambda: False,
        hooks=on_policy.NO_HOOKS,
    )
    pure = setup.make_step(config, method)
    step = steps.PerShape(lambda *arguments: steps.compiled(pure, *arguments, mesh))
    read = jax.jit(method.teacher)
    times: dict[str, list[float]] = {}
    rates, row, sizes = [], 0, set()
    for turn in range(options.rounds + 3):  # the first turns compile
        began = time.perf_counter()
        found = feed.next(row, state)
        assert found is not None, "nobody asks it to stop"
        span, batch = found
        told = feed.numbers(span)
        whole = time.perf_counter() - began
        parts = {"writing": told["perf/rollout_seconds"]}
        parts["packing"] = whole - parts["writing"]
        placed = steps.place(batch, mesh)
        with jax.set_mesh(mesh):
            parts["teacher's reading, alone"] = _timed(
                lambda placed=placed, state=state: read(models.teacher.params, state, placed)
            )
        program = step.prepare(state, models.teacher.params, placed)
        began = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, models.teacher.params, placed))
        parts["step: reading and update"] = time.perf_counter() - began
        row = span.end_row
        sizes.add(batch.tokens.shape[0])
        if turn >= 3:
            rates.append(told["rollout/tokens"] / parts["writing"])
            for name, seconds in parts.items():
                times.setdefault(name, []).append(seconds)
    weights = [_timed(lambda: on_policy_split(models, state)) for _ in range(options.rounds + 1)][
        1:
    ]
    middle = {name: statistics.median(values) for name, values in times.items()}
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "prompts": options.prompts,
        "tokens": options.tokens,
        "load": os.getloadavg()[0],
        "seconds": middle,
        "share of neither writing nor the step": middle["packing"]
        / sum(middle[name] for name in ("writing", "packing", "step: reading and update")),
        "handing the weights over, milliseconds": 1e3 * statistics.median(weights),
        "tokens a second": statistics.median(rates),
        "rows of batches": sorted(sizes),
        "rows that there may be": rows.buckets(options.prompts, 1),
    }
    student = dataclasses.replace(models.student, params=state.params["student"])
    models = dataclasses.replace(models, student=student)
    theirs = _transformers(folder, models, questions[: options.prompts], options)
    return result | ({"transformers": theirs} if theirs else {})


def on_policy_split(models: Any, state: Any) -> Any:
    """The weights in the decoder's form."""
    from jaxdistill.models import per_layer

    params = state.params["student"]
    return per_layer.split(models.student.config, params, jnp.float32)


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def _transformers(
    folder: pathlib.Path, models: Any, texts: Sequence[str], options: argparse.Namespace
) -> dict[str, Any] | None:
    """How fast transformers answers, in a process of its own; None where nobody named a Python."""
    if not options.torch_python:
        return None
    from jaxdistill import models as all_models

    all_models.save(models.student, folder / "student")
    ids = [models.tokenizer(text)["input_ids"] for text in texts]
    asked = {"ids": ids, "end": models.tokenizer.eos_token_id}
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [options.torch_python, "-m", "benchmarks.on_policy", "--asked", str(folder)]
    command += ["--tokens", str(options.tokens), "--rounds", str(options.rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _generate(folder: pathlib.Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of transformers' `generate`, which samples as the rollouts do."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder / "student"), dtype="float32"
    ).eval()
    asked = json.loads((folder / "asked.json").read_text())
    width, end = max(map(len, asked["ids"])), asked["end"]
    prompts = torch.tensor([[end] * (width - len(one)) + one for one in asked["ids"]])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in asked["ids"]])
    rates = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                prompts,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=tokens,
                eos_token_id=end,
                pad_token_id=end,
            )
        seconds = time.perf_counter() - began
        answers = [row[width:].tolist() for row in made]
        counts = [one.index(end) + 1 if end in one else len(one) for one in answers]
        rates.append(sum(counts) / seconds)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"tokens a second": statistics.median(rates[1:]), "versions": versions}


if __name__ == "__main__":
    main()
