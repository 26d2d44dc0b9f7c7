"""Hostile files, made on the spot: each a way in which a stranger's file could hurt."""

import json
import os
import pathlib
import pickle
import struct
from collections.abc import Callable

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"},
}
HUGE = 1 << 62

Maker = Callable[[pathlib.Path], None]


class Canary:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def code(canary: pathlib.Path) -> str:
    """A Python module that writes the canary when it is imported."""
    return f"open({str(canary)!r}, 'w').close()\n"


def auto_map(module: str) -> dict:
    """Every class that transformers may be asked to take from a module of the folder."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")
    return {name: f"{module}.Evil" for name in names} | {"AutoTokenizer": [None, f"{module}.Evil"]}


def folder(path: pathlib.Path, **changes) -> pathlib.Path:
    """A sound folder of a model with one layer; `changes` replace fields of its config.json."""
    import numpy as np
    from safetensors.numpy import save_file

    from jaxdistill.formats.config_json import read_config
    from jaxdistill.formats.tensor_table import expected_tensors

    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", CONFIG | changes)
    write_json(path / "tokenizer.json", TOKENIZER)
    shapes = expected_tensors(read_config(CONFIG)).items()
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes}
    save_file(tensors, path / "model.safetensors")
    return path


def write_json(path: pathlib.Path, value) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def safetensors(header, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\0" * 7,
    "length beyond the file": safetensors(b"{}", length=HUGE),
    "length 2**64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no JSON": safetensors(b"{" * 100),
    "deep JSON": safetensors(b"[" * 100_000),
    "a list": safetensors(b"[1]"),
    "shape product overflows": safetensors({"a": tensor([HUGE, HUGE], [0, 8])}, b"\0" * 8),
    "shape wraps to the right size": safetensors({"a": tensor([1 << 63, 2], [0, 0])}),
    "shape beyond the data": safetensors({"a": tensor([1 << 40], [0, 4])}, b"\0" * 4),
    "negative shape": safetensors({"a": tensor([-1], [0, 4])}, b"\0" * 4),
    "offsets beyond the file": safetensors({"a": tensor([1], [HUGE, HUGE + 4])}),
    "offsets backwards": safetensors({"a": tensor([1], [4, 0])}, b"\0" * 4),
    "overlapping": safetensors({"a": tensor([1], [0, 4]), "b": tensor([1], [0, 4])}, b"\0" * 4),
    "a hole": safetensors({"a": tensor([1], [0, 4]), "b": tensor([1], [8, 12])}, b"\0" * 12),
    "unknown dtype": safetensors({"a": tensor([1], [0, 4], "PICKLE")}, b"\0" * 4),
    "dtype of another size": safetensors({"a": tensor([1], [0, 4], "F64")}, b"\0" * 4),
    "shape is text": safetensors({"a": tensor("1", [0, 4])}, b"\0" * 4),
    "a pickle": pickle.dumps([1]),
    "a name that is no UTF-8": safetensors(b'{"\xff": {}}'),
}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf(entries: list[bytes] = (), tensors: list[bytes] = (), counts=None, version=3) -> bytes:
    """A GGUF file with any header."""
    numbers = (len(tensors), len(entries)) if counts is None else counts
    return struct.pack("<4sIQQ", b"GGUF", version, *numbers) + b"".join([*entries, *tensors])


def gguf_tensor(name: str, dims, kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    count = len(dims) if count is None else count
    sizes = b"".join(struct.pack("<Q", dim) for dim in dims)
    return text(name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, offset)


_ARRAY = lambda inner, count: struct.pack("<IQ", inner, count)
GGUF: dict[str, bytes] = {
    "empty": b"",
    "magic only": b"GGUF",
    "counts of tensors": gguf(counts=(2**63, 0)),
    "counts of entries": gguf(counts=(0, 2**63)),
    "count above the file": gguf(counts=(99_999, 99_999)),
    "version": gguf(version=99),
    "key length": gguf([struct.pack("<Q", HUGE)]),
    "string length": gguf([entry("a", 8, struct.pack("<Q", HUGE))]),
    "array count": gguf([entry("a", 9, _ARRAY(4, HUGE))]),
    "array of strings count": gguf([entry("a", 9, _ARRAY(8, HUGE))]),
    "array in array": gguf([entry("a", 9, _ARRAY(9, 1))]),
    "unknown value type": gguf([entry("a", 999, b"\0" * 8)]),
    "key twice": gguf([entry("a", 0, b"\1"), entry("a", 0, b"\2")]),
    "dims count": gguf(tensors=[gguf_tensor("t", [1], count=2**32 - 1)]),
    "dims product": gguf(tensors=[gguf_tensor("t", [2**63, 2**63])]),
    "dims product wraps to 0": gguf(tensors=[gguf_tensor("t", [2**32, 2**32])]),
    "dims zero": gguf(tensors=[gguf_tensor("t", [0, 2**62])]),
    "offset": gguf(tensors=[gguf_tensor("t", [1], offset=2**63)]),
    "tensor type": gguf(tensors=[gguf_tensor("t", [1], kind=9999)]),
    "tensor twice": gguf(tensors=[gguf_tensor("t", [8]), gguf_tensor("t", [8])]) + b"\0" * 200,
    "shared bytes": gguf(tensors=[gguf_tensor("t", [8]), gguf_tensor("u", [8], offset=16)])
    + b"\0" * 200,
    "alignment zero": gguf([entry("general.alignment", 4, b"\0" * 4)], [gguf_tensor("t", [1])]),
    "alignment is a list": gguf([entry("general.alignment", 9, _ARRAY(4, 0))]),
    "alignment is text": gguf([entry("general.alignment", 8, text("x"))]),
    "alignment huge": gguf([entry("general.alignment", 10, b"\xff" * 8)], [gguf_tensor("t", [1])]),
    "alignment infinite": gguf(
        [entry("general.alignment", 6, struct.pack("<f", float("inf")))], [gguf_tensor("t", [1])]
    ),
    "architecture is a list": gguf([entry("general.architecture", 9, _ARRAY(4, 0))]),
}

CONFIGS: dict[str, object] = {
    "layers": CONFIG | {"num_hidden_layers": 10**12},
    "vocabulary": CONFIG | {"vocab_size": 10**18},
    "width": CONFIG | {"hidden_size": 10**12, "head_dim": 4},
    "each within bounds, not together": CONFIG
    | {"num_hidden_layers": 999, "hidden_size": 999_936, "intermediate_size": 999_999},
    "a thousand digits": json.dumps(CONFIG)[:-1] + ', "x": ' + "9" * 5000 + "}",
    "negative": CONFIG | {"hidden_size": -8},
    "fraction": CONFIG | {"hidden_size": 8.0},
    "text": CONFIG | {"hidden_size": "8"},
    "list": CONFIG | {"model_type": ["llama"]},
    "NaN": json.dumps(CONFIG | {"rms_norm_eps": float("nan")}),
    "infinity": json.dumps(CONFIG | {"rope_theta": float("inf")}),
    "key twice": json.dumps(CONFIG)[:-1] + ', "hidden_size": 16}',
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "no UTF-8": b"\xff\xfe{}".decode("latin-1"),
    "no object": "[]",
    "code of its own": CONFIG
    | {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    "rope table of lists": CONFIG | {"rope_scaling": {"rope_type": ["yarn"]}},
    "rope divides by zero": CONFIG
    | {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
    "layer types of lists": CONFIG | {"layer_types": [["full_attention"]]},
    "qwen2 windows": CONFIG
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": "1",
        "use_sliding_window": True,
    },
}

INDEX_FILES = [
    "../outside.safetensors",
    "/etc/passwd",
    "..",
    "sub/x.safetensors",
    "a\\x.safetensors",
    "a\0.safetensors",
    "/dev/zero",
    "~/x.safetensors",
    "",
    ".",
    3,
    None,
    ["x.safetensors"],
    {"x": 1},
]

TOKENIZERS: dict[str, object] = {
    "no JSON": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "no model": {"version": "1.0"},
    "model is text": {**TOKENIZER, "model": "BPE"},
    "ids are negative": {**TOKENIZER, "model": {"type": "WordLevel", "vocab": {"a": -1}}},
    "ids are huge": {
        **TOKENIZER,
        "model": {"type": "WordLevel", "vocab": {"a": 2**63}, "unk_token": "a"},
    },
    "vocabulary is a list": {**TOKENIZER, "model": {"type": "WordLevel", "vocab": [1, 2]}},
    "merges of the unknown": {
        **TOKENIZER,
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]},
    },
    "unknown model": {**TOKENIZER, "model": {"type": "Pickle", "vocab": {}}},
    "added token without content": {**TOKENIZER, "added_tokens": [{"id": 0}]},
    "broken pattern": {
        **TOKENIZER,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "("},
            "behavior": "Isolated",
            "invert": False,
        },
    },
}
