"""A scripted teacher, a tiny model that speaks, and a server with scripted faults."""

import dataclasses
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
            return self._send(fault, {"error": {"message": f"scripted {fault}"}}, retry="0")
        if fault == "not json":
            return self._send(200, "<html>")
        if fault == "no choices":
            return self._send(200, {"choices": []})
        if fault == "no text":
            return self._send(200, {"choices": [{"text": 7}]})
        answer = self._answer(body, 1 if fault == "one" else body["n"])
        if fault == "half a character":
            answer["choices"][0]["text"] = "\ud83d"
        if fault == "no number":
            answer["choices"][0]["logprobs"]["token_logprobs"] = [-0.5, float("nan")]
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

    def _send(self, code, value, retry=None):
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry is not None:
            self.send_header("Retry-After", retry)
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
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
