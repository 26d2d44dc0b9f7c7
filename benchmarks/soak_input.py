"""Input from strangers, damaged at random: configurations, records, weights, tokenizers.

Every case must end in a value or in a `UserError`; anything else is counted as a traceback and
kept with the seed that makes it again. `run` is the long form of what `make test` does in small.
"""

import argparse
import collections
import copy
import json
import pathlib
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxdistill import config
from jaxdistill.config import inherit, keys, syntax, workflow
from jaxdistill.errors import UserError
from tests import hostile

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, 1e308, -1e308, 10**30, float("inf"), float("nan")),
    *("", "kd", "1e-4", "yes", "\0", "\x1b[31m", "é", "a" * 5000, "\ud83d", "../../x", "${HOME}"),
    *([], {}, [[]], [{}], {"name": "kd"}, {"name": []}, [None], {"": None}, "os.system"),
)
PIECES = (
    *("!!python/object/apply:os.system ['touch x'] ", "&a ", "*a", "!x ", "\t", "{", "[", "}", "'"),
    *('"', ": ", "- ", "? ", "\n", "---\n", "<<: ", "|\n", "\0", "\x1b", "\ud800", "\ufeff", "#"),
)


class Counts(collections.Counter):
    """What became of the cases, and the first few that ended in neither a value nor a message."""

    def __init__(self) -> None:
        super().__init__()
        self.tracebacks: list[str] = []

    def case(self, kind: str, seed: Any, call: Callable[[], Any]) -> Any:
        """Runs one case; its value, its error, or None."""
        self[f"{kind}/cases"] += 1
        try:
            value = call()
        except UserError as error:
            self[f"{kind}/refused"] += 1
            return error
        except Exception as error:
            self[f"{kind}/tracebacks"] += 1
            self.tracebacks.append(f"{kind} {seed}: {type(error).__name__}: {str(error)[:300]}")
            return None
        self[f"{kind}/accepted"] += 1
        return value


def _texts() -> list[str]:
    texts = [inherit.flattened(path) for path in sorted(CONFIGS.glob("*.yaml"))]
    return [text for text in texts if not workflow.is_workflow(text)]


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from _places(inner, (*path, key))


def _parent(tree: Any, path: tuple) -> Any:
    for part in path[:-1]:
        tree = tree[part]
    return tree


