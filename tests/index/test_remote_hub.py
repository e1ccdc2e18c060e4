"""``hf://`` through huggingface_hub's own filesystem, against a server that speaks as the Hub does.

Endpoints as HfFileSystem of huggingface_hub 2 asks them: repository, tree, paths-info, resolve.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from lorafind.demo.make import make

pytest.importorskip("fsspec")

THIN = Path(make.__code__.co_filename).parent / "data" / "thin"
REPOSITORY = "someone/loras"


class Hub(ThreadingHTTPServer):
    """One repository. asked: method and path of every request, and its range."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []

    def entry(self, path: str) -> dict[str, Any]:
        """A file as the tree tells of it; without the date, which the tree gives on demand only."""
        data = self.files[path]
        digest = hashlib.sha256(data).hexdigest()
        return {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
            "lfs": {"oid": digest, "size": len(data), "pointerSize": 134},
        }

    def below(self, folder: str) -> list[dict[str, Any]]:
        """The entries of a folder."""
        start = f"{folder}/" if folder else ""
        names = {p[len(start) :].split("/")[0] for p in self.files if p.startswith(start)}
        return [
            self.entry(start + name)
            if start + name in self.files
            else {"type": "directory", "path": start + name, "size": 0, "oid": "0" * 40}
            for name in sorted(names)
        ]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Tests read the requests from the list."""

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        found = re.fullmatch(rf"/api/models/{REPOSITORY}(/revision/[^/]+)?", path)
        if found:
            told = {"id": REPOSITORY, "sha": "a" * 40, "private": False, "siblings": []}
            return self.answer(200, json.dumps(told).encode())
        if found := re.fullmatch(rf"/api/models/{REPOSITORY}/tree/[^/]+/?(.*)", path):
            rows = hub.below(found[1])
            if not rows:
                return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
            return self.answer(200, json.dumps(rows).encode())
        if re.fullmatch(rf"/api/models/{REPOSITORY}/paths-info/[^/]+", path):
            text = body.decode()
            try:
                paths = json.loads(text)["paths"]
            except ValueError:
                paths = parse_qs(text)["paths"]
            rows = []
            for name in [paths] if isinstance(paths, str) else paths:
                if name in hub.files:
                    rows.append(hub.entry(name))
                elif hub.below(name):
                    rows.append({"type": "directory", "path": name, "size": 0, "oid": "0" * 40})
            return self.answer(200, json.dumps(rows).encode())
        if found := re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/(.*)", path):
            data = hub.files.get(found[1])
            if data is None:
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                part = data[int(span[1]) : int(span[2]) + 1]
                where = f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(data)}"
                return self.answer(206, part, Content_Range=where, X_Repo_Commit="a" * 40)
            return self.answer(200, data, X_Repo_Commit="a" * 40, ETag='"x"')
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_POST = do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user of that Hub would run it."""
    own = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "lorafind", "--db", str(home / "x.db"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | own,
        timeout=120,
    )


def test_a_repository_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    names = sorted(THIN.glob("lobster*"))[:3]
    hub.files = {f"styles/{path.name}": path.read_bytes() for path in names}
    hub.files["README.md"] = b"# LoRAs"
    hub.files["styles/lobster-train-01.txt"] = b"write LBSTR"
    url = f"hf://{REPOSITORY}"
    made = run(hub, tmp_path, "index", url, "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["added"] == 3
    loaded = [path for method, path, span in hub.asked if span and path.endswith(".safetensors")]
    assert len(loaded) == len(set(loaded)) == 3
    hub.asked.clear()
    again = json.loads(run(hub, tmp_path, "index", "--json").stdout)
    assert (again["unchanged"], again["refreshed"], again["gone"]) == (3, 0, 0)
    assert not [path for _, path, _ in hub.asked if "/resolve/" in path]
    listed = json.loads(run(hub, tmp_path, "ls", "--json").stdout)
    assert listed[0]["path"] == f"{url}/styles/lobster-train-01.safetensors"
    data = bytearray(hub.files["styles/lobster-train-02.safetensors"])
    data[-2] ^= 1
    hub.files["styles/lobster-train-02.safetensors"] = bytes(data)
    del hub.files["styles/lobster-train-03.safetensors"]
    found = json.loads(run(hub, tmp_path, "index", "--json").stdout)
    assert (found["unchanged"], found["refreshed"], found["gone"]) == (1, 1, 1)
    unknown = run(hub, tmp_path, "index", "hf://someone/else")
    assert unknown.returncode == 4 and "hf://someone/else" in unknown.stderr
