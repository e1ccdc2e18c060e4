"""A Hub on this machine: what huggingface_hub asks of the real one, over HTTP, from memory.

Two servers: the Hub itself, and the storage at another port to which it sends those who ask for a
large file, as the real one does. ``Fault`` makes an answer fail. Every request is written down.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

READER, WRITER = "hf_reads", "hf_writes"
ALICE = "alice/wild"


@dataclass
class Repository:
    """refs: branch → commit; trees: commit → path → bytes; private: for tokens only."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files on top of a branch; its new commit."""
        tree = {**self.trees.get(self.refs.get(branch, ""), {}), **files}
        told = repr((len(self.trees), sorted((k, sha256(v)) for k, v in tree.items())))
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.trees[commit] = tree
        self.refs[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit of a branch, or the commit itself."""
        commit = self.refs.get(revision, revision)
        return commit if commit in self.trees else None


@dataclass
class Fault:
    """What goes wrong with requests whose method and path match, so many times.

    status, headers, body: answer this instead. after: break off when so many bytes of the body are
    sent, with a reset where ``hard``. claimed: say that the body were so long.
    """

    pattern: str
    times: int = 1 << 30
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    after: int | None = None
    hard: bool = False


@dataclass(frozen=True)
class Request:
    """A request, and how many bytes of a body went back."""

    method: str
    path: str
    token: str
    range: str
    sent: int


class HubServer:
    """The Hub. large: files of these endings are stored as LFS objects."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.large: tuple[str, ...] = (".safetensors", ".png")
        #: digest → what the storage hands out in its place
        self.swapped: dict[str, bytes] = {}
        #: whether the storage can begin in the middle of a file
        self.ranges = True
        #: messages of the commits
        self.messages: list[str] = []
        #: path → the size and digest that the Hub states
        self.sizes: dict[str, int] = {}
        self.digests: dict[str, str] = {}
        self._servers = [_Server(("127.0.0.1", 0), handler) for handler in (_Hub, _Storage)]
        for server in self._servers:
            server.hub = self
            Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url, self.storage = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )

    def close(self) -> None:
        """Answer no more."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def asked(self, pattern: str) -> list[Request]:
        """The requests whose method and path match."""
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, f"{method} {path}"):
                fault.times -= 1
                return fault
        return None


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A Hub while the block runs."""
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.close()


