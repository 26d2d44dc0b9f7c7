"""A scripted teacher, a tiny model that speaks, and a server with scripted faults."""

import dataclasses
import gzip
import http.server
import json
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from jaxdistill import models
from jaxdistill.models.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def talker():
    """A tiny random model with one token per byte."""
    tokenizer = byte_tokenizer()
    config = models.DecoderConfig(
        "llama",
        vocab_size=len(tokenizer),
        embed=16,
        mlp=16,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=8,
        max_positions=512,
        initializer_range=0.3,
    )
    return models.random(config, 0, tokenizer=tokenizer)


def fresh(model):
    """The model once more, for who gives its parameters up."""
    return dataclasses.replace(model, params=jax.tree.map(jnp.copy, model.params))


# What no log-probability is.
UNSCORED = {
    "no number": float("nan"),
    "no log-probability": -float("inf"),
    "beyond numbers": -1e308,
    "no float": -(10**400),
}


class Script(http.server.BaseHTTPRequestHandler):
    """Answers as `server.faults` says, one entry per request; then truthfully."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang":
            time.sleep(1.5)
        if isinstance(fault, threading.Event):
            fault.wait()
        if fault == "die":
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(fault, int):
            told = {"error": {"message": f"scripted {fault}"}}
            return self._send(fault, told, **{"Retry-After": "0"})
        if fault in ("drip", "drip headers"):
            return self._drip(headers=fault == "drip headers")
        if fault == "redirect":
            return self._send(307, "", Location="http://localhost:1/v1/completions")
        if fault == "gzip":
            return self._send(200, gzip.compress(b" " * 1000), **{"Content-Encoding": "gzip"})
        if fault == "large":
            return self._send(200, " " * 100_000)
        if fault == "not json":
            return self._send(200, "<html>")
        if fault == "many":
            return self._send(200, {"choices": [{}] * 5_000})
        if fault == "deep":
            return self._send(200, "[" * 100_000)
        if fault == "no choices":
            return self._send(200, {"choices": []})
        if fault == "no text":
            return self._send(200, {"choices": [{"text": 7}]})
        answer = self._answer(body, 1 if fault == "one" else body["n"])
        if fault == "half a character":
            answer["choices"][0]["text"] = "\ud83d"
        if isinstance(fault, dict):
            answer["usage"] |= fault
        if isinstance(fault, str) and fault in UNSCORED:
            answer["choices"][0]["logprobs"]["token_logprobs"] = [-0.5, UNSCORED[fault]]
        self._send(200, answer)

    def _answer(self, body, count):
        text = f" So it is. The answer is {len(body['prompt']) % 7}."
        scores = {"token_logprobs": [-0.5, -1.0], "tokens": ["a", "b"]}
        choices = [
            {"index": i, "text": text, "finish_reason": "stop", "logprobs": scores}
            for i in range(count)
        ]
        usage = {
            "prompt_tokens": 10,
            "completion_tokens": 2 * count,
            "total_tokens": 10 + 2 * count,
        }
        return {"id": "x", "object": "text_completion", "created": 0, "model": "m",
                "choices": choices, "usage": usage}  # fmt: skip

    def _drip(self, headers):
        """A byte now and then, for as long as somebody takes them."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n"
        self.wfile.write(head + (b"X: " if headers else b"\r\n"))
        for _ in range(200):
            self.wfile.write(b" ")
            self.server.released.wait(0.1)

    def _send(self, code, value, **headers):
        data = value if isinstance(value, str | bytes) else json.dumps(value)
        data = data if isinstance(data, bytes) else data.encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def scripted():
    """A server: .url, .seen (requests), .faults (set them)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    server.seen, server.faults, server.lock = [], [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()
