"""A server on this machine that speaks the file endpoints of the Hugging Face Hub, and fails on demand.

Two ports: the hub, and the storage host to which it sends whoever reads a large file. Everything that is asked for is
written down, with the bytes of the answer's body.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
LARGE = (".safetensors", ".bin")
TOKEN = "hf_a_secret"


@dataclass
class Repo:
    """One repository: folders by commit, commits by revision, and who may read it."""

    folders: dict
    revisions: dict = field(default_factory=lambda: {"main": COMMIT})
    is_gated: bool = False


@dataclass
class Asked:
    """One request and what became of it."""

    host: str
    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    n_bytes: int = 0


class FakeHub:
    """The hub and its storage host; `faults` are used up by the requests for bytes of large files, in order.

    `changed` are headers, by host, that every answer has as they are here, or lacks where they are None.
    """

    def __init__(self):
        self.repos = {}
        self.asked = []
        self.faults = []
        self.every = None
        self.api_faults = []
        self.redirects = True
        self.expired = set()
        self.etags = {}
        self.changed = {}
        self._lock = threading.Lock()
        self._servers = {name: self._serve(name) for name in ("hub", "storage")}

    def _serve(self, name):
        handler = type("Handler", (_Handler,), {"hub": self, "name": name})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    def close(self):
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def address(self, name="hub"):
        return f"http://127.0.0.1:{self._servers[name].server_port}"

    def add(self, repo, folder, **how):
        """Serves a folder as `repo` at COMMIT."""
        self.repos[repo] = Repo({COMMIT: Path(folder)}, **how)
        return repo

    def etag(self, file):
        """Stands for the digest of a file, which would take long to compute for a large sparse one."""
        facts = file.stat()
        made = hashlib.sha256(f"{file} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()
        return self.etags.get(file.name, made if file.name.endswith(LARGE) else made[:40])

    def next_fault(self):
        with self._lock:
            return self.faults.pop(0) if self.faults else self.every

    def note(self, asked):
        with self._lock:
            self.asked.append(asked)

    def reset(self):
        self.asked.clear()

    @property
    def n_bytes(self):
        """Bytes of bodies sent."""
        return sum(asked.n_bytes for asked in self.asked)

    def paths(self, *, host=None):
        return [asked.path for asked in self.asked if host in (None, asked.host)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        return  # a client that has read enough hangs up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        return

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        parts = urlsplit(self.path)
        token = self.headers.get("authorization")
        self.asked = Asked(self.name, self.command, unquote(parts.path), self.headers.get("range"), token)
        if parts.path == "/api/agent-harnesses":  # huggingface_hub's own question, once in a process, if at all
            return self._send(404)
        self.hub.note(self.asked)
        if self.name == "storage":
            return self._storage(parts)
        if self.asked.path.startswith("/api/models/"):
            return self._api(self.asked.path.removeprefix("/api/models/"))
        repo, _, rest = self.asked.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        return self._resolve(repo, revision, name)

    def _api(self, path):
        if self.hub.api_faults:
            fault = self.hub.api_faults.pop(0)
            return self._send(*fault) if isinstance(fault, tuple) else self._send(fault)
        repo, _, revision = path.partition("/revision/")
        if repo not in self.hub.repos:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        found = self.hub.repos[repo]
        commit = found.revisions.get(revision, revision)
        if commit not in found.folders:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for file in sorted(found.folders[commit].rglob("*")):
            if file.is_file():
                name = str(file.relative_to(found.folders[commit]))
                entry = {"rfilename": name, "size": file.stat().st_size, "blobId": self.hub.etag(file)[:40]}
                if name.endswith(LARGE):
                    entry["lfs"] = {"size": entry["size"], "sha256": self.hub.etag(file), "pointerSize": 134}
                siblings.append(entry)
        body = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
        return self._send(200, {"Content-Type": "application/json"}, body)

    def _resolve(self, repo, revision, name):
        if repo not in self.hub.repos:
            return self._send(401, {"X-Error-Code": "RepoNotFound"})
        found = self.hub.repos[repo]
        if found.is_gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"})
        file = found.folders[found.revisions.get(revision, revision)] / name
        if not file.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        facts = {"X-Repo-Commit": found.revisions.get(revision, revision)}
        if name.endswith(LARGE) and self.hub.redirects:
            size, etag = file.stat().st_size, self.hub.etag(file)
            facts |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size)}
            place = f"{self.hub.address('storage')}/blobs{file}?signature=1"
            return self._send(302, {**facts, "Location": place}, b"Found. Redirecting")
        return self._file(file, facts)

    def _storage(self, parts):
        if self.hub.expired and parse_qs(parts.query)["signature"][0] in self.hub.expired:
            self.hub.expired.clear()
            return self._send(403)
        return self._file(Path(self.asked.path.removeprefix("/blobs")), {})

    def _file(self, file, headers):
        fault = self.hub.next_fault() if self.command == "GET" and file.name.endswith(LARGE) else None
        if isinstance(fault, tuple):
            return self._send(*fault)
        size = file.stat().st_size
        headers = {**headers, "ETag": f'"{self.hub.etag(file)}"', "Accept-Ranges": "bytes"}
        span = self.headers.get("range")
        if self.command == "HEAD":
            return self._send(200, headers, length=size)
        if span is None or fault == "ignores ranges":
            with open(file, "rb") as stream:
                return self._send(200, headers, stream.read() if span is None else b"", length=size)
        start, stop = (int(text) for text in span.removeprefix("bytes=").split("-"))
        if start >= size:
            return self._send(416, {"Content-Range": f"bytes */{size}"})
        last = min(stop, size - 1)
        with open(file, "rb") as stream:
            stream.seek(start)
            body = stream.read(last + 1 - start)
        match fault:
            case "cut":
                return self._send(206, headers | {"Content-Range": _says(start, last, size)}, body[: len(body) // 2],
                                  length=len(body))  # fmt: skip
            case "short":
                half = max(1, len(body) // 2)
                headers |= {"Content-Range": _says(start, start + half - 1, size)}
                return self._send(206, headers, body[:half])
            case "too long":
                return self._send(206, headers | {"Content-Range": _says(start, last, size)}, body + b"!")
            case "elsewhere":
                return self._send(206, headers | {"Content-Range": _says(start + 8, last + 8, size)}, body)
            case "grown":
                return self._send(206, headers | {"Content-Range": _says(start, last, size + 8)}, body)
            case "no content range":
                return self._send(206, headers, body)
            case "compressed":
                headers |= {"Content-Range": _says(start, last, size), "Content-Encoding": "gzip"}
                return self._send(206, headers, body)
            case "other etag":
                headers |= {"Content-Range": _says(start, last, size), "ETag": '"' + "f" * 64 + '"'}
                return self._send(206, headers, body)
            case _:
                return self._send(206, headers | {"Content-Range": _says(start, last, size)}, body)

    def _send(self, status, headers=None, body=b"", *, length=None):
        self.asked.status, self.asked.n_bytes = status, len(body)
        self.send_response(status)
        shown = {**(headers or {}), "Content-Length": str(len(body) if length is None else length)}
        for name, value in {**shown, **self.hub.changed.get(self.name, {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        is_whole = self.command == "HEAD" or length in (None, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)
        if not is_whole or self.hub.changed:  # closed unannounced, it would fail whatever is sent next on it
            self.close_connection = True


def _says(first, last, size):
    return f"bytes {first}-{last}/{size}"
