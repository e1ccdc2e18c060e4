"""A store for tests: moto's S3 on this machine, with every request written down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: Where the server keeps what nobody has put into a bucket of its own.
BUCKET = "collection"


@dataclass
class Store:
    """A running server. requests: (method, path with query); before: called with each of them."""

    endpoint: str
    client: Any
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    before: Callable[[str, str], None] = lambda method, path: None

    def connect(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Let this process reach the server, as a user would: by the environment alone."""
        import s3fs

        settings = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_CONFIG_FILE": str(home / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(home / "none"),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        self.requests.clear()

    def empty(self) -> None:
        """Remove every object."""
        self.before = lambda method, path: None
        while found := self.client.list_objects_v2(Bucket=BUCKET).get("Contents"):
            for row in found:
                self.delete(row["Key"])

    def put(self, key: str, data: bytes) -> None:
        """Make or overwrite an object."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def put_tree(self, folder: Path, prefix: str) -> None:
        """Every file of a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def delete(self, key: str) -> None:
        """Remove an object."""
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def reads(self, key: str = "") -> list[str]:
        """The ranges of the GETs of objects whose key contains a text, in their order."""
        return [
            span
            for method, path, span in self.requests
            if method == "GET" and "list-type" not in path and "?" not in path and key in path
        ]


@contextmanager
def serving() -> Iterator[Store]:
    """A server with an empty bucket. Credentials and endpoint are for the caller to set."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: object) -> None:
            """Tests read the requests from the list."""

    inner = DomainDispatcherApplication(create_backend_app)
    made: list[Store] = []

    def application(environ: dict[str, Any], start: Any) -> Any:
        query = environ.get("QUERY_STRING", "")
        path = environ["PATH_INFO"] + (f"?{query}" if query else "")
        # The client that fills the bucket is not what is tested.
        if made and "filling" not in environ.get("HTTP_USER_AGENT", ""):
            made[0].requests.append(
                (environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE", ""))
            )
            made[0].before(environ["REQUEST_METHOD"], path)
        return inner(environ, start)

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        from botocore.config import Config

        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="id",
            aws_secret_access_key="secret",
            config=Config(user_agent_extra="filling"),
        )
        client.create_bucket(Bucket=BUCKET)
        made.append(Store(endpoint, client))
        yield made[0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
