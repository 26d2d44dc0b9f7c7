"""Our GGUF files as llama.cpp computes with them: log-probabilities, greedy tokens, texts.

Skipped unless JAXDISTILL_LLAMA names a folder in which `npm install node-llama-cpp@3.21.1` was run.
"""

import dataclasses
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.formats import gguf_write
from tests.formats.test_gguf_write import CASES, TEXTS, model, sentences

pytest.importorskip("gguf")
LLAMA = os.environ.get("JAXDISTILL_LLAMA")
pytestmark = pytest.mark.skipif(not LLAMA, reason="needs llama.cpp: set JAXDISTILL_LLAMA")
PROMPT, COUNT = [5, 60, 7, 100, 33, 21, 90, 2, 44, 17], 24
TYPES = {"F32": CASES, "Q8_0": ("llama", "qwen3", "smollm3")}


def said(cases):
    """What llama.cpp says of each case."""
    file = pathlib.Path(cases[0]["file"]).parent / "cases.json"
    file.write_text(json.dumps(cases))
    script = pathlib.Path(__file__).parent / "llama.mjs"
    out = subprocess.run(["node", str(script), LLAMA, str(file)], capture_output=True, text=True)
    assert not out.returncode, out.stderr[-2000:]
    return list(map(json.loads, file.with_name("cases.json.out").read_text().splitlines()))


def random_model(family):
    """A random model whose logits are far enough apart that rounding chooses no token."""
    made = model(family, **CASES[family])
    # Without rows that are no tokens: we never draw them, and llama.cpp does.
    wide = dataclasses.replace(made.config, initializer_range=0.25, vocab_size=len(made.tokenizer))
    made = dataclasses.replace(
        models.random(wide, dtype="float32", seed=3), tokenizer=made.tokenizer
    )
    return made, dataclasses.replace(made, config=dataclasses.replace(wide, eos_ids=()))


@pytest.mark.parametrize("kind", TYPES)
def test_llama_computes_the_same_models(kind, tmp_path):
    """Log-probabilities within 5e-5, with gelu 5e-3: llama.cpp has it in half precision.

    In Q8_0 it rounds what goes into a product too: 0.05 in the mean from what we read there.
    """
    families = TYPES[kind]
    cases, wanted = [], []
    for family in families:
        made, endless = random_model(family)
        file = gguf_write.save(made, tmp_path / f"{family}.gguf", kind)
        tokens = list(map(int, endless.generate([PROMPT], max_new_tokens=COUNT)[0]))
        logits = np.asarray(models.load(file).logits(np.array([PROMPT + tokens])), np.float64)[0]
        wanted.append((tokens, logits - np.log(np.exp(logits).sum(-1, keepdims=True))))
        case = {"file": str(file), "prompt": PROMPT, "count": COUNT, "text": PROMPT + tokens}
        cases.append(case | {"texts": TEXTS})
    for family, answer, (tokens, want) in zip(families, said(cases), wanted, strict=True):
        if kind == "F32":
            assert answer["greedy"] == tokens, family
        rows = answer["probabilities"]
        assert len(rows) == len(want), family
        gaps = [
            abs(np.log(p) - row[token])
            for row, pairs in zip(want, rows, strict=True)
            for token, p in pairs
            if p > 1e-3
        ]
        bound = 5e-3 if "gelu" in CASES[family].get("activation", "") else 5e-5
        assert (max(gaps) < bound) if kind == "F32" else (np.mean(gaps) < 0.05), (family, gaps)
        ids = [model().tokenizer(text)["input_ids"] for text in TEXTS]
        assert answer["texts"] == ids, family


@pytest.mark.parametrize("space", [True, False])
def test_llama_cuts_text_as_sentencepiece(space, tmp_path):
    tokenizer, made = sentences(space), model()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "bos_id": tokenizer.bos_token_id, "pad_id": None}
    shape = dataclasses.replace(made.config, vocab_size=300, **ids)
    whole = dataclasses.replace(models.random(shape, dtype="float32"), tokenizer=tokenizer)
    file = gguf_write.save(whole, tmp_path / "x.gguf")
    texts = ["hello world", "he ll\nor \u20ac", "hellohello wor ld", "a hello  lo"]
    case = {"file": str(file), "prompt": [270], "count": 1, "text": [270, 271], "texts": texts}
    (answer,) = said([case])
    assert answer["texts"] == [tokenizer(text)["input_ids"] for text in texts]
