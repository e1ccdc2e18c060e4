"""One writer, whoever it is and however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorafind.index.lock import WriterLock
from lorafind.index.problem import IndexProblem
from lorafind.index.store import Store
from tests.unprivileged import needs_permissions, open_folder, unprivileged

HOLD = """
import sys, os, time
from pathlib import Path
from lorafind.index.lock import WriterLock
lock = WriterLock(Path(sys.argv[1]))
child = 0
if sys.argv[2] == "fork":
    started, start = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(start, b"x")
        time.sleep(60)
    os.read(started, 1)
sys.stdout.write(f"held {child}\\n")
sys.stdout.flush()
time.sleep(60)
"""


def hold(index: Path, how: str = "alone") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(index), how], stdout=subprocess.PIPE, text=True
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_a_second_writer_is_told_who_holds_it(tmp_path: Path) -> None:
    index = tmp_path / "i.db"
    Store.open(index, "write").close()
    process = hold(index)
    try:
        assert line(process) == "held 0"
        with pytest.raises(IndexProblem) as caught:
            Store.open(index, "write")
        assert f"process {process.pid} on {socket.gethostname()}" in str(caught.value)
        Store.open(index).close()
    finally:
        process.kill()
        process.communicate()
    WriterLock(index).release()


def test_it_is_free_after_release_and_not_before(tmp_path: Path) -> None:
    index = tmp_path / "i.db"
    first = WriterLock(index)
    with pytest.raises(IndexProblem, match=f"process {os.getpid()}"):
        WriterLock(index)
    first.release()
    first.release()
    second = WriterLock(index)
    second.release()
    assert [path.name for path in tmp_path.iterdir()] == ["i.db.lock"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_parent_leaves_no_lock_with_its_children(tmp_path: Path) -> None:
    index = tmp_path / "i.db"
    process = hold(index, "fork")
    child = int(line(process).split()[1])
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)
        WriterLock(index).release()
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


@needs_permissions
def test_a_folder_that_cannot_be_written() -> None:
    with open_folder() as folder:
        folder.chmod(0o555)
        with unprivileged():
            started = time.monotonic()
            with pytest.raises(IndexProblem, match=r"cannot be written .*--db"):
                Store.open(folder / "i.db", "write")
            assert time.monotonic() - started < 5
