"""The program as its users have it: a process, an index of real files, and what stands in it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from lorafind.files.scan import join
from lorafind.index.build import Summary, build
from lorafind.index.store import Store

ROOT = Path(__file__).resolve().parents[2]
#: Long past, so that no file counts as read within two seconds of its mtime.
OLD_NS = 1_600_000_000_000_000_000

Done = subprocess.CompletedProcess[bytes]


def environment(db: Path, **more: str) -> dict[str, str]:
    """For a process of the program: its index, one thread, this source tree."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LORAFIND_DB": str(db),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        **more,
    }


def command(*arguments: str | Path) -> list[str]:
    """The command line of the program."""
    return [sys.executable, "-m", "lorafind", *map(str, arguments)]


def lorafind(
    *arguments: str | Path, db: Path, stdin: bytes = b"", cwd: Path | None = None, **more: str
) -> Done:
    """Run the program to its end; db lies in a temporary folder, which is its working folder."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd or db.parent,
        env=environment(db, **more),
        input=stdin,
        capture_output=True,
        timeout=300,
    )


def told(done: Done, *codes: int) -> str:
    """stderr of a run that ended with one of these codes, and without a traceback."""
    text = done.stderr.decode()
    assert done.returncode in (codes or (0,)), (done.returncode, text)
    assert "Traceback" not in text, text
    return text


def rows(done: Done, *codes: int) -> Any:
    """What a run with ``--json`` printed."""
    told(done, *codes)
    return json.loads(done.stdout)


def one_sentence(done: Done, code: int) -> str:
    """The one message of a run that could not do its work."""
    text = told(done, code)
    lines = text.strip().splitlines()
    assert len(lines) <= 2 and lines[0].startswith("lorafind: "), text
    assert len(lines) < 2 or lines[1].startswith("try: "), text
    assert not done.stdout
    return text


def index(db: Path, *paths: Path, **options: Any) -> Summary:
    """One run of ``index`` in this process."""
    with Store.open(db, "write") as store:
        return build(store, paths, device="cpu", **options)


def age(folder: Path) -> None:
    """Give every file below a time long past (links are left alone)."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            os.utime(path, ns=(OLD_NS, OLD_NS))


def copied(source: Path, target: Path, names: Sequence[str] | None = None) -> Path:
    """Copies of files (all of a folder for no names), long past."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.suffix not in (".json", ".md", ".csv") and (names is None or path.name in names):
            shutil.copyfile(path, target / path.name)
    age(target)
    return target


def files(db: Path) -> dict[str, dict[str, Any]]:
    """Path → status, reason, presence, content and facts of its LoRA (None without one)."""
    columns = (
        "status",
        "reason",
        "presence",
        "content",
        "architecture",
        "family",
        "spelling",
        "ranks",
        "effective_dtype",
    )
    found = {}
    with Store.open(db) as store:
        for root, below, *values in store.conn.execute(
            f"SELECT r.path, f.path, {', '.join(columns)} FROM files f "
            "JOIN roots r ON r.id = f.root LEFT JOIN loras ON loras.id = f.lora"
        ):
            facts = dict(zip(columns, values, strict=True))
            facts["ranks"] = json.loads(facts["ranks"]) if facts["ranks"] else None
            found[os.fsdecode(join(root, below))] = facts
    return found


def names(db: Path) -> dict[str, int]:
    """File name → LoRA, of all files that hold one."""
    with Store.open(db) as store:
        return {
            os.path.basename(os.fsdecode(join(root, below))): lora
            for lora, root, below in store.conn.execute(
                "SELECT f.lora, r.path, f.path FROM files f JOIN roots r ON r.id = f.root "
                "WHERE f.lora IS NOT NULL"
            )
        }


def relations(db: Path) -> dict[frozenset[str], dict[str, Any]]:
    """Pair of file names → what is proved of their LoRAs; none of a LoRA and itself."""
    by_lora: dict[int, list[str]] = {}
    for name, lora in names(db).items():
        by_lora.setdefault(lora, []).append(name)
    found = {}
    with Store.open(db) as store:
        for x, y, grade, numbers in store.conn.execute(
            "SELECT x, y, grade, numbers FROM relations WHERE grade != ''"
        ):
            known: Mapping[str, Any] = json.loads(numbers)
            for pair in product(by_lora[x], by_lora[y]):
                found[frozenset(pair)] = {**known, "grade": grade}
    return found


def healthy(db: Path) -> None:
    """Fails unless SQLite finds nothing wrong with an index."""
    with sqlite3.connect(db) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert not conn.execute("PRAGMA foreign_key_check").fetchall()
    conn.close()
