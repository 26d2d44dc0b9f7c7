"""A server that reports prompt_logprobs as vLLM does, or spoils them."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from jaxdistill.models.byte_tokenizer import byte_tokenizer

V = 257  # as many as the byte tokenizer has


def logprobs_of(tokens):
    """[N, V] of a teacher that knows the last token only."""
    logits = np.random.default_rng(0).normal(size=(V, V))[np.asarray(tokens)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def entries(tokens, k):
    """vLLM's prompt_logprobs: the text's own token is there, likely or not."""
    told = [None]
    for row, token in zip(logprobs_of(tokens)[:-1], tokens[1:], strict=True):
        best = np.argsort(-row)[:k]
        ids = [token, *(int(one) for one in best if one != token)]
        told.append({str(one): {"logprob": float(row[one]), "rank": 1} for one in ids})
    return told


class Server(ThreadingHTTPServer):
    """Answers completions; `spoil` changes what it says, `code` refuses."""

    spoil = staticmethod(lambda told: told)
    code, most = 200, 20

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        code, k = self.server.code, body["prompt_logprobs"]
        if code == 200 and k > self.server.most:
            code = 400
        tokens = body["prompt"]
        if isinstance(tokens, str):
            tokens = byte_tokenizer()(tokens)["input_ids"]
        told = self.server.spoil(entries(tokens, k))
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": told}
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "total_tokens": 0}
        reply = {"choices": [choice], "usage": usage, "object": "text_completion", "id": "1",
                 "created": 1, "model": "m"}  # fmt: skip
        if code != 200:
            reply = {"error": {"message": f"prompt logprobs of {k}, more than 20"}}
        data = json.dumps(reply).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def running():
    """A server on a free port."""
    made = Server()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()
