"""A hub on this machine: what `huggingface_hub` asks of the real one, both ways, and failures on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".undo")
"""Files that go to the store of large files."""


@dataclass
class Repo:
    """A repository: branches of files, as bytes."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)
    heads: dict[str, str] = field(default_factory=dict)
    """Commits of branches; of `main` the last of `commits` where it is not among them."""
    gated: bool = False

    def files(self, commit: str) -> dict[str, bytes]:
        """Return the files of a commit."""
        return self.branches[next((branch for branch, head in self.heads.items() if head == commit), "main")]


@dataclass
class Failure:
    """An answer instead of the right one; `times` of them. A status of 0 hangs up."""

    method: str
    path: str
    status: int
    times: int
    after: int = 0


@dataclass
class Hub:
    """The state of the hub and what was asked of it."""

    token: str = "hf_a_secret_of_these_tests"
    may_write: bool = True
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def fail(self, method: str, path: str, status: int, times: int = 10**6, after: int = 0) -> None:
        """Answer requests of a path (a regular expression) with a status, once `after` of them went well."""
        self.failures.append(Failure(method, path, status, times, after))

    def uploads(self) -> list[str]:
        """Return the hashes of the files that were sent to the store, in order."""
        return [path.rpartition("/")[2] for method, path in self.asked if method == "PUT"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        self.hub.asked.append((self.command, path))
        for failure in self.hub.failures:
            if self.command == failure.method and re.search(failure.path, path) and failure.times > 0:
                if failure.after > 0:
                    failure.after -= 1
                    continue
                failure.times -= 1
                if failure.status:  # a server that repeats what it was given
                    said = f"failed for {self.headers.get('Authorization', '')}"
                    self._say(failure.status, {"error": said}, {"X-Error-Message": said})
                self.close_connection = True
                return
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found:
                getattr(self, name)(body, *found.groups())
                return
        self._say(404, {"error": f"no such address: {self.command} {path}"})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _say(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def _known(self, write: bool = True) -> bool:
        """Whether the request carries the token, and may write; answers it if not."""
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            wrong = "Invalid credentials in Authorization header"
            self._say(401, {"error": wrong}, {"X-Error-Message": wrong})
            return False
        if write and not self.hub.may_write:
            self._say(403, {"error": "the token has no write permission"})
            return False
        return True

    # ------------------------------------------------------------------------------------------------- addresses

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        if "license: nonsense" in content:
            self._say(400, {"errors": [{"message": '"license" must be one of [...]'}], "warnings": []})
        else:
            self._say(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, name: str) -> None:
        if not self._known(write=False):
            return
        repo = self.hub.repos.get(name)
        if repo is None:
            self._say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            sha = repo.commits[-1] if repo.commits else "0" * 40
            self._say(200, {"id": name, "private": repo.private, "sha": sha, "siblings": [], "tags": []})

    def create(self, body: bytes) -> None:
        if not self._known():
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if name in self.hub.repos:
            self._say(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(bool(private))
        self._say(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if self._known():
            repo = self.hub.repos[name]
            status = 409 if branch in repo.branches else 200
            repo.branches.setdefault(branch, dict(repo.branches["main"]))
            self._say(status, {} if status == 200 else {"error": "Reference already exists"})

    def preupload(self, body: bytes, name: str, branch: str) -> None:
        if self._known():
            modes = [(f["path"], "lfs" if f["path"].endswith(LARGE) else "regular") for f in json.loads(body)["files"]]
            self._say(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})

    def batch(self, body: bytes, name: str) -> None:
        if not self._known():
            return
        found = []
        for one in json.loads(body)["objects"]:
            href = f"{self.hub.url}/store/{one['oid']}?signature=of-the-store"
            wanted = {} if one["oid"] in self.hub.blobs else {"actions": {"upload": {"href": href}}}
            found.append({**one, **wanted})
        self._say(200, {"transfer": "basic", "objects": found})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        assert "Authorization" not in self.headers, "the token was sent to the store"
        self.hub.blobs[oid] = body
        self._say(200, {})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        if not self._known():
            return
        repo = self.hub.repos[name]
        files = repo.branches[branch]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        repo.commits.append(hashlib.sha1(body).hexdigest())
        oid = repo.commits[-1]
        self._say(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    # ------------------------------------------------------------------------------------------- what is downloaded

    def resolved(self, body: bytes, name: str, revision: str) -> None:
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo is None or (repo.private and not known):
            self._say(404 if known else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        heads = {"main": repo.commits[-1], **repo.heads}
        if repo.gated:
            self._say(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
        elif revision not in heads and revision not in heads.values():
            self._say(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._say(200, {"id": name, "sha": heads.get(revision, revision), "siblings": [], "tags": []})

    def tree(self, body: bytes, name: str, commit: str) -> None:
        files = self.hub.repos[name].files(commit)
        self._say(200, [{"type": "file", "path": p, "size": len(b), "oid": _oid(b)} for p, b in files.items()])

    def head(self, body: bytes, name: str, commit: str, path: str) -> None:
        self._file(name, commit, path, whole=False)

    def file(self, body: bytes, name: str, commit: str, path: str) -> None:
        self._file(name, commit, path, whole=True)

    def _file(self, name: str, commit: str, path: str, *, whole: bool) -> None:
        data = self.hub.repos[name].files(commit)[path]
        self.send_response(200)
        for key, value in (("Content-Length", len(data)), ("ETag", f'"{_oid(data)}"'), ("X-Repo-Commit", commit)):
            self.send_header(key, str(value))
        self.end_headers()
        if whole:
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/models/{_REPO}", "info"),
    ("GET", rf"/api/models/{_REPO}/revision/(.+)", "resolved"),
    ("GET", rf"/api/models/{_REPO}/tree/(.+)", "tree"),
    ("HEAD", rf"/{_REPO}/resolve/(\w+)/(.+)", "head"),
    ("GET", rf"/{_REPO}/resolve/(\w+)/(.+)", "file"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", "branch"),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", "preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/store/(\w+)", "store"),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", "commit"),
)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub on a free port of this machine inside the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
