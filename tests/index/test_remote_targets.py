"""URLs where a command takes a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafind.api import Index
from lorafind.demo.make import make
from lorafind.files.outcome import NotAnAdapter
from lorafind.search.compare import compare
from lorafind.search.info import info
from lorafind.search.whatis import whatis
from tests.remote import Store

THIN = Path(make.__code__.co_filename).parent / "data" / "thin"
URL = "s3://collection/demo/{}.safetensors"


@pytest.fixture
def index(bucket: Store, tmp_path: Path) -> Any:
    """An index of all that the demo has of thin ones but the first; that is in the bucket alone."""
    first, *rest = sorted(THIN.glob("lobster*"))
    bucket.put("demo/first.safetensors", first.read_bytes())
    for path in rest:
        bucket.put(f"demo/in/{path.name}", path.read_bytes())
    with Index.open(tmp_path / "x.db", write=True) as made:
        made.build(["s3://collection/demo/in"])
        bucket.requests.clear()
        yield made


def test_a_url_that_the_index_lacks_is_read(index: Index, bucket: Store, tmp_path: Path) -> None:
    local = sorted(THIN.glob("lobster*"))[0]
    ours = [(n.path, n.score) for n in index.similar(URL.format("first"))]
    assert ours == [(n.path, n.score) for n in index.similar(str(local))] and ours
    assert bucket.reads("first") == ["bytes=0-40575"]
    answer, other = whatis(index.store, URL.format("first")), whatis(index.store, str(local))
    assert answer.path == URL.format("first") and answer.outcome == "lora"
    assert answer.relations == other.relations


def test_a_url_that_the_index_has_is_not_read(index: Index, bucket: Store) -> None:
    url = URL.format("in/lobster-train-02")
    assert list(index.similar(url)) and whatis(index.store, url).indexed
    assert index.ask(url.replace("s3://", "S3A://")).path == url
    assert bucket.reads() == []
    assert {method for method, *_ in bucket.requests} == {"HEAD"}


def test_what_is_not_there(index: Index) -> None:
    with pytest.raises(NotAnAdapter) as caught:
        index.ask(URL.format("none"))
    assert caught.value.outcome == "vanished" and URL.format("none") in caught.value.reason
    assert whatis(index.store, URL.format("none")).outcome == "vanished"
    with pytest.raises(NotAnAdapter) as caught:
        index.ask("s3://collection/demo/in")
    assert caught.value.outcome == "inaccessible"


def test_info_and_compare_say_of_a_url_what_they_say_of_the_file(bucket: Store) -> None:
    one, two = sorted(THIN.glob("lobster*"))[:2]
    bucket.put(f"demo/{one.name}", one.read_bytes())
    bucket.put(f"demo/{two.name}", two.read_bytes())
    urls = [URL.format(path.stem) for path in (one, two)]
    there, here = info(urls[0], keys=True), info(one, keys=True)
    assert there.pop("path") == urls[0] and here.pop("path") == str(one)
    assert there == here
    assert info(urls[0], header_only=True)["ranks"] == here["ranks"]
    far, near = compare(*urls), compare(one, two)
    assert [side["path"] for side in (far["a"], far["b"])] == urls
    for row in (far, near):
        assert row["words"].pop("A") and row["words"].pop("B")
        for side in ("a", "b"):
            del row[side]["path"]
    assert far == near


def test_the_command_line(index: Index, bucket: Store, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lorafind", "--db", str(tmp_path / "cli.db"), *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=120,
        )

    made = run("index", "s3://collection/demo/in/", "--no-relations", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["added"] == 5
    listed = run("ls", "-0").stdout.split("\0")
    assert URL.format("in/lobster-train-02") in listed
    assert (
        "s3://collection/demo/in is no longer in the index"
        in run("index", "--forget", "s3://collection/demo/in").stderr
    )
    refused = run("index", "s3://me:hush@collection/demo")
    assert refused.returncode == 4
    assert "password" in refused.stderr and "hush" not in refused.stderr