def damaged_tree(rng: random.Random, tree: Any) -> Any:
    """A tree of mappings and lists with one to three values replaced, removed, wrapped or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        paths = list(_places(tree))
        if not paths:
            break
        path = rng.choice(paths)
        parent, key = _parent(tree, path), path[-1]
        action = rng.choice(("odd", "remove", "wrap", "nest", "add", "rename"))
        if action == "odd":
            parent[key] = copy.deepcopy(rng.choice(ODD))
        elif action == "remove":
            del parent[key]
        elif action == "wrap":
            parent[key] = [parent[key]]
        elif action == "nest":
            parent[key] = {"x": parent[key]}
        elif isinstance(parent, dict):
            value = parent.pop(key) if action == "rename" else copy.deepcopy(rng.choice(ODD))
            parent[rng.choice((f"{key}s", str(key)[1:], "name", "", "\x1b"))] = value
    return tree


def damaged_bytes(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """Bytes cut, overwritten, repeated or with others put in, in their first `within` bytes."""
    data, within = bytearray(data), min(within or len(data), len(data))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(within + 1), rng.choice((1, 1, 4, 8))
        action = rng.choice(("flip", "flip", "ones", "zeros", "insert", "drop", "cut"))
        if action == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action in ("ones", "zeros"):
            data[at : at + size] = (b"\xff" if action == "ones" else b"\0") * len(
                data[at : at + size]
            )
        elif action == "insert":
            data[at:at] = rng.randbytes(size)
        elif action == "drop":
            del data[at : at + size]
        elif action == "cut" and rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def typo(rng: random.Random, word: str) -> str:
    """The word with one letter changed, dropped, doubled, added, or swapped with its neighbour."""
    letters, at = "abcdefghijklmnopqrstuvwxyz_", rng.randrange(len(word))
    changed = rng.choice(
        (
            word[:at] + rng.choice(letters) + word[at + 1 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + rng.choice(letters) + word[at:],
            word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :],
        )
    )
    return changed or word


def fuzz_configs(rng: random.Random, cases: int, counts: Counts) -> None:
    """Damaged trees and damaged texts: a configuration, or errors that each have their place."""
    texts = _texts()
    trees = [syntax.parse(text).value for text in texts]
    trees += [syntax.parse(config.dump(config.loads(text))).value for text in texts]
    for number in range(cases):
        if number % 2:
            text = syntax.dump(damaged_tree(rng, rng.choice(trees)))
        else:
            text = rng.choice(texts)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(text) + 1)
                cut = rng.choice((0, 0, 1, 5))
                text = text[:at] + rng.choice((*PIECES, "")) + text[at + cut :]
        outcome = counts.case("configs", text[:300], lambda text=text: config.loads(text, "x.yaml"))
        if isinstance(outcome, UserError):
            placed = all(line.startswith("x.yaml:") for line in str(outcome).split("\n"))
            counts["configs/without a place"] += not placed


def fuzz_typos(rng: random.Random, cases: int, counts: Counts) -> None:
    """Keys with one mistake: the message says which key was meant."""
    trees = [syntax.parse(config.dump(config.loads(text))).value for text in _texts()]
    known = {path[-1] for path in keys.all_keys()}
    for _ in range(cases):
        tree = copy.deepcopy(rng.choice(trees))
        path = rng.choice([p for p in _places(tree) if isinstance(p[-1], str) and len(p[-1]) > 2])
        parent, key = _parent(tree, path), path[-1]
        wrong = typo(rng, key)
        if wrong in known or wrong in parent:
            continue  # another key's name is no typo that anybody could see
        parent[wrong] = parent.pop(key)
        text = syntax.dump(tree)
        outcome = counts.case("typos", wrong, lambda text=text: config.loads(text, "x.yaml"))
        messages = [line for line in str(outcome).split("\n") if "unknown key" in line]
        meant = (f'"{key}"', f'.{key}"')
        counts["typos/right"] += any(any(name in line for name in meant) for line in messages)


RECORDS: tuple[Any, ...] = (
    {"text": "a b c"},
    {"prompt": "what?", "completion": "that"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
)


def fuzz_records(rng: random.Random, cases: int, counts: Counts) -> None:
    """Files of damaged records: each is used or set aside, and the two add up to all."""
    from jaxdistill.data.records import Record, Rejected
    from jaxdistill.data.sources import open_source

    written = 0
    with tempfile.TemporaryDirectory() as folder:
        while written < cases:
            size, base = rng.randint(1, 40), rng.choice(RECORDS)
            lines = [_line(rng, base) for _ in range(size)]
            written += size
            path = pathlib.Path(folder) / rng.choice(("x.jsonl", "x.txt"))
            path.write_bytes(rng.choice((b"\n", b"\r\n")).join(lines))

            def read(path=path) -> list[Any]:
                return list(open_source(path))

            outcome = counts.case("records", written, read)
            if isinstance(outcome, list):
                counts["records/used"] += sum(isinstance(item, Record) for item in outcome)
                counts["records/set aside"] += sum(isinstance(item, Rejected) for item in outcome)
                nothing = sum(not line.strip(b" \t\r\n\xef\xbb\xbf") for line in lines)
                whole = path.suffix == ".txt" or len(outcome) + nothing >= _lines(path)
                counts["records/lost"] += not whole
    counts["records/records"] += written


def _lines(path: pathlib.Path) -> int:
    data = path.read_bytes()
    return data.count(b"\n") + bool(data and not data.endswith(b"\n"))


def _line(rng: random.Random, base: Any) -> bytes:
    value = base if rng.random() < 0.3 else damaged_tree(rng, base)
    line = json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if rng.random() < 0.4:
        line = damaged_bytes(rng, line)
    if rng.random() < 0.01:
        line = rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b'"' + b"a" * 11_000_000 + b'"'))
    return line.replace(b"\n", b" ")


def fuzz_files(rng: random.Random, cases: int, counts: Counts) -> None:
    """Damaged safetensors, config.json, tokenizers and GGUF: read alike, or refused."""
    from jaxdistill import models
    from jaxdistill.formats import tokenizer_files

    with tempfile.TemporaryDirectory() as place:
        folder = hostile.folder(pathlib.Path(place) / "model")
        sound = {
            name: (folder / name).read_bytes()
            for name in ("model.safetensors", "config.json", "tokenizer.json")
        }
        ggufs = _ggufs(pathlib.Path(place))
        kinds = [*sound, "tree of config.json", "tree of tokenizer.json", *ggufs]
        for number in range(cases):
            kind = kinds[number % len(kinds)]
            name = kind.removeprefix("tree of ")
            if kind in ggufs:
                path = pathlib.Path(place) / "damaged.gguf"
                path.write_bytes(damaged_bytes(rng, ggufs[kind], within=2000))
                counts.case(kind, number, lambda path=path: models.spec(path))
                continue
            if kind == name:
                data = damaged_bytes(rng, sound[name], within=1500)
            else:
                data = json.dumps(damaged_tree(rng, json.loads(sound[name]))).encode()
            (folder / name).write_bytes(data)
            read = tokenizer_files.folder_tokenizer if "tokenizer" in name else _read_folder
            outcome = counts.case(name, number, lambda read=read: read(folder))
            if isinstance(outcome, UserError):
                counts["files/message without a name"] += place not in str(outcome)
            (folder / name).write_bytes(sound[name])


def _read_folder(folder: pathlib.Path) -> Any:
    """Everything that loading checks and reads, without putting it on a device."""
    from jaxdistill.formats import huggingface, shards

    model = huggingface.folder_config(folder)
    with shards.Folder(folder) as opened:
        huggingface._check_tensors(model, opened)
        for name, tensor in opened.entries.items():
            opened.read(name, (slice(None),) * len(tensor.shape))
    return model


def _ggufs(place: pathlib.Path) -> dict[str, bytes]:
    """One small GGUF file, where the package that writes them is installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        return {}
    from tests.models import gguf_files, oracle

    path = place / "sound.gguf"
    gguf_files.write(path, oracle.CASES["smollm2"])
    return {"gguf": path.read_bytes()}


def run(configs: int = 5000, records: int = 10_000, files: int = 3000, seed: int = 0) -> dict:
    """All of it.

    Args:
      configs: damaged configurations, and as many typos.
      records: damaged records, in files of up to 40.
      files: damaged model files.
      seed: of the damage.

    Returns:
      Counts by kind; `tracebacks`, which is empty if all is well; share of right suggestions;
      seconds and the most memory (MiB) the process has held.
    """
    start, counts = time.monotonic(), Counts()
    for part, cases in (
        (fuzz_configs, configs),
        (fuzz_typos, configs),
        (fuzz_records, records),
        (fuzz_files, files),
    ):
        part(random.Random(f"{seed}/{part.__name__}"), cases, counts)
    typed = counts["typos/cases"]
    return {
        **{name: int(count) for name, count in sorted(counts.items())},
        "typos/share right": counts["typos/right"] / typed if typed else None,
        "tracebacks": counts.tracebacks,
        "seconds": round(time.monotonic() - start, 1),
        "most memory MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("configs", 5000), ("records", 10_000), ("files", 3000), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    print(json.dumps(run(given.configs, given.records, given.files, given.seed), indent=2))
