"""Clients for tests of the server: well-mannered ones, and sockets that send any bytes."""

import json
import socket
import time
import urllib.error
import urllib.request

SLOTS, LENGTH = 4, 128
KEY = "a-key-of-the-tests"
JSON = "Content-Type: application/json\r\n"


def post(port, path, body, key=KEY, **headers):
    """(status, answer) of a POST to a route."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"} | named
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def raw(body, headers=JSON + "Connection: close\r\n", start="POST /v1/completions"):
    """The bytes of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{start} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def connected(port):
    """A connection."""
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def talk(port, data):
    """Everything that the server says to these bytes until it closes the connection."""
    said = b""
    with connected(port) as line:
        line.sendall(data)
        while piece := line.recv(65536):
            said += piece
    return said


def status(said):
    """The status of an answer."""
    assert said.startswith(b"HTTP/1.1 "), said
    return int(said[9:12])


def until(condition, seconds=30.0):
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
