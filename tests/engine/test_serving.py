"""The server: its answers are the engine's, for its own client and for wrong requests."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from jaxdistill.engine import serving
from jaxdistill.errors import ModelError
from jaxdistill.models.generate import complete
from jaxdistill.reasoning.asking import Job, Settings
from tests.reasoning import teachers

talker = teachers.talker


@pytest.fixture(scope="module")
def server(talker):
    service = serving.Service(talker, slots=4, length=128)
    server = serving.make_server(service, port=0, key="secret")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    service.close()
    thread.join()


def _post(url, body, key="secret", kind="application/json"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": kind, "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_completions_are_the_engines(server, talker):
    body = {"prompt": "Hello", "max_tokens": 10, "temperature": 0.8, "n": 3, "seed": 5,
            "logprobs": 0, "model": "any"}  # fmt: skip
    code, reply = _post(f"{server}/v1/completions", body)
    (expected,) = complete(
        talker, ["Hello"], samples=3, max_new_tokens=10, temperature=0.8, seed=5, slots=4
    )
    assert code == 200 and [c["text"] for c in reply["choices"]] == [d.text for d in expected]
    for choice, done in zip(reply["choices"], expected, strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(done.logprobs, abs=1e-5)
        assert choice["finish_reason"] == done.reason
    assert reply["usage"]["prompt_tokens"] == 5
    again = _post(f"{server}/v1/completions", body | {"logprobs": None})[1]
    assert [c["text"] for c in again["choices"]] == [d.text for d in expected]
    assert again["choices"][0]["logprobs"] is None


def test_our_client_reads_our_server(server, talker):
    pytest.importorskip("openai", reason="needs the extra api")
    import collections

    from jaxdistill.reasoning.api import Api

    api = Api(f"{server}/v1", "any", key="secret", concurrency=5)
    settings = Settings(max_new_tokens=6, temperature=1.0, top_k=20, stop=("zz",))
    jobs = collections.deque(Job(f"q{n}", "ab" * (n + 1), settings, count=2) for n in range(6))
    answers = list(api.ask(jobs))
    assert len(answers) == 12 and not any(answer.failed for answer in answers)
    assert all(answer.logprob < 0 and answer.tokens <= 6 for answer in answers)
    assert api.spent()["tokens_out"] == sum(answer.tokens for answer in answers)


@pytest.mark.parametrize(
    ("path", "change", "code", "words"),
    [
        ("completions", {"stream": True}, 400, "stream: is not supported"),
        ("completions", {"n": 0}, 400, "n: 0 must be from 1 to 256"),
        ("completions", {"n": "many"}, 400, "n: 'many' must be a number"),
        ("completions", {"prompt": ""}, 400, "prompt: must be one text"),
        ("completions", {"temperature": -1}, 400, "temperature: -1.0 must be 0 or more"),
        ("completions", {"max_tokens": 4000}, 400, "do not fit the"),
        ("completions", {"seed": -1}, 400, "seed: -1 must be"),
        ("chat/completions", {"messages": []}, 400, "messages: must be a list"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "every turn needs"),
        ("poems", {}, 404, "no such path"),
    ],
)
def test_wrong_requests_are_told(server, path, change, code, words):
    body = {"prompt": "x", "max_tokens": 4} | change
    found, reply = _post(f"{server}/v1/{path}", body)
    assert found == code and words in reply["error"]["message"]


def test_keys_bodies_and_kinds_are_checked(server):
    body = {"prompt": "x", "max_tokens": 1}
    assert _post(f"{server}/v1/completions", body, key="wrong")[0] == 401
    for data, kind in (
        (b"{", "application/json"),
        (b"[1]", "application/json"),
        (b"{}", "text/plain"),
    ):
        assert _post(f"{server}/v1/completions", data, kind=kind)[0] == 400
    with urllib.request.urlopen(f"{server}/health", timeout=30) as reply:
        assert json.loads(reply.read()) == {"status": "ok"}


def test_requests_at_the_same_time_share_the_engine(server):
    found = {}

    def one(number):
        body = {"prompt": "a" * (number + 1), "max_tokens": 12, "seed": number, "n": 2}
        found[number] = _post(f"{server}/v1/completions", body)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = _post(
        f"{server}/v1/completions", {"prompt": "aaa", "max_tokens": 12, "seed": 2, "n": 2}
    )
    assert all(code == 200 for code, _ in found.values())
    texts = lambda reply: [choice["text"] for choice in reply["choices"]]
    assert texts(found[2][1]) == texts(alone[1])


def test_an_engine_that_stops_leaves_nobody_waiting(talker, monkeypatch):
    service = serving.Service(talker, slots=1, length=32)
    request = serving.Request([65], max_new_tokens=4)
    monkeypatch.setattr(service._generator, "step", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(ModelError, match="engine has stopped"):
        service.complete(request)
    service._thread.join(timeout=10)
    with pytest.raises(ModelError, match="engine has stopped: start it again"):
        service.complete(request)
    first = serving.make_server(service, port=0)
    with pytest.raises(ModelError, match="cannot be had"):
        serving.make_server(service, port=first.server_address[1])
    first.server_close()
