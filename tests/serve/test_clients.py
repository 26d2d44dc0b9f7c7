"""Clients that are no good: pages of other sites, smugglers, those that drip, burst and hang up."""

import collections
import gc
import json
import resource
import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from jaxdistill.errors import ModelError
from jaxdistill.serve import app, connection, engine, listening, origin, service
from tests.serve.clients import (
    JSON,
    LENGTH,
    SLOTS,
    connected,
    post,
    raw,
    status,
    talk,
    until,
)

SHORT = {"prompt": "x", "max_tokens": 1}
LONG = {"prompt": "x", "max_tokens": 100, "n": 256}
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
FOREIGN = {"Host": "evil.example", "Origin": "https://evil.example"}


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ("Content-Type: application/json", 200),
        ("Content-Type: application/json; charset=UTF-8", 200),
        (JSON + "Content-Encoding: identity", 200),
        (JSON + "Content-Encoding: gzip", 415),
        ("Content-Type: text/plain;x=json", 415),
        ("Content-Type: multipart/form-data; boundary=json", 415),
        ("Content-Type: application/json; x=y", 415),
        ("", 415),
        (JSON + "Origin: http://localhost", 200),
        (JSON + "Origin: https://evil.example", 403),
        (JSON + "Origin: null", 403),
        (JSON + "Origin: http://localhost:1", 403),
        (JSON + "Sec-Fetch-Site: cross-site", 403),
        (JSON + "Sec-Fetch-Site: same-site", 403),
        (JSON + "Sec-Fetch-Site: same-origin", 200),
    ],
)
def test_a_page_of_another_site_cannot_ask(port, headers, code):
    headers = headers.strip() + "\r\n" if headers else ""
    assert status(talk(port, raw(SHORT, headers + "Connection: close\r\n"))) == code


def test_names_that_a_stranger_may_own_are_not_answered_to(port, locked):
    """DNS rebinding: a browser that was told that evil.example is 127.0.0.1 says so in Host."""
    for name, code in (
        ("evil.example", 403),
        ("localhost:1", 200),
        ("[::1]:8000", 200),
        ("[::1", 403),
        ("evil.example@localhost", 403),
        ("localhost@evil.example", 403),
        ("localhost:1@evil.example", 403),
        ("localhost/evil.example", 403),
        ("localhost#evil.example", 403),
        ("localhost?evil.example", 403),
        ("localhost\\evil.example", 403),
        ("localhost evil.example", 403),
        ("localhost,evil.example", 403),
        ("localhost:x", 403),
        ("localhost:", 403),
        (":80", 403),
        ("10.0.0.1", 403),
    ):
        request = HEALTH.replace(b"localhost", name.encode())
        assert status(talk(port, request)) == code
        assert status(talk(locked, request)) == 200  # a page does not know the key
    assert origin.is_own("10.0.0.1") and origin.is_own("teacher") and origin.is_own("::1")
    assert not origin.is_own("evil.example") and not origin.is_own("")
    for name in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST"):
        assert origin.is_loopback(name)
    for name in ("0.0.0.0", "::", "localhost.evil.example", "10.0.0.1", "", None):
        assert not origin.is_loopback(name)


def test_keys_bodies_and_routes_are_checked(locked):
    assert post(locked, "/v1/completions", SHORT, key="wrong")[0] == 401
    assert post(locked, "/v1/completions", SHORT)[0] == 200
    assert post(locked, "/v1/poems", {})[0] == 404
    assert post(locked, "/v1/models", {})[0] == 405
    assert status(talk(locked, HEALTH.replace(b"/health", b"/v1/models"))) == 401
    for data, code in (
        (b"{", 400),
        (b"[1]", 400),
        (b'{"prompt": "x", "temperature": NaN}', 400),
        (b'{"prompt": "x", "prompt": "y"}', 400),
        (b"[" * 100_000, 400),
        (b"\xff\xfe", 400),
        (b"1" * 10_000, 400),
        (b" " * (app.MAX_BODY + 1), 413),
    ):
        assert post(locked, "/v1/completions", data)[0] == code


def _head(more, start="POST /v1/completions"):
    return f"{start} HTTP/1.1\r\nHost: localhost\r\n{JSON}{more}\r\n\r\n".encode()


