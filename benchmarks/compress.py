"""The table of configs/compress_smollm2.yaml with several seeds, and what pruning gives a 8B model.

    python -m benchmarks.compress --seeds 1 2 3 --save compress_smollm2
    python -m benchmarks.compress --steps 2 --rows 4 --seeds 1        # minutes: does it run
    python -m benchmarks.compress --plan                              # figures by formula alone

Teacher, pruned, SFT-recovered, KD-recovered and KD + int8 at equal steps: held-out perplexity, KL,
agreement, size and latency, mean and standard deviation over the seeds. Interrupted, it goes on.
"""

import argparse
import json
import pathlib

from benchmarks import duel

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "configs" / "compress_smollm2.yaml"
# Llama-3.1-8B, and the two students that Minitron made of it (arXiv 2408.11796).
LLAMA = {
    "vocab_size": 128_256,
    "embed": 4096,
    "mlp": 14_336,
    "layers": 32,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
}
STUDENTS = {"width 4B": {"embed": 3072, "mlp": 9216}, "depth 4B": {"layers": 16}}


def main() -> None:
    """Runs the workflow and prints what its tables hold."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/bench_compress"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="of every training; default: the workflow's")
    parser.add_argument("--rows", type=int, help="held-out rows; default: the workflow's")
    parser.add_argument("--plan", action="store_true", help="only the 8B model's figures")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    options = parser.parse_args()
    result = {"llama_8b": plan()}
    if not options.plan:
        result |= measured(options)
    print(json.dumps(result, indent=2))
    if options.save:
        print(duel.save(options.save, result))


def measured(options: argparse.Namespace) -> dict:
    """The tables of the workflow, with this many steps, rows and seeds."""
    from jaxdistill import api

    file = options.folder / "workflow.yaml"
    options.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(workflow_text(options), encoding="utf-8")
    page = api.run_workflow(file)
    tables = {}
    for name in ("depth_table", "width_table"):
        found = json.loads((page.parent / name / "comparison.json").read_text(encoding="utf-8"))
        tables[name] = {"held_out": found["held_out"], "rows": found["rows"]}
    return {"seeds": options.seeds, "tables": tables, "gains": gains(tables)}


def workflow_text(options: argparse.Namespace) -> str:
    """The workflow file with other steps, rows, seeds and folder."""
    from jaxdistill.config import syntax

    raw = syntax.parse(WORKFLOW.read_text(encoding="utf-8")).value
    raw["dir"] = str(options.folder / "out")
    if options.steps:
        raw["base"]["train"]["steps"] = options.steps
        raw["base"]["optimizer"]["warmup"] = min(2, options.steps - 1)
    for step in raw["steps"]:
        if options.rows and step["kind"] == "compare":
            step["max_rows"] = options.rows
        if options.rows and step["kind"] == "importance":
            step["rows"] = min(step["rows"], options.rows)
        if "seeds" in step:
            step["seeds"] = options.seeds
        if options.steps and step["name"] == "correct":
            step["config"]["train"] = {"steps": min(options.steps, 20)}
    return syntax.dump(raw)


def gains(tables: dict) -> dict:
    """By how much KD recovery beats SFT recovery, and the student's decoding the teacher's."""
    found = {}
    for name, table in tables.items():
        rows = {row["name"]: row for row in table["rows"]}
        kd, sft, teacher = rows["KD"], rows["SFT"], rows["teacher"]
        found[name] = {
            "kl_less_than_sft": 1 - kd["kl_t1"] / sft["kl_t1"],
            "agreement_more_than_sft": kd["agree_top1"] - sft["agree_top1"],
            "decode_speed_of_teacher": (
                kd["decode_tokens_per_second"] / teacher["decode_tokens_per_second"]
            ),
        }
    return found


def plan() -> list[dict]:
    """Parameters, bfloat16 bytes and matrix FLOPs per token of the Minitron recipes, by formula.

    Decoding one sequence reads every weight once a token, so bytes bound its speed; a prompt or a
    training step is bound by FLOPs.
    """
    from jaxdistill.compress import targets
    from jaxdistill.models import DecoderConfig, count_parameters, forward_flops_per_token

    teacher = DecoderConfig("llama", **LLAMA)
    shapes = {"Llama-3.1-8B": teacher} | {
        name: targets.resize(teacher, sizes) for name, sizes in STUDENTS.items()
    }
    whole = count_parameters(teacher)
    flops = forward_flops_per_token(teacher, 8192)
    return [
        {
            "model": name,
            "parameters": count_parameters(shape),
            "bf16_gib": 2 * count_parameters(shape) / 2**30,
            "parameters_of_teacher": count_parameters(shape) / whole,
            "gflops_per_token_at_8192": forward_flops_per_token(shape, 8192) / 1e9,
            "flops_of_teacher": forward_flops_per_token(shape, 8192) / flops,
        }
        for name, shape in shapes.items()
    ]


if __name__ == "__main__":
    main()
