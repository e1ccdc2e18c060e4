"""`index` killed at any moment: nothing is lost, and the next run ends where one run would have."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def run(db: Path, loras: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", EAGER, "index", str(loras)],
        env=environment(db),
        cwd=db.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments(kills: int, shared: Path, tmp_path: Path) -> None:
    loras = collection(shared, tmp_path, 36 if kills < 20 else 160)
    (tmp_path / "undisturbed").mkdir()
    whole = tmp_path / "undisturbed/i.db"
    told(lorafind("index", loras, db=whole), 3)
    expected = content(whole)
    assert expected["bases"] and len(expected["relations"]) >= 10
    started = time.monotonic()
    (tmp_path / "timed").mkdir()
    run(tmp_path / "timed/i.db", loras).wait()
    took = time.monotonic() - started
    chance = random.Random(kills)
    attempt, partly = 0, 0
    db = tmp_path / "0/i.db"
    for _ in range(kills):
        db.parent.mkdir(exist_ok=True)
        process = run(db, loras)
        time.sleep(chance.uniform(0.25, 1.0) * took)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = _opens(db)
        partly += 0 < done < len(expected["files"])
        if done == len(expected["files"]):
            # Complete or in its last steps: the next run only finishes it.
            told(lorafind("index", db=db), 3)
            same(content(db), expected)
            healthy(db)
            attempt += 1
            db = tmp_path / f"{attempt}/i.db"
    if db.parent.exists():
        told(lorafind("index", loras, db=db), 3)
        same(content(db), expected)
        healthy(db)
    again = rows(lorafind("index", "--json", db=whole), 3)
    assert not again["added"] and not again["refreshed"] and not again["bytes"]
    if kills > 20:
        assert partly >= 3


def _opens(db: Path) -> int:
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
    process = subprocess.Popen(
        [sys.executable, "-c", EAGER, "index", str(loras)],
        env=environment(db),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
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
    assert _opens(db)
    told(lorafind("index", db=db), 3)
    shutil.rmtree(loras)
