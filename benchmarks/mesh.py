"""What crosses the mesh: weights once a step or a micro-batch, experts by fsdp or by all-to-all.

    python -m benchmarks.mesh                 # four minutes; needs libtpu

Per device, of steps that are compiled for described TPUs and run nowhere: bytes sent, memory, and
the floor on the step's time. The first row of each table is the baseline.
"""

import json
import pathlib
import tempfile

from benchmarks import duel
from jaxdistill import config
from jaxdistill.plan import search

ROOT = pathlib.Path(__file__).resolve().parents[1]
QWEN3_30B_A3B = {  # its public config.json
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
ONCE = {
    "each micro-batch": (),
    "the teacher's once a step": ("train.gather_once=teacher",),
    "both once a step": ("train.gather_once=both",),
}
EXPERTS = {
    "fsdp: 16": ("mesh={fsdp: 16}",),
    "expert: 16": ("mesh={fsdp: 1, expert: 16}",),
    "expert: 16, weights once a step": ("mesh={fsdp: 1, expert: 16}", "train.gather_once=both"),
}


def main() -> None:
    """Compiles every row and saves the tables."""
    with tempfile.TemporaryDirectory(prefix="bench-mesh-") as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
        teacher = f"teacher.random={{like: {folder}}}"
        tables = {
            "llama3_8b_to_1b, 4 micro-batches, v5e 4x4": _table(
                "plan_llama3_8b_to_1b", "tpu:v5e:4x4", (), ONCE
            ),
            "qwen3_30b_a3b to 4b, 4 micro-batches, v5p 2x2x4": _table(
                "plan_qwen3_32b_to_4b", "tpu:v5p:2x2x4", (teacher,), EXPERTS
            ),
        }
    print(json.dumps(tables, indent=1))
    print(duel.save("mesh_plan", {"tables": tables}))


def _table(file: str, target: str, common: tuple[str, ...], rows: dict[str, tuple[str, ...]]):
    found = {}
    for name, overrides in rows.items():
        loaded = config.load(ROOT / "configs" / f"{file}.yaml", (*common, *overrides))
        step = search.plan(loaded, target, tries=0)
        sent = {}
        for entry in step["collectives"]:
            sent[entry["kind"]] = sent.get(entry["kind"], 0) + entry["sent_bytes"] / 1e9
        found[name] = {
            "sent_gb": step["sent_bytes"] / 1e9,
            "sent_gb_by_kind": sent,
            "memory_gib": step["memory"]["total"] / 2**30,
            "floor_ms": 1e3 * step["floor_seconds"],
            "seconds": step["seconds"],
        }
    first = next(iter(found.values()))
    return {
        name: row | {"sent_ratio": row["sent_gb"] / first["sent_gb"]} for name, row in found.items()
    }


if __name__ == "__main__":
    main()
