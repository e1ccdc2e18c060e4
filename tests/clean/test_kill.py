"""SIGKILL at any moment of a run: nothing is lost, and undo or a second run ends well."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clean.conftest import Shelf, contents, snapshot

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
ROOT = Path(__file__).resolve().parents[2]
KINDS = ("move", "drive", "trash", "link")

#: The run in a process of its own, which kills itself right before its n-th change of the disk
#: (as the interpreter announces them; none for 0) and writes how many there were.
CHILD = """
import os, signal, sys
from lorafind.api import Index
from lorafind.clean.apply import How
moment, top, what, kind, folder = int(sys.argv[1]), *sys.argv[2:]
count = 0
def hook(event, given):
    global count
    if event in ("os.link", "os.symlink", "os.rename", "os.remove", "os.mkdir", "os.truncate") or (
        event == "open" and isinstance(given[2], int)
        and given[2] & (os.O_WRONLY | os.O_RDWR) and str(given[0]).startswith(top)
        and ".db-" not in str(given[0])
    ):
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
with Index.open(top + "/i.db", write=True) as index:
    import lorafind.clean.apply, lorafind.clean.undo, lorafind.clean.plan
    sys.addaudithook(hook)
    if what == "apply":
        list(index.apply(top + "/plan.json", How(kind, folder)))
    else:
        [list(index.undo(log)) for log in reversed(index.undo_logs())]
print(count)
"""


def child(shelf: Shelf, moment: int, what: str, kind: str, folder: Path) -> int:
    """One run; returns the number of moments, 0 where it was killed."""
    how = "move" if kind == "drive" else kind
    place = str(folder) if how == "move" else ""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(moment), str(shelf.top), what, how, place],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(shelf.top / "data")},
        timeout=60,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return int(done.stdout) if done.returncode == 0 else 0


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Path]:
    """A drive of its own."""
    folder = tmp_path / "drive"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def kept(shelf: Shelf, before: dict[str, tuple[str, int]], *more: Path) -> None:
    """Every content is somewhere, and every keeper is untouched where it was."""
    now = snapshot(shelf.loras)
    assert contents(shelf.loras, shelf.top / "data", *more) >= {d for d, _ in before.values()}
    for path, facts in before.items():
        if "keep" in path:
            assert now[path] == facts


def check(shelf: Shelf, chance: random.Random, kind: str, folder: Path, rounds: int) -> None:
    """Kill runs, and then either undo or run again."""
    before = snapshot(shelf.loras)
    shelf.plan()
    total = child(shelf, 0, "apply", kind, folder)
    after = snapshot(shelf.loras)
    # Without the records of the trash, which hold the time.
    outside = contents(folder, shelf.top / "data") & {digest for digest, _ in before.values()}
    assert after != before
    undoing = child(shelf, 0, "undo", kind, folder)
    assert snapshot(shelf.loras) == before
    assert total > 8 and undoing > 4
    killed = 0
    for _ in range(rounds):
        # A later run may need a few steps less, for its folders are there.
        killed += not child(shelf, chance.randint(1, total), "apply", kind, folder)
        kept(shelf, before, folder)
        if chance.random() < 0.5:
            child(shelf, 0, "apply", kind, folder)
            assert snapshot(shelf.loras) == after
            assert contents(folder, shelf.top / "data") >= outside
            left = (shelf.loras, folder, shelf.top / "data")
            assert not [p for place in left for p in place.rglob(".lorafind-*")]
        # The undoing is killed as well, and then done.
        child(shelf, chance.randint(1, undoing), "undo", kind, folder)
        kept(shelf, before, folder)
        shelf.undo()
        assert snapshot(shelf.loras) == before
        assert not contents(folder, shelf.top / "data")
        shutil.rmtree(folder if kind == "move" else shelf.top / "data", ignore_errors=True)
    assert killed > rounds / 2


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_three_moments(kind: str, shelf: Shelf, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("drive") if kind == "drive" else shelf.out
    check(shelf, random.Random(kind), kind, folder, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_fifty_moments(kind: str, shelf: Shelf, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("drive") if kind == "drive" else shelf.out
    check(shelf, random.Random(7), kind, folder, 50)


def killed_by_the_clock(shelf: Shelf, chance: random.Random, rounds: int) -> None:
    """The program itself, killed from outside while it works."""
    before = snapshot(shelf.loras)
    plan = shelf.plan()
    command = [sys.executable, "-m", "lorafind", "--db", str(shelf.db), "apply", str(plan)]
    command += ["--move", str(shelf.out), "--yes"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    whole = time.monotonic() - began
    shelf.undo()
    for _ in range(rounds):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Most of the time goes by before the first act.
        time.sleep(whole * chance.uniform(0.5, 1))
        process.kill()
        process.wait()
        kept(shelf, before, shelf.out)
        shelf.undo()
        assert snapshot(shelf.loras) == before
        assert not snapshot(shelf.out)


def test_killed_by_the_clock(shelf: Shelf) -> None:
    killed_by_the_clock(shelf, random.Random(1), 3)


@pytest.mark.slow
def test_killed_by_the_clock_fifty_times(shelf: Shelf) -> None:
    killed_by_the_clock(shelf, random.Random(2), 50)