def test_a_request_is_never_two(port, monkeypatch):
    framing_problem = connection.framing_problem
    two, body = raw(SHORT), json.dumps(SHORT).encode()
    size = len(body)
    for data in (
        _head(f"Content-Length: {len(two)}", "GET /health"),
        _head("Transfer-Encoding: chunked", "GET /health") + b"0\r\n\r\n",
        _head(f"Transfer-Encoding: chunked\r\nContent-Length: {size}") + body,
        _head(f"Content-Length: {size}\r\nContent-Length: {size + len(two)}") + body,
        _head(f"Content-Length: {size}\r\nContent-Length: {size}") + body,
        _head(f"Content-Length: {size}\r\ncontent-length:{size}") + body,
        _head(f"Content-Length: {size}, {size}") + body,
        _head(f"Content-Length: {size}\r\n , {size}") + body,
        _head("Transfer-Encoding:\r\n chunked")
        + f"{size:x}\r\n".encode()
        + body
        + b"\r\n0\r\n\r\n",
        _head(f"X: a\n\tb\r\nContent-Length: {size}") + body,
        _head(f"Content-Length: {size}\r\nContent-Type: text/plain") + body,
        _head(f"Content-Length: {size}\r\nOrigin: null\r\nOrigin: http://localhost") + body,
        _head(f"Content-Length: {size}\r\nHost: evil.example") + body,
        _head(f"Content-Length: +{size}") + body,
        _head(f"Content-Length : {size}") + body,
        _head("Transfer-Encoding: xchunked") + body,
    ):
        said = talk(port, data + two)
        assert status(said) == 400 and said.count(b"HTTP/1.1 ") == 1, said
        assert json.loads(said.split(b"\r\n\r\n")[1])["error"]["code"] == 400
    looked = []
    look = lambda head: looked.append(head) or framing_problem(head)
    monkeypatch.setattr(connection, "framing_problem", look)
    with connected(port) as line:  # a byte at a time is seen as well, once the last one is there
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in _head(f"Content-Length: {size}\r\nContent-Length: {size}"):
            line.sendall(bytes([byte]))
        assert status(line.recv(65536)) == 400 and len(looked) == 1
    said = talk(port, raw(SHORT | {"prompt": "Content-Length: 1\r\nContent-Length: 1"}))
    assert status(said) == 200  # a body may say what it likes
    said = talk(port, _head(f"Content-Length: {size}") + body + two)  # the second in haste
    assert status(said) == 200 and said.count(b"HTTP/1.1 ") == 1
    chunked = _head("Transfer-Encoding: chunked\r\nConnection: close")
    said = talk(port, chunked + f"{size:x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
    assert status(said) == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\0\xff\r\n\r\n",
        _head("Content-Length: -1"),
        _head("Content-Length: 999999999"),
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"POST http://evil.example/v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_broken_requests_are_refused_and_serving_goes_on(port, data, capfd):
    said = b""
    with suppress(ConnectionError):  # cut off while it sends
        said = talk(port, data)
    assert not said or 400 <= status(said) < 500
    assert post(port, "/v1/completions", SHORT)[0] == 200
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_work_for_others(port, served, stream):
    lines = [connected(port) for _ in range(16)]
    for line in lines:
        line.sendall(raw(LONG | {"stream": stream}))
    lines[0].sendall(b"more")  # what comes too early must not hide that the client goes
    until(lambda: served.engine.pending == 16 * 256)
    code, reply = post(port, "/v1/completions", SHORT)
    assert code == 503 and "try again later" in reply["error"]["message"]
    for line in lines:
        line.close()
    until(lambda: served.engine.pending == 0)
    assert post(port, "/v1/completions", SHORT)[0] == 200
    until(lambda: not served.engine._generator.busy)


def test_a_burst_is_answered_or_told_to_come_again(port, monkeypatch):
    monkeypatch.setattr(engine, "MAX_PENDING", 60)
    found = collections.Counter()

    def one():
        said = talk(port, raw({"prompt": "x", "max_tokens": 30}))
        found[status(said), b"retry-after: 1" in said.lower()] += 1

    threads = [threading.Thread(target=one) for _ in range(150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found.values()) == 150 and set(found) == {(200, False), (503, True)}


def test_what_drips_has_one_deadline_for_the_whole_request(port, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.5)
    body = _head("Content-Length: 100")
    with ExitStack() as held:
        lines = [held.enter_context(connected(port)) for _ in range(20)]
        for number, line in enumerate(lines):
            line.sendall((b"", b"POST / HTTP/1.1\r\nX: ", body)[number % 3])
        left = set(lines)
        end = time.monotonic() + 20
        while left:
            assert time.monotonic() < end, "it holds its connection for ever"
            assert status(talk(port, HEALTH)) == 200
            for line in list(left):
                try:
                    line.sendall(b"a" if lines.index(line) % 3 else b"")
                    line.settimeout(0.01)
                    if not line.recv(4096):
                        left.remove(line)
                except TimeoutError:
                    pass
                except OSError:
                    left.remove(line)


def test_a_body_in_tiny_pieces_is_refused_before_it_costs_seconds(port):
    """Half a million pieces of one byte would keep everybody waiting for some seconds."""
    body = json.dumps(SHORT).encode().ljust(connection.MAX_CHUNKS)
    chunked = lambda data: b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n"
    head = _head("Transfer-Encoding: chunked\r\nConnection: close")
    assert status(talk(port, head + chunked(body))) == 200
    said = talk(port, head + chunked(body + b" "))
    assert status(said) == 400 and b"at most 4096 chunks" in said


def test_what_is_refused_is_forgotten_at_once(port, chatting):
    """An error that holds its own frame keeps all that was read until Python looks for cycles."""
    size = 50_003
    kept = lambda: sum(type(one) is list and len(one) >= size for one in gc.get_objects())
    gc.collect()
    gc.disable()
    try:
        before = kept()
        turns = [{"role": "user", "content": "a" * size}]
        for path, body in (
            ("/v1/completions", {"prompt": "a" * size}),
            ("/v1/completions", {"prompt": [1] * size}),
            ("/v1/chat/completions", {"messages": turns}),
        ):
            assert post(port, path, body)[0] == 400
        until(lambda: kept() == before, 5)
    finally:
        gc.enable()


def test_a_burst_as_long_as_the_queue_is_told_to_come_again(port, monkeypatch):
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert min(files, 2304) == min(most, 2304) if most != resource.RLIM_INFINITY else files >= 2304
    monkeypatch.setattr(resource, "getrlimit", lambda _: (260, 260))
    assert connection._most_told() == 4
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10_000, 10_000))
    assert connection._most_told() == listening.BACKLOG


