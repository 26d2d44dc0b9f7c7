"""Buckets in memory that speak as Google's and Amazon's storage do, as far as we use them."""

import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_request(self, code="-", size="-"):
        self.server.asked.append((self.command, self.path, self.headers.get("range")))

    def log_message(self, *arguments):
        pass

    @property
    def objects(self):
        return self.server.objects

    def body(self):
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def answer(self, code, data=b"", kind="application/octet-stream", **headers):
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def part(self, data):
        """(code, bytes, headers) of a read, whole or of a range."""
        wanted = self.headers.get("range")
        if not wanted:
            return 200, data, {}
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        if first == "":
            start, end = max(0, len(data) - int(last)), len(data)
        else:
            start, end = int(first), min(len(data), int(last) + 1 if last else len(data))
        if start >= len(data):
            return 416, b"", {}
        return 206, data[start:end], {"content_range": f"bytes {start}-{end - 1}/{len(data)}"}

    def parse_request(self):
        """Reads a request; one that is refused is answered."""
        if not super().parse_request():
            return False
        path = urllib.parse.urlparse(self.path).path.removeprefix("/upload")
        bucket = path.removeprefix("/storage/v1/b").split("/")[1]
        if bucket != "bucket":
            self.answer(404, self.no_bucket)
        elif self.server.refused:
            self.answer(403, self.no_right)
        else:
            return True
        return False

    no_bucket = b'{"error": {"code": 404, "message": "The specified bucket does not exist."}}'
    no_right = b'{"error": {"code": 403, "message": "does not have storage.objects.get access"}}'

    def url(self):
        parsed = urllib.parse.urlparse(self.path)
        return parsed.path, dict(urllib.parse.parse_qsl(parsed.query, keep_blank_values=True))


class Gcs(_Handler):
    """The JSON API: upload, read, list, delete; every write is a generation."""

    def described(self, name):
        data, generation = self.objects[name]
        return {"name": name, "generation": str(generation), "size": str(len(data))}

    def name_of(self, path):
        return urllib.parse.unquote(path.split("/o/", 1)[1])

    def do_POST(self):
        _, query = self.url()
        data = self.body()
        self.server.count += 1
        self.objects[query["name"]] = (data, self.server.count)
        self.json(self.described(query["name"]))

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), "application/json")

    def do_GET(self):
        path, query = self.url()
        if "/o/" not in path:
            prefix, start = query.get("prefix", ""), query.get("startOffset", "")
            names = [n for n in sorted(self.objects) if n.startswith(prefix) and n >= start]
            names = [n for n in names if n < query.get("endOffset", "\U0010ffff")]
            return self.json({"items": [self.described(name) for name in names]})
        name = self.name_of(path)
        if name not in self.objects:
            return self.answer(404)
        data, generation = self.objects[name]
        if query.get("alt") != "media":
            return self.json(self.described(name))
        code, data, headers = self.part(data)
        return self.answer(code, data, **headers, x_goog_generation=str(generation))

    def do_DELETE(self):
        self.objects.pop(self.name_of(self.url()[0]), None)
        self.answer(204)


class S3(_Handler):
    """REST with the bucket in the path: put, get, head, list, delete."""

    no_bucket = b"<Error><Code>NoSuchBucket</Code><Message>does not exist</Message></Error>"
    no_right = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

    def name_of(self):
        path, query = self.url()
        _, _, name = urllib.parse.unquote(path).lstrip("/").partition("/")
        return name, query

    def do_PUT(self):
        name, _ = self.name_of()
        data = self.body()
        self.objects[name] = data
        self.answer(200, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def do_GET(self):
        name, query = self.name_of()
        if "list-type" in query:
            names = [n for n in sorted(self.objects) if n.startswith(query.get("prefix", ""))]
            names = [n for n in names if n > query.get("start-after", "")]
            entries = "".join(
                f"<Contents><Key>{n}</Key><Size>{len(self.objects[n])}</Size></Contents>"
                for n in names
            )
            text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
            return self.answer(200, text.encode(), "application/xml")
        if name not in self.objects:
            return self.answer(404, x_amz_bucket_region="us-east-1")
        data = self.objects[name]
        code, part, headers = self.part(data)
        return self.answer(code, part, **headers, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def do_HEAD(self):
        name, _ = self.name_of()
        if name and name not in self.objects:
            return self.answer(404)
        tag = {"ETag": f'"{hashlib.md5(self.objects[name]).hexdigest()}"'} if name else {}
        self.answer(200, x_amz_bucket_region="us-east-1", **tag)

    def do_DELETE(self):
        self.objects.pop(self.name_of()[0], None)
        self.answer(204)


class Bucket:
    """A bucket that runs in this process.

    Attributes:
      url: of it, such as gs://bucket.
      objects: name -> bytes, or (bytes, generation).
      asked: (method, path and query, range) of every request.
    """

    def __init__(self, scheme, server):
        self.url, self._server = f"{scheme}://bucket", server
        self.objects, self.asked = server.objects, server.asked

    def put(self, name, data):
        self._server.count += 1
        self.objects[name] = (data, self._server.count) if self.url.startswith("gs") else data

    def refuse(self, refused=True):
        self._server.refused = refused


@contextlib.contextmanager
def running(scheme, monkeypatch):
    """A Bucket of gs or s3; TensorStore finds it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), {"gs": Gcs, "s3": S3}[scheme])
    server.objects, server.count, server.refused, server.asked = {}, 0, False, []
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield Bucket(scheme, server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
