"""Files and servers of strangers that would cost minutes and gigabytes, each in its own process.

python -m benchmarks.soak_strangers CASE FOLDER     one of them; ends with 0 where it was refused
"""

import collections
import gzip
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxdistill.errors import UserError

SECONDS, MEGABYTES = 60, 1000  # that a case may take, the imports among them
_BPE = {"type": "BPE", "vocab": {"<unk>": 0, "a": 1, "x": 2}, "merges": [], "unk_token": "<unk>"}
_WORDS = {
    "type": "WordPiece",
    "vocab": {"<unk>": 0, "a": 1, "##a": 2},
    "unk_token": "<unk>",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 10**9,
}
_A, _X = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}
_TOKENIZERS: dict[str, dict[str, Any]] = {
    "replace": {
        "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 300}
    },
    "word": {"model": _WORDS},
    "prefix": {"model": _BPE | {"continuing_subword_prefix": "x" * 1_000_000}},
    "suffix": {"model": _BPE | {"end_of_word_suffix": "x" * 1_000_000}},
    "id": {"model": _BPE | {"vocab": {"<unk>": 0, "a": 2**32 - 1}}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_A, *[_X] * 100_000],
            "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [2], "tokens": ["x"]}},
        }
    },
    "twice": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_A] * 10_000,
            "pair": [],
            "special_tokens": {},
        }
    },
    "padding": {
        "padding": {
            "strategy": {"Fixed": 2**30},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    },
}


def _tokenizer(name: str) -> Callable[[pathlib.Path], Any]:
    def read(folder: pathlib.Path) -> None:
        from jaxdistill.data import encode
        from jaxdistill.data.codec import prepare
        from jaxdistill.formats.tokenizer_files import folder_tokenizer

        plain = {"version": "1.0", "added_tokens": [], "model": _BPE}
        (folder / "tokenizer.json").write_text(json.dumps(plain | _TOKENIZERS[name]))
        codec = prepare(folder_tokenizer(folder))
        encode.encode_text(codec, ["a" * 100_000])

    return read


def _made(**options: Any) -> Callable[[pathlib.Path], Any]:
    def make(folder: pathlib.Path) -> None:
        import pyarrow
        import pyarrow.parquet

        if options:
            texts = pyarrow.array(["ab " * 50_000] * 5_000)
        else:
            rows = pyarrow.array([0] * 1024, pyarrow.int32())
            texts = pyarrow.DictionaryArray.from_arrays(rows, ["ab " * 233_333])
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, folder / "a.parquet", compression="zstd", **options)

    return make


def _parquet(folder: pathlib.Path) -> None:
    from jaxdistill.data.sources import open_source

    collections.deque(open_source(folder / "a.parquet"), maxlen=0)


class _Bad(http.server.BaseHTTPRequestHandler):
    """A server that packs gigabytes, drips, or counts below zero."""

    kind = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        usage = {"prompt_tokens": -5, "completion_tokens": 1, "total_tokens": -4}
        choice = {"index": 0, "text": "a", "finish_reason": "stop"}
        answer = {"id": "x", "object": "text_completion", "created": 0, "model": "m"}
        told = json.dumps(answer | {"choices": [choice], "usage": usage}).encode()
        if self.kind == "gzip":
            told = gzip.compress(b" " * (1 << 20)) * 2000
            self.send_header("Content-Encoding", "gzip")
        size = 10**9 if self.kind in ("drip", "endless") else len(told)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        while self.kind in ("drip", "endless"):
            self.wfile.write(b" " if self.kind == "drip" else b" " * 1_000_000)
            time.sleep(0.5 if self.kind == "drip" else 0)
        self.wfile.write(told)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _server(kind: str) -> Callable[[pathlib.Path], Any]:
    def ask(_: pathlib.Path) -> None:
        from jaxdistill.reasoning.asking import Job, SamplingParams
        from jaxdistill.reasoning.served import ApiClient

        bad = type("_", (_Bad,), {"kind": kind})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), bad)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # the client has gone  # pyrefly: ignore
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        api = ApiClient(url, "m", timeout=3.0, retries=1, logprobs=False, max_failures=1)
        settings = SamplingParams(max_new_tokens=1, temperature=1.0)
        answers = list(api.ask(collections.deque([Job("q", "x", settings)])))
        spent = api.spent()
        if min(spent.values()) < 0 or all(answer.failed for answer in answers):
            raise UserError("refused" if min(spent.values()) >= 0 else "")
        raise UserError("taken, and counted as it should be")

    return ask


CASES: dict[str, Callable[[pathlib.Path], Any]] = {
    **{f"tokenizer {name}": _tokenizer(name) for name in _TOKENIZERS},
    **dict.fromkeys(("parquet dictionary", "parquet page", "parquet prefixes"), _parquet),
    **{f"server {kind}": _server(kind) for kind in ("gzip", "drip", "endless", "usage")},
}

# What makes a case's file, in a process before it: what making takes is not what reading takes.
MAKERS: dict[str, Callable[[pathlib.Path], Any]] = {
    "parquet dictionary": _made(),
    "parquet page": _made(use_dictionary=False, data_page_size=2**31 - 1),
    "parquet prefixes": _made(use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}),
}


def run(folder: pathlib.Path) -> dict[str, Any]:
    """Every case: how it ended, its seconds and its megabytes."""
    found: dict[str, Any] = {}
    for name in CASES:
        place = folder / name.replace(" ", "-")
        place.mkdir()
        module = [sys.executable, "-m", "benchmarks.soak_strangers"]
        if name in MAKERS:
            subprocess.run([*module, "--make", name, str(place)], check=True)
        command = [*module, name, str(place)]
        began = time.monotonic()
        with open(place / "log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        said = (place / "log").read_text(errors="replace")
        seconds, megabytes = time.monotonic() - began, used.ru_maxrss // 1024
        found[name] = {
            "exit_code": process.returncode,
            "said": said.replace(f"{place}/", "").strip()[-200:],
            "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
            "seconds": round(seconds, 1),
            "megabytes": megabytes,
            "bounded": used.ru_utime + used.ru_stime < SECONDS and megabytes < MEGABYTES,
        }
    return found


def main() -> int:
    """One case in this process, or the making of its file."""
    *making, name, folder = sys.argv[1:]
    if making:
        MAKERS[name](pathlib.Path(folder))
        return 0
    try:
        CASES[name](pathlib.Path(folder))
    except UserError as error:
        print(str(error)[:200] or "not as it should be")
        return 0 if str(error) else 1
    print("read")
    return 0


if __name__ == "__main__":
    # Not through exit handlers: a thread may still wait for a server of a stranger's.
    code = main()
    sys.stdout.flush()
    os._exit(code)
