"""The server: its answers are the engine's, for its own client and for wrong requests."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from jaxdistill.engine import serving, streaming
from jaxdistill.errors import ModelError
from jaxdistill.models.generate import complete
from jaxdistill.models.generator import Completion
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
    stream.end(Completion(request, 0, [1, 2, 3], [0.0] * 3, "stop", "Yes.", True))
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