def test_too_many_connections_are_told_so_and_the_latest_make_room(port, monkeypatch):
    until(lambda: status(talk(port, HEALTH)) == 200)
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(connected(port))
        models = HEALTH.replace(b"/health", b"/v1/models")
        until(lambda: status(talk(port, models)) == 503)
        assert status(talk(port, HEALTH)) == 200
        said = talk(port, raw(b" " * 500_000))
        assert status(said) == 503 and b"retry-after: 1" in said
        monkeypatch.setattr(connection, "_LATE", 0.0)
        assert status(talk(port, models)) == 200


def test_who_does_not_read_is_cut_off(port, served, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.5)
    size, answered = 20_000_000, threading.Event()  # more than the kernel takes

    def reply(asked, found):
        answered.set()
        return {"text": "a" * size}

    monkeypatch.setattr(served, "reply", reply)
    with socket.socket() as line:
        line.settimeout(30)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", port))
        line.sendall(raw(SHORT))
        assert answered.wait(30)
        time.sleep(2)
        read = 0
        with suppress(ConnectionError):
            while piece := line.recv(65536):
                read += len(piece)
    assert 0 < read < size


def test_a_mistake_of_ours_is_one_line_and_no_traceback(port, served, monkeypatch, capfd):
    def broken(given, chat):
        raise KeyError("secret detail\x1b[2J")

    monkeypatch.setattr(served, "read", broken)
    code, reply = post(port, "/v1/completions", SHORT)
    assert code == 500 and "secret" not in json.dumps(reply)
    assert capfd.readouterr().err == "serve: KeyError: 'secret detail\\x1b[2J'\n"


def test_an_engine_that_stops_leaves_nobody_waiting(talker, monkeypatch):
    made = service.Service(talker, slots=SLOTS, length=LENGTH)
    monkeypatch.setattr(made.engine._generator, "step", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with listening.running(app.make_app(made, key=None), listening.bind("127.0.0.1", 0)) as port:
        assert status(talk(port, HEALTH)) == 200
        said = talk(port, raw(SHORT | {"stream": True}))
        assert b"engine has stopped" in said and b"[DONE]" not in said
        until(lambda: not made.engine.alive)
        code, reply = post(port, "/v1/completions", SHORT)
        assert code == 503 and "start it again" in reply["error"]["message"]
        assert status(talk(port, HEALTH)) == 503
    assert made.engine.pending == 0


def test_a_port_that_cannot_be_had_is_told():
    with listening.bind("127.0.0.1", 0) as first:
        assert first.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ModelError, match="port must be 0-65535"):
            listening.bind("127.0.0.1", 65536)
        with pytest.raises(ModelError, match="cannot be had: Address already in use"):
            listening.bind("127.0.0.1", first.getsockname()[1])


def test_the_port_is_checked_before_the_model_is_loaded(monkeypatch):
    from jaxdistill import commands
    from jaxdistill.serve import command

    monkeypatch.setattr(command, "load_any", lambda *_, **__: pytest.fail("it was loaded"))
    with listening.bind("127.0.0.1", 0) as first:
        with pytest.raises(ModelError, match="cannot be had"):
            command.serve("a-model", commands.Serve(port=first.getsockname()[1]))


def test_no_more_tokens_than_the_model_was_made_for(talker, monkeypatch):
    from jaxdistill import commands
    from jaxdistill.serve import command

    longest = talker.config.max_positions
    monkeypatch.setattr(command, "load_any", lambda *_, **__: talker)
    monkeypatch.setattr(type(talker), "consume_per_layer", lambda self: self)
    with pytest.raises(
        ModelError, match=f"length: {longest + 1} tokens are more than the {longest}"
    ):
        command.serve("a-model", commands.Serve(port=0, length=longest + 1))