def sha256(data: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is nothing to tell of."""


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status = status
        self.headers = {}
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        self.received = self._body()
        self.place = unquote(urlsplit(self.path).path)
        self.fault = self.hub.fault(self.command, self.place)
        try:
            if self.fault and self.fault.status:
                self._answer(self.fault.status, self.fault.body, self.fault.headers)
            else:
                self.respond()
        except _Refused as refused:
            self._answer(refused.status, b"{}", refused.headers)

    def respond(self) -> None:
        raise NotImplementedError

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        cut = self.fault.after if self.fault else None
        sent = b"" if self.command == "HEAD" else body[:cut]
        self.hub.requests.append(
            Request(
                self.command,
                self.place,
                self.headers.get("Authorization", "").removeprefix("Bearer "),
                self.headers.get("Range", ""),
                len(sent),
            )
        )
        self.end_headers()
        self.wfile.write(sent)
        if cut is not None:
            self.wfile.flush()
            if self.fault and self.fault.hard:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
            self.connection.close()


class _Hub(_Handler):
    def respond(self) -> None:
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {self.place}"):
                method(self, *found.groups(default=""))
                return
        raise _Refused(404)

    @property
    def token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", READER, WRITER):
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return token

    def _repository(self, name: str, write: bool = False) -> Repository:
        token = self.token
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not token):
            # Without a token the Hub does not tell what is private from what is not there.
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and token != WRITER:
            raise _Refused(403 if token else 401, "", "You may not write here")
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.find(revision or "main")
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def info(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        commit = self._commit_of(repository, revision)
        files = []
        for path, data in repository.trees[commit].items():
            size = self.hub.sizes.get(path, len(data))
            entry: dict[str, Any] = {"rfilename": path, "size": size, "blobId": _git(data)}
            if path.endswith(self.hub.large):
                entry["lfs"] = {
                    "sha256": self.hub.digests.get(path, sha256(data)),
                    "size": size,
                    "pointerSize": 134,
                }
            files.append(entry)
        self._json(
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repository.private,
                "tags": [],
                "siblings": files,
            }
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        commit = self._commit_of(repository, revision)
        data = repository.trees[commit].get(path)
        if data is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git(data)}"'}
        if not path.endswith(self.hub.large):
            self._answer(200, data, headers)
            return
        digest = sha256(data)
        self.hub.objects[digest] = data
        headers |= {
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.storage}/{digest}?signature=x",
        }
        self._answer(302, b"", headers)

    def create(self) -> None:
        asked = json.loads(self.received)
        name = f"{asked['organization']}/{asked['name']}"
        if self.token != WRITER:
            raise _Refused(403 if self.token else 401, "", "You may not create this")
        told = json.dumps({"url": f"{self.hub.url}/{name}", "name": name}).encode()
        if name in self.hub.repositories:
            self._answer(409, told, {"X-Error-Message": "You already created this model repo"})
            return
        # Version 1 of huggingface_hub says it in another way than later ones.
        made = Repository(asked.get("visibility") == "private" or asked.get("private", False))
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[name] = made
        self._answer(200, told)

    def branch(self, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if branch in repository.refs:
            raise _Refused(409)
        repository.refs[branch] = repository.refs["main"]
        self._json({})

    def validate(self) -> None:
        text = json.loads(self.received)["content"]
        if "license: forbidden" in text:
            problem = {"errors": [{"message": '"license" must be one of [mit, …]'}]}
            body = json.dumps(problem).encode()
            self._answer(400, body, {"Content-Type": "application/json"})
            return
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        self._commit_of(repository, revision)
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(self.hub.large) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(self.received)["files"]
                ]
            }
        )

    def batch(self, name: str) -> None:
        self._repository(name, write=True)
        self._json(
            {
                "transfer": "basic",
                "objects": [
                    {
                        "oid": wanted["oid"],
                        "size": wanted["size"],
                        "actions": {
                            "upload": {"href": f"{self.hub.storage}/{wanted['oid']}"},
                            "verify": {"href": f"{self.hub.url}/verify"},
                        },
                    }
                    for wanted in json.loads(self.received)["objects"]
                ],
            }
        )

    def verify(self) -> None:
        asked = json.loads(self.received)
        if len(self.hub.objects[asked["oid"]]) != asked["size"]:
            raise _Refused(422)
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        files: dict[str, bytes] = {}
        for line in map(json.loads, self.received.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                self.hub.messages.append(value["summary"])
        commit = repository.commit(files, revision)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})


class _Storage(_Handler):
    def respond(self) -> None:
        digest = self.place.strip("/")
        if self.command == "PUT":
            if sha256(self.received) != digest:
                raise _Refused(400)
            self.hub.objects[digest] = self.received
            self._answer(200, b"")
            return
        data = self.hub.swapped.get(digest, self.hub.objects.get(digest))
        if data is None:
            raise _Refused(403)
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin is None or not self.hub.ranges:
            self._answer(200, data)
            return
        start = int(begin[1])
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self._answer(206, data[start:], headers)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (rf"GET /api/models/{_NAME}(?:/revision/(.+))?", _Hub.info),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Hub.resolve),
    (r"POST /api/repos/create", _Hub.create),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Hub.branch),
    (r"POST /api/validate-yaml", _Hub.validate),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Hub.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Hub.batch),
    (r"POST /verify", _Hub.verify),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Hub.commit),
)


def _git(data: bytes) -> str:
    """The name of a blob in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
