"""An index that cannot be used as asked: one sentence, the right exit code, nothing lost."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorafind.index.store import Store
from tests.e2e.content import content, same
from tests.e2e.tools import (
    command,
    copied,
    environment,
    healthy,
    index,
    lorafind,
    one_sentence,
    rows,
    told,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs limits and mounts of Linux")
FAILED = 4


@pytest.fixture(scope="module")
def loras(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty LoRAs, which need about 6 MB of index."""
    bench = shared / "loras/fontbench/wild"
    chosen = sorted(path.name for path in bench.glob("*-train-*.safetensors"))[:40]
    return copied(bench, tmp_path_factory.mktemp("trouble") / "loras", chosen)


@pytest.fixture(scope="module")
def whole(loras: Path) -> Path:
    """An index of them that nothing may change."""
    db = loras.parent / "whole/i.db"
    db.parent.mkdir()
    index(db, loras)
    return db


@pytest.fixture
def db(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copyfile(whole, tmp_path / "i.db"))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A small file system in memory; gives a function to mount it anew with other options."""
    mount = ["mount", "-t", "tmpfs", "-o"]
    folder.mkdir(parents=True)
    made = subprocess.run([*mount, options, "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("a file system can only be mounted by root")

    def again(changed: str) -> None:
        subprocess.run([*mount[:3], "-o", f"remount,{changed}", "tmpfs", str(folder)], check=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(loras: Path, whole: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=3m") as again:
        db = disk / "i.db"
        said = one_sentence(lorafind("index", loras, db=db), FAILED)
        assert "no room left" in said or "disk is full" in said
        assert str(db) in said
        healthy(db)
        # Still full: the same sentence, and what can be asked is answered.
        one_sentence(lorafind("index", db=db), FAILED)
        told(lorafind("ls", "--json", db=db))
        again("size=100m")
        told(lorafind("index", loras, db=db))
        same(content(db), content(whole))


def test_a_disk_that_fails_while_writing(loras: Path, whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files: SQLite gets an error from the system in mid-transaction."""
    db = tmp_path / "i.db"
    done = subprocess.run(
        command("index", loras),
        env=environment(db),
        cwd=tmp_path,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, 3 * 2**20)),
    )
    assert str(db) in one_sentence(done, FAILED)
    healthy(db)
    told(lorafind("index", loras, db=db))
    same(content(db), content(whole))


def test_a_read_only_folder(loras: Path, whole: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=100m") as again:
        db = Path(shutil.copyfile(whole, disk / "i.db"))
        again("ro")
        first = next(loras.iterdir())
        for arguments in (
            ("similar", str(first)),
            ("dupes",),
            ("ls",),
            ("whatis", str(first)),
            ("epochs",),
        ):
            told(lorafind(*arguments, "--json", db=db, cwd=tmp_path))
        said = one_sentence(lorafind("index", db=db, cwd=tmp_path), FAILED)
        assert "cannot be written" in said and "--db" in said
        nowhere = disk / "new" / "i.db"
        said = one_sentence(lorafind("index", loras, db=nowhere, cwd=tmp_path), FAILED)
        assert "cannot be made" in said


ASKED = ("similar", "dupes", "ls", "whatis", "index", "epochs")


def ask(name: str, loras: Path, db: Path) -> subprocess.CompletedProcess[bytes]:
    targets = [next(loras.iterdir())] if name in ("similar", "whatis") else []
    return lorafind(name, *targets, db=db)


@pytest.mark.parametrize("name", ASKED)
def test_no_index_yet(name: str, loras: Path, tmp_path: Path) -> None:
    said = one_sentence(ask(name, loras, tmp_path / "i.db"), FAILED)
    assert "lorafind index FOLDER" in said


@pytest.mark.parametrize("name", ASKED)
def test_an_index_of_a_newer_version(name: str, loras: Path, db: Path) -> None:
    with sqlite3.connect(db) as conn:
        conn.execute("PRAGMA user_version = 99")
    conn.close()
    before = db.read_bytes()
    said = one_sentence(ask(name, loras, db), FAILED)
    assert "newer lorafind" in said and "update" in said
    assert db.read_bytes() == before


def test_a_database_of_another_program(loras: Path, tmp_path: Path) -> None:
    db = tmp_path / "i.db"
    with sqlite3.connect(db) as conn:
        conn.execute("CREATE TABLE photos (x)")
    conn.close()
    before = db.read_bytes()
    for name in ("index", "similar", "dupes"):
        said = one_sentence(ask(name, loras, db), FAILED)
        assert "another program" in said
    one_sentence(lorafind("index", loras, db=db), FAILED)
    assert db.read_bytes() == before


def _cut(data: bytearray) -> bytearray:
    return data[: len(data) // 2]


def _text(data: bytearray) -> bytearray:
    return bytearray(b"this is no database\n" * 1000)


def _header(data: bytearray) -> bytearray:
    data[100:16384] = bytes(16284)
    return data


def _pages(seed: int) -> Callable[[bytearray], bytearray]:
    def spoil(data: bytearray) -> bytearray:
        chance = random.Random(seed)
        for page in chance.sample(range(1, len(data) // 16384), 12):
            data[page * 16384 : (page + 1) * 16384] = chance.randbytes(16384)
        return data

    return spoil


SPOILED = {
    "cut": _cut,
    "text": _text,
    "header": _header,
    "pages-1": _pages(1),
    "pages-2": _pages(2),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_index(how: str, loras: Path, db: Path) -> None:
    db.write_bytes(SPOILED[how](bytearray(db.read_bytes())))
    first = next(loras.iterdir())
    seen = set()
    for arguments in (("similar", first), ("dupes",), ("index",)):
        done = lorafind(*arguments, db=db)
        text = told(done, 0, FAILED)
        seen.add(done.returncode)
        if done.returncode:
            assert "damaged" in one_sentence(
                subprocess.CompletedProcess([], done.returncode, b"", done.stderr), FAILED
            )
            assert str(db) in text
    if not how.startswith("pages"):
        assert seen == {FAILED}


def test_a_second_writer_waits_for_nobody(loras: Path, db: Path) -> None:
    with Store.open(db, "write") as store, store.batch():
        store.set_meta("a", 1)
        said = one_sentence(lorafind("index", db=db), FAILED)
        assert f"process {os.getpid()}" in said and "wait" in said
        # Who only reads is not kept out.
        assert rows(lorafind("similar", next(loras.iterdir()), "--json", db=db))
        told(lorafind("dupes", db=db))
        told(lorafind("ls", db=db))
    told(lorafind("index", db=db))


def test_an_index_in_a_folder_that_is_a_file(loras: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = one_sentence(lorafind("index", loras, db=tmp_path / "file/i.db", cwd=tmp_path), FAILED)
    assert "cannot be made" in said
    one_sentence(lorafind("index", tmp_path / "nowhere", db=tmp_path / "i.db"), FAILED)
