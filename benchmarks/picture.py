"""The picture in README.md, drawn from the saved numbers: python -m benchmarks.picture

A bar is a method's KL to the teacher on held-out text after the same 20 steps. The file is plain
SVG of a few kilobytes, and the same numbers give the same bytes.
"""

import json
import pathlib

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
NAMES = {
    "hidden": "hidden states + KD",
    "minilm": "MiniLMv2 + KD",
    "kd": "classic KD",
    "kd T=2": "classic KD, T = 2",
    "smoothed_kd": "smoothed KD",
    "taid": "TAID",
    "alphanet": "AlphaNet",
    "distillm": "skew KL (DistiLLM)",
    "dkd": "decoupled KD",
    "akl": "adaptive KL",
    "ctkd": "CTKD",
    "ted": "TED",
    "abkd": "alpha-beta (ABKD)",
    "total_variation": "total variation",
    "jsd": "JSD",
    "reverse_kd": "reverse KL",
    "sft": "fine-tuning, no teacher",
}
LEFT, BAR, STEP, SCALE, WIDTH = 170, 14, 20, 480, 720


def draw(result: dict) -> str:
    """The picture of `methods_smollm2.json` as SVG text."""
    bars = sorted(
        (row["kl_to_teacher"], row["agreement"], name) for name, row in result["methods"].items()
    )
    height = 56 + STEP * len(bars)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        '<text x="12" y="20" font-weight="bold">KL to the teacher on held-out text (less is '
        "closer), and top-1 agreement</text>",
        '<text x="12" y="36" font-size="11" fill="#555">SmolLM2-135M-Instruct with 22 of 30 '
        f"layers, 20 steps, {result['cpus']} cores of an {result['cpu']}, {result['date']}</text>",
    ]
    for i, (kl, agreement, name) in enumerate(bars):
        y = 48 + STEP * i
        colour = "#b5b5b5" if name == "sft" else "#1f6f8b"
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{NAMES[name]}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{kl * SCALE:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{LEFT + kl * SCALE + 6:.1f}" y="{y + 11}" font-size="11">'
            f"{kl:.3f}, {agreement:.0%}</text>",
        ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Writes the picture beside the numbers."""
    text = draw(json.loads((RESULTS / "methods_smollm2.json").read_text()))
    (RESULTS / "methods_smollm2.svg").write_text(text)


if __name__ == "__main__":
    main()
