"""The server: its answers are the engine's, for its own client and for wrong requests."""

import http.client
import json
import re
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import pytest

from jaxdistill.errors import ModelError
from jaxdistill.models.requests import Completion
from jaxdistill.models.text import text_of
from jaxdistill.reasoning.asking import Job, SamplingParams
from jaxdistill.serve import serving, streaming, web
from tests.reasoning import teachers

talker = teachers.talker


@contextmanager
def serving_at(server):
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(talker):
    service = serving.Service(talker, slots=4, length=128)
    with serving_at(web.make_server(service, port=0, key="secret")) as url:
        yield url
    service.close()


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
    (expected,) = talker.complete(
        ["Hello"], samples=3, max_new_tokens=10, temperature=0.8, seed=5, slots=4
    )
    texts = [text_of(talker.tokenizer, done) for done in expected]
    assert code == 200 and [c["text"] for c in reply["choices"]] == texts
    for choice, done in zip(reply["choices"], expected, strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(done.logprobs, abs=1e-5)
        assert choice["finish_reason"] == done.reason
    assert reply["usage"]["prompt_tokens"] == 5
    again = _post(f"{server}/v1/completions", body | {"logprobs": None})[1]
    assert [c["text"] for c in again["choices"]] == texts
    assert again["choices"][0]["logprobs"] is None


def test_our_client_reads_our_server(server, talker):
    pytest.importorskip("openai", reason="needs the extra api")
    import collections

    from jaxdistill.reasoning.served import Api

    api = Api(f"{server}/v1", "any", key="secret", concurrency=5)
    settings = SamplingParams(max_new_tokens=6, temperature=1.0, top_k=20, stop=("zz",))
    jobs = collections.deque(Job(f"q{n}", "ab" * (n + 1), settings, count=2) for n in range(6))
    answers = list(api.ask(jobs))
    assert len(answers) == 12 and not any(answer.failed for answer in answers)
    assert all(answer.logprob < 0 and answer.tokens <= 6 for answer in answers)
    assert api.spent()["tokens_out"] == sum(answer.tokens for answer in answers)


@pytest.mark.parametrize(
    ("path", "change", "code", "words"),
    [
        ("completions", {"stream": True, "logprobs": 1}, 400, "logprobs: do not come in a stream"),
        ("completions", {"stream": True, "max_tokens": 4000}, 400, "do not fit the"),
        ("completions", {"n": 0}, 400, "n: 0 must be from 1 to 256"),
        ("completions", {"n": "many"}, 400, "n: 'many' must be a number"),
        ("completions", {"prompt": ""}, 400, "prompt: must be one text"),
        ("completions", {"temperature": -1}, 400, "temperature: -1.0 must be 0 or more"),
        ("completions", {"max_tokens": 4000}, 400, "do not fit the"),
        ("completions", {"seed": -1}, 400, "seed: -1 must be"),
        ("chat/completions", {"messages": []}, 400, "messages: must be a list"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "every turn needs"),
        ("poems", {}, 404, "no such path"),
        ("completions", {"temperature": 10**400}, 400, "is too large"),
        ("completions", {"max_tokens": 10**30}, 400, "do not fit the"),
        ("completions", {"top_k": 10**30}, 400, "top_k"),
        ("completions", {"n": 10**300}, 400, "must be from 1 to 256"),
        ("completions", {"stop": ["a"] * 17}, 400, "stop: must be at most 16"),
        ("completions", {"stop": {"a": 1}}, 400, "stop: must be at most 16"),
        ("completions", {"stop": "a" * 300}, 400, "stop: must be at most 16"),
        ("completions", {"prompt": "\ud800"}, 400, "lone surrogate"),
        ("completions", {"prompt": "\0"}, 400, "NUL"),
        ("completions", {"prompt": "a" * 5000}, 400, "do not fit the"),
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
        (b'{"prompt": "x", "temperature": NaN}', "application/json"),
        (b'{"prompt": "x", "prompt": "y"}', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"1" * 10_000, "application/json"),
        (b" " * (web.MAX_BODY + 1), "application/json"),
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


def test_special_tokens_in_a_request_stay_text(talker, monkeypatch):
    service = serving.Service(talker, slots=1, length=128)
    end = talker.tokenizer.eos_token_id
    assert talker.tokenizer("a<end>b")["input_ids"].count(end) == 1  # what is to be avoided
    assert end not in service.request({"prompt": "a<end>b"}, chat=False).tokens
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    monkeypatch.setattr(talker.tokenizer, "chat_template", template)
    body = {"messages": [{"role": "user", "content": "a<end>b"}]}
    tokens = service.request(body, chat=True).tokens
    assert tokens.count(end) == 1 and tokens[-1] == end  # the template's own
    assert talker.tokenizer.decode(tokens) == "user:a<end>b<end>"
    service.close()


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
    first = web.make_server(service, port=0)
    with pytest.raises(ModelError, match="port must be 0-65535"):
        web.make_server(service, port=65536)
    with pytest.raises(ModelError, match="cannot be had"):
        web.make_server(service, port=first.server_address[1])
    first.server_close()


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai", reason="needs the extra api")
    with openai.OpenAI(base_url=f"{server}/v1", api_key="secret", max_retries=0) as client:
        yield client


def _texts(stream, count=1):
    """The pieces of every sample, the reasons, and the events."""
    pieces, reasons, events = [[] for _ in range(count)], [None] * count, list(stream)
    for event in events:
        for choice in event.choices:
            pieces[choice.index].append(choice.text)
            assert reasons[choice.index] is None  # nothing follows the last piece
            reasons[choice.index] = choice.finish_reason
    return pieces, reasons, events


def test_a_stream_adds_up_to_the_whole(client):
    asked = {"model": "any", "prompt": "Hello", "max_tokens": 60, "n": 3, "seed": 5}
    whole = client.completions.create(**asked)
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    pieces, reasons, events = _texts(stream, 3)
    assert ["".join(texts) for texts in pieces] == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert min(map(len, pieces)) > 2  # it came piece by piece
    assert events[-1].usage == whole.usage and len({event.id for event in events}) == 1


def test_a_stream_holds_back_what_may_become_a_stop_string(client):
    asked = {"model": "any", "prompt": "Hello", "max_tokens": 60, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[25:55]  # begins in one call of the engine and ends in a later one
    place = text.index(stop)
    (pieces,), (reason,), _ = _texts(client.completions.create(**asked, stop=[stop], stream=True))
    assert ("".join(pieces), reason) == (text[:place], "stop")
    assert len(pieces) > 1
    never = stop[:-1] + chr(1)  # nearly comes: what was held back is told in the end
    (pieces,), (reason,), _ = _texts(client.completions.create(**asked, stop=[never], stream=True))
    assert ("".join(pieces), reason) == (text, "length")


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one, STO", ("STOP",), "one, "),
        ("one, STOP", ("STOP!",), "one, "),
        ("aaab", ("ab!", "aaabc"), ""),
        ("S S", ("S T", "SS"), "S "),
        ("all of it", ("STOP",), "all of it"),
        ("all of it", (), "all of it"),
        ("caf\ufffd", (), "caf"),
        ("", ("x",), ""),
    ],
)
def test_what_is_shown_stays(text, stops, shown):
    assert streaming.settled(text, stops) == shown
    for size in range(len(text) + 1):  # what was shown of a shorter text is never taken back
        assert text.startswith(streaming.settled(text[:size], stops))


def test_a_chat_streams_as_openai_does(talker):
    request = serving.Request([1, 2], max_new_tokens=3)
    stream = streaming.Stream(request, live=True)
    stream.hear(0, "Yes")
    stream.end(Completion(request, 0, [1, 2, 3], [0.0] * 3, "stop", True), "Yes.")
    events = list(streaming.events(stream, {"id": "a"}, chat=True, usage=False))
    told = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    assert [one["choices"][0]["delta"] for one in told] == [
        {"role": "assistant", "content": "Yes"},
        {"content": "."},
    ]
    assert [one["choices"][0]["finish_reason"] for one in told] == [None, "stop"]
    assert events[-1] == b"data: [DONE]\n\n" and stream.closed


def test_a_client_that_goes_frees_its_slots(talker):
    service = serving.Service(talker, slots=1, length=128)
    body = {"prompt": "Hello", "max_tokens": 100, "stream": True, "temperature": 0}
    events = service.stream(body, chat=False)
    next(events)
    events.close()
    short = service.complete(serving.Request([65], max_new_tokens=2))
    assert len(short[0].tokens) == 2 and not service._generator.busy
    service.close()


def _talk(server, data):
    """What the server says to bytes that no client would send; it may hang up before their end."""
    host, port = re.fullmatch(r"http://(.*):(\d+)", server).groups()
    said = b""
    with socket.create_connection((host, int(port)), timeout=60) as line, suppress(OSError):
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        while piece := line.recv(4096):
            said += piece
    return said


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\xff\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: [::1\r\n\r\n",
    ],
)
def test_broken_requests_are_refused_and_serving_goes_on(server, data, capfd):
    said = _talk(server, data)
    assert not said.startswith(b"HTTP") or 400 <= int(said[9:12]) < 500
    assert _post(f"{server}/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_page_of_another_site_is_not_answered(server):
    """DNS rebinding: a browser that was told that evil.example is 127.0.0.1 says so in Host."""
    with serving_at(web.make_server(Broken(), port=0)) as keyless:
        for name, code in (("evil.example", 403), ("localhost:1", 200), ("[::1]:8000", 200)):
            request = f"GET /health HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()
            assert int(_talk(keyless, request)[9:12]) == code
            assert int(_talk(server, request)[9:12]) == 200  # a page does not know the key


def _held(port):
    """A connection that the server keeps open: the one before may not be given back yet."""
    for _ in range(100):
        line = socket.create_connection(("127.0.0.1", port))
        line.settimeout(0.3)
        try:
            line.recv(1)  # returns where the server has closed it
        except TimeoutError:
            return line
        except OSError:
            pass
        line.close()
    raise AssertionError("no connection is free")


def test_connections_and_waiting_samples_are_bounded(talker, monkeypatch):
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(serving, "MAX_PENDING", 3)
    service = serving.Service(talker, slots=1, length=32)
    with serving_at(web.make_server(service, port=0)) as url:
        code, reply = _post(f"{url}/v1/completions", {"prompt": "x", "n": 4})
        assert code == 503 and "try again later" in reply["error"]["message"]
        assert service._pending == 0
        port = int(url.rpartition(":")[2])
        with _held(port), _held(port):
            with pytest.raises((urllib.error.URLError, http.client.HTTPException, OSError)):
                urllib.request.urlopen(f"{url}/health", timeout=30)
        for _ in range(100):
            with suppress(OSError, http.client.HTTPException):
                with urllib.request.urlopen(f"{url}/health", timeout=30) as reply:
                    assert json.loads(reply.read()) == {"status": "ok"}
                break
            threading.Event().wait(0.1)
        else:
            raise AssertionError("closed connections are not given back")
    service.close()


class Broken:
    name = "broken"

    def answer(self, body, chat):
        raise KeyError("secret detail")

    stream = answer


def test_a_mistake_of_ours_is_one_line_and_no_traceback(capfd):
    with serving_at(web.make_server(Broken(), port=0)) as url:
        code, reply = _post(f"{url}/v1/completions", {})
        assert code == 500 and "secret" not in json.dumps(reply)
        assert capfd.readouterr().err == "serve: KeyError: 'secret detail'\n"


def test_only_this_machine_is_told_apart():
    for name in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST"):
        assert web.is_loopback(name)
    for name in ("0.0.0.0", "::", "localhost.evil.example", "10.0.0.1", "", None):
        assert not web.is_loopback(name)
    server = web.make_server(Broken(), port=0)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()
