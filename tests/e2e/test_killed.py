"""`index` killed at any moment: nothing is lost, and the next run ends where one run would have."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafind.index.problem import IndexProblem
from lorafind.index.store import Store
from tests.e2e import variants as v
from tests.e2e.content import content, same
from tests.e2e.tools import age, copied, environment, healthy, lorafind, rows, told
from tests.relations import made

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")

#: The program, with a transaction for nearly every file and every proof.
EAGER = """
import lorafind.index.build, lorafind.index.relate
lorafind.index.build.COMMIT_SECONDS = lorafind.index.relate.COMMIT_SECONDS = 0.0
from lorafind.__main__ import main
main()
"""

#: The same, killed by itself just before SQLite begins its n-th statement; 0: tell their number.
AT_STATEMENT = """
import os, signal, sqlite3, sys
limit, seen, connect = int(sys.argv.pop(1)), 0, sqlite3.connect
def tick(statement):
    global seen
    seen += 1
    if seen == limit:
        os.kill(os.getpid(), signal.SIGKILL)
def connected(*arguments, **options):
    connection = connect(*arguments, **options)
    connection.set_trace_callback(tick)
    return connection
sqlite3.connect = connected
import lorafind.index.build, lorafind.index.relate
lorafind.index.build.COMMIT_SECONDS = lorafind.index.relate.COMMIT_SECONDS = 0.1
from lorafind.__main__ import main
try:
    main()
finally:
    print(seen)
"""


def collection(shared: Path, folder: Path, most: int) -> Path:
    """FontBench files enough for a basis, copies in many grades, real and broken files."""
    loras = folder / "loras"
    bench = shared / "loras/fontbench/wild"
    chosen = sorted(path.name for path in bench.glob("*-train-*.safetensors"))[::4][:most]
    copied(bench, loras / "bench", chosen)
    copied(bench, loras / "again", chosen[:3])
    broken = [
        "nan.safetensors",
        "html.safetensors",
        "truncated_data.safetensors",
        "good.safetensors",
    ]
    copied(shared / "loras/malformed", loras / "broken", broken)
    one = made.trained(v.kohya_layout("sd1"), 4, seed=5)
    for number, modules in enumerate(
        (
            one,
            made.cast(one, torch.float16),
            made.cast(one, torch.float8_e5m2),
            made.scaled(one, 0.5),
            made.kept(one, lambda name: "attn1" in name),
            v.small_svd(one, lambda s: 2, torch.float16),
        )
    ):
        v.write(loras / f"made {number}.safetensors", v.kohya(modules))
    age(loras)
    return loras


@dataclass(frozen=True)
class Undisturbed:
    """A collection, what one whole run makes of it, and how long that takes."""

    loras: Path
    db: Path
    content: dict[str, Any]
    seconds: float


def undisturbed(shared: Path, folder: Path, most: int) -> Undisturbed:
    loras = collection(shared, folder, most)
    db = folder / "undisturbed/i.db"
    db.parent.mkdir()
    started = time.monotonic()
    start(db, EAGER, "index", loras).wait()
    seconds = time.monotonic() - started
    found = content(db)
    assert found["bases"] and len(found["relations"]) >= 10
    return Undisturbed(loras, db, found, seconds)


def start(db: Path, code: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(db),
        cwd=db.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finishes(db: Path, whole: Undisturbed) -> None:
    """The next run completes what a killed one has begun."""
    told(lorafind("index", whole.loras, db=db), 3)
    same(content(db), whole.content)
    healthy(db)


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments(kills: int, shared: Path, tmp_path: Path) -> None:
    whole = undisturbed(shared, tmp_path, 36 if kills < 20 else 160)
    chance = random.Random(kills)
    attempt, partly = 0, 0
    db = tmp_path / "0/i.db"
    for _ in range(kills):
        db.parent.mkdir(exist_ok=True)
        process = start(db, EAGER, "index", whole.loras)
        time.sleep(chance.uniform(0.25, 1.0) * whole.seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done = opens(db)
        partly += 0 < done < len(whole.content["files"])
        if done == len(whole.content["files"]):
            # Complete or in its last steps: the next run only finishes it.
            finishes(db, whole)
            attempt += 1
            db = tmp_path / f"{attempt}/i.db"
    if db.parent.exists():
        finishes(db, whole)
    again = rows(lorafind("index", "--json", db=whole.db), 3)
    assert not again["added"] and not again["refreshed"] and not again["bytes"]
    assert partly or kills < 20


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_between_two_statements(kills: int, shared: Path, tmp_path: Path) -> None:
    """The same at moments that last microseconds, spread over everything that is written."""
    whole = undisturbed(shared, tmp_path, 34)
    (tmp_path / "counted").mkdir()
    counted, _ = start(
        tmp_path / "counted/i.db", AT_STATEMENT, "0", "index", whole.loras
    ).communicate()
    total = int(counted.splitlines()[-1])
    chance = random.Random(kills)
    partly = 0
    for number in range(kills):
        db = tmp_path / f"{number}/i.db"
        db.parent.mkdir()
        moment = int((number + chance.random()) / kills * total)
        process = start(db, AT_STATEMENT, str(1 + moment), "index", whole.loras)
        process.communicate()
        # How many statements there are depends a little on how the batches fall.
        assert process.returncode in (-signal.SIGKILL, 3)
        partly += 0 < opens(db) < len(whole.content["files"])
        finishes(db, whole)
    assert partly


def opens(db: Path) -> int:
    """How many files a killed run has left; the index must be whole as far as it goes."""
    if not db.exists():
        return 0
    try:
        with Store.open(db) as store:
            known = store.known()
    except IndexProblem as problem:
        # Killed before the first table was there.
        assert "is empty" in str(problem)
        return 0
    healthy(db)
    # Every file that is recorded has all that belongs to it.
    content(db)
    return len(known)


def test_interrupted_by_hand(shared: Path, tmp_path: Path) -> None:
    """Ctrl-C: exit code 130, no traceback, and what was read is kept."""
    loras = collection(shared, tmp_path, 30)
    db = tmp_path / "i.db"
    process = start(db, EAGER, "index", loras)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if db.exists() and db.stat().st_size:
            try:
                with Store.open(db) as store:
                    if store.conn.execute("SELECT count(*) FROM loras").fetchone()[0]:
                        break
            except IndexProblem:
                continue
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert b"Traceback" not in error
    assert process.returncode == 130, error
    assert opens(db)
    told(lorafind("index", db=db), 3)
