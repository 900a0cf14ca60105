"""Fake Hugging Face hub on the loopback interface: serves repository files over HTTP."""

import base64
import hashlib
import http.server
import json
import threading
import time
from pathlib import Path
from urllib.parse import unquote

COMMIT = "5" * 40


class Hub(http.server.ThreadingHTTPServer):
    """HTTP server that implements the hub's downloads, and uploads of small files.

    Attributes:
        files: dict from (repository, file) to the path that is served.
        requests: list of (method, repository, file) in order.
        etags: dict from a file's path to an ETag other than its sha256.
        cut: number of bytes after which the connection is closed.
        size: the size to announce instead of the true one.
        stall: seconds to wait before the bytes of a file.
        status: HTTP status of every response.
        headers: dict of headers that are added to every response, or replace the usual ones.
        endless: whether to send more bytes than announced.
        folder: directory for uploaded files.
        created: list of the requests that create a repository.
        tokens: set of the Authorization headers of uploads.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.etags = {}, [], {}
        self.cut = self.size = self.status = None
        self.stall, self.headers, self.endless = 0, {}, False
        self.folder, self.created, self.tokens = None, [], set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.hashes = {}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, repository, file, path):
        self.files[repository, file] = Path(path)

    def etag(self, path):
        with self.lock:
            if path not in self.hashes:
                with open(path, "rb") as content:
                    self.hashes[path] = hashlib.file_digest(content, "sha256").hexdigest()
            return self.etags.get(path, self.hashes[path])

    def downloads(self, file="model.safetensors"):
        """Returns the number of GET requests for a file."""
        return sum(method == "GET" and name == file for method, _, name in self.requests)

    def handle_error(self, request, client_address):
        """Ignores errors of clients that disconnect during a response."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def do_POST(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if hub.status:
            return self.refuse(hub.status)
        hub.tokens.add(self.headers.get("Authorization"))
        *_, action, _ = parts = self.path.strip("/").split("/")
        if action == "repos":
            hub.created.append(json.loads(body))
            told = {"url": f"{hub.url}/someone/flowers"}
        elif action == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            told = {
                "files": [
                    {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files
                ]
            }
        else:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.receive("/".join(parts[2:4]), **entry["value"])
            told = {
                "commitUrl": f"{hub.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}",
                "commitOid": COMMIT,
            }
        data = json.dumps(told).encode()
        self.begin(200, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def receive(self, repository, content, path, encoding):
        place = self.server.folder / repository / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(base64.b64decode(content))
        self.server.add(repository, path, place)

    def answer(self, with_body):
        hub = self.server
        parts = unquote(self.path).strip("/").split("/")
        repository, file = "/".join(parts[:2]), "/".join(parts[4:])
        hub.requests.append((self.command, repository, file))
        if hub.status:
            return self.refuse(hub.status)
        if len(parts) < 5 or parts[2] != "resolve":
            return self.refuse(404)
        if repository not in {known for known, _ in hub.files}:
            return self.refuse(401, "RepoNotFound")
        if parts[3] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if (repository, file) not in hub.files:
            return self.refuse(404, "EntryNotFound")
        self.send(hub.files[repository, file], with_body)

    def refuse(self, status, code=None):
        headers = {"Content-Length": "0"}
        if code:
            headers["X-Error-Code"] = code
        if code in ("RevisionNotFound", "EntryNotFound"):
            headers["X-Repo-Commit"] = COMMIT
        self.begin(status, headers)

    def begin(self, status, headers):
        self.send_response(status)
        for name, value in (headers | self.server.headers).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def send(self, path, with_body):
        hub = self.server
        total = hub.size or path.stat().st_size
        start = 0
        if requested := self.headers.get("Range"):
            start = int(requested.removeprefix("bytes=").partition("-")[0])
        headers = {
            "ETag": f'"{hub.etag(path)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Length": str(total - start),
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if hub.endless and with_body:
            headers |= {"Content-Length": None, "Connection": "close"}
        self.begin(206 if start else 200, headers)
        if not with_body:
            return
        time.sleep(hub.stall)
        end = total if hub.cut is None else hub.cut
        with open(path, "rb") as content:
            content.seek(start)
            while start < end and (chunk := content.read(min(1 << 20, end - start))):
                self.wfile.write(chunk)
                start += len(chunk)
        if hub.endless:
            self.wfile.write(bytes(1 << 20))
        self.close_connection = self.close_connection or start < total or hub.endless
