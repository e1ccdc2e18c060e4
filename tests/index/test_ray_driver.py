"""`lorafind index --engine ray` as a process with its own cluster: quiet, and gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafind.api import Index
from lorafind.demo.make import make
from tests.e2e.tools import command, environment
from tests.index.same import dump, same

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs signals and /proc")

PATIENCE = 120.0


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Enough files that a run takes a while; every content many times."""
    make(tmp_path / "demo")
    (tmp_path / "loras").mkdir()
    for k in range(12):
        for path in (tmp_path / "demo/thin").iterdir():
            shutil.copy2(path, tmp_path / "loras" / f"{path.stem}-{k}.safetensors")
    return tmp_path / "loras"


def wait(until: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows(db: Path) -> int:
    """The files in an index that another process writes."""
    try:
        with sqlite3.connect(f"file:{db}?mode=ro", uri=True) as conn:
            return int(conn.execute("SELECT count(*) FROM files").fetchone()[0])
    except sqlite3.Error:
        return 0


def left(mark: str) -> list[str]:
    """Processes that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_keeps_what_it_has_and_leaves_no_process(
    collection: Path, tmp_path: Path, how: signal.Signals
) -> None:
    db, mark = tmp_path / "x.db", uuid.uuid4().hex
    arguments = command("index", collection, "--engine", "ray", "--no-relations")
    run = subprocess.Popen(
        arguments,
        env=environment(db, LORAFIND_TEST=mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait(lambda: rows(db) or run.poll() is not None)
    # As a terminal does: to the whole group.
    os.killpg(run.pid, how)
    out, err = run.communicate(timeout=PATIENCE)
    assert out == b""
    if how == signal.SIGINT:
        assert run.returncode == 130, err
        assert len(err.splitlines()) <= 2 and b"nterrupted" in err, err
    else:
        assert (run.returncode, err) == (-how, b"")
    wait(lambda: not left(mark))
    every = sum(1 for _ in collection.iterdir())
    assert 0 < rows(db) < every
    with Index.open(db, write=True) as index:
        index.build([collection], device="cpu", relate=False)
        found = dump(index.store)
    with Index.open(tmp_path / "one.db", write=True) as index:
        index.build([collection], device="cpu", relate=False)
        same(found, dump(index.store))


@pytest.mark.slow
def test_a_whole_run_says_what_a_local_one_says(tmp_path: Path) -> None:
    make(tmp_path / "demo")
    run = subprocess.run(
        command("index", tmp_path / "demo/wild", "--engine", "ray", "--no-relations", "--json"),
        env=environment(tmp_path / "x.db", RAY_ADDRESS=""),
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (run.returncode, run.stderr) == (0, b"")
    assert b'"added": 4' in run.stdout


def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    make(tmp_path / "demo")
    run = subprocess.run(
        command(
            *("index", tmp_path / "demo/wild", "--engine", "ray", "--ray-address", "127.0.0.1:9")
        ),
        env=environment(tmp_path / "x.db"),
        capture_output=True,
        timeout=PATIENCE,
    )
    text = run.stderr.decode()
    assert run.returncode == 4, text
    assert text.startswith("lorafind: The Ray cluster 127.0.0.1:9 cannot be joined: "), text
    assert len(text.splitlines()) == 1
