"""`export --push` against a stand-in for the Hub: what it is asked, and what arrives there."""

import base64
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from jaxdistill.errors import ConfigError
from jaxdistill.formats import hub

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PUSH = (
    "import sys, pathlib; from jaxdistill.formats import hub\n"
    "from jaxdistill.errors import StorageError\n"
    "try: print(hub.push(pathlib.Path(sys.argv[1]), sys.argv[2]))\n"
    "except StorageError as error: sys.exit(str(error))\n"
)


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes of the Hub that an upload asks; weights go through LFS."""

    def do_POST(self):  # noqa: N802
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append((self.path, self.headers.get("Authorization")))
        root = f"http://127.0.0.1:{hub.server_port}"
        if hub.refuses:
            return self.answer(403, {"error": "you may not write here"})
        if self.path == "/api/repos/create":
            hub.made = json.loads(body)
            return self.answer(200, {"url": f"{root}/me/small"})
        if self.path.startswith("/api/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            kind = lambda name: "lfs" if name.endswith(".safetensors") else "regular"
            files = [
                {"path": f["path"], "uploadMode": kind(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{root}/store/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.store[value["oid"]]
            found = {"commitUrl": f"{root}/me/small/commit/abc", "commitOid": "abc"}
            return self.answer(200, found | {"success": True})
        return self.answer(404, {"error": self.path})

    def do_PUT(self):  # noqa: N802
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.store[hashlib.sha256(data).hexdigest()] = data
        self.answer(200, {})

    def do_GET(self):  # noqa: N802
        self.server.asked.append((self.path, None))
        self.answer(404, {"error": "nothing there"})

    def answer(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.asked, made.files, made.store, made.made, made.refuses = [], {}, {}, None, False
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def push(server, path):
    kept = {
        k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    environment = {
        **kept,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_" + "a" * 34,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(REPOSITORY),
    }
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(path), "me/small"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_folder_arrives_as_it_is_in_a_private_repository(server, tmp_path):
    files = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 40, "a.txt": b"a"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = push(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/small/commit/abc")
    assert server.files == files
    assert server.made == {"name": "small", "organization": "me", "visibility": "private"}
    assert all(token and "hf_aaa" in token for path, token in server.asked if "/commit/" in path)


def test_a_refusal_is_one_message_that_names_the_remedy_and_no_token(server, tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    server.refuses = True
    done = push(server, tmp_path)
    assert done.returncode == 1 and server.files == {}
    assert "--push me/small: the Hub did not take it" in done.stderr
    assert "hf auth login" in done.stderr and "hf_aaa" not in done.stderr + done.stdout


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "a b", "-x", "a/", "https://x/y"])
def test_names_that_are_no_repository_are_refused_first(name):
    with pytest.raises(ConfigError, match="--push"):
        hub.check(name)
