"""Where the index is, and how it opens where it cannot be written or WAL cannot be had."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lorafind.index import opening, schema
from lorafind.index.problem import IndexProblem
from lorafind.index.store import Store
from tests.index.make import lora
from tests.unprivileged import needs_permissions, open_folder, unprivileged


def test_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFIND_DB", str(tmp_path / "env.db"))
    assert opening.location() == tmp_path / "env.db"
    assert opening.location("given.db") == tmp_path / "given.db"
    monkeypatch.setenv("LORAFIND_DB", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    if sys.platform == "linux":
        assert opening.location() == tmp_path / "data" / "lorafind" / "lorafind.db"


def test_folders_are_made_and_odd_names_work(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "100%" / "ü?#.db"
    with Store.open(path, "write") as store:
        assert store.conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store.conn.execute("PRAGMA page_size").fetchone() == (schema.PAGE_SIZE,)
    Store.open(path).close()
    assert path.exists()


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IndexProblem, match="cannot be made"):
        Store.open(tmp_path / "file" / "i.db", "write")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IndexProblem, match="cannot be opened"):
        Store.open(tmp_path / "folder", "write")


def test_wal_falls_back_to_delete(tmp_path: Path) -> None:
    # This VFS of SQLite has no shared memory, like a network drive.
    uri = f"{(tmp_path / 'i.db').as_uri()}?vfs=unix-dotfile"
    try:
        conn = sqlite3.connect(uri, uri=True, isolation_level=None)
    except sqlite3.OperationalError:
        pytest.skip("SQLite has no unix-dotfile VFS here")
    conn.execute("CREATE TABLE t (x)")
    assert opening.choose_journal(conn, is_remote=False) == "delete"
    assert conn.execute("PRAGMA synchronous").fetchone() == (2,)
    conn.execute("INSERT INTO t VALUES (1)")
    conn.close()


def test_a_network_drive_gets_delete(tmp_path: Path) -> None:
    path = tmp_path / "i.db"
    Store.open(path, "write").close()
    conn = sqlite3.connect(path, isolation_level=None)
    assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert opening.choose_journal(conn, is_remote=True) == "delete"
    conn.close()
    # Both ways back: the next opening on a local drive returns to WAL.
    with Store.open(path, "write") as store:
        assert store.conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_readers_cannot_write(tmp_path: Path) -> None:
    Store.open(tmp_path / "i.db", "write").close()
    with (
        pytest.raises(IndexProblem, match="read-only"),
        Store.open(tmp_path / "i.db") as store,
        store.batch(),
    ):
        store.set_meta("a", 1)


def test_reading_goes_on_during_a_write(tmp_path: Path) -> None:
    path = tmp_path / "i.db"
    with Store.open(path, "write") as writer:
        with writer.batch():
            writer.set_meta("a", 1)
        with Store.open(path) as reader, writer.batch():
            writer.set_meta("a", 2)
            started = time.monotonic()
            assert reader.get_meta("a") == 1
            with Store.open(path) as second:
                assert second.get_meta("a") == 1
            assert time.monotonic() - started < 1
        with Store.open(path) as reader:
            assert reader.get_meta("a") == 2


def test_a_batch_has_the_right_to_write_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "i.db"
    with Store.open(path, "write") as store:
        other = sqlite3.connect(path, timeout=0, isolation_level=None)
        with store.batch(), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()


@needs_permissions
def test_a_read_only_folder_opens() -> None:
    with open_folder() as folder:
        path = folder / "i.db"
        with Store.open(path, "write") as store, store.batch():
            number = lora(store, "c")
        path.chmod(0o444)
        folder.chmod(0o555)
        with unprivileged(), Store.open(path) as store:
            assert store.find_lora("c") == (number, 1)
        assert sorted(p.name for p in folder.iterdir()) == ["i.db", "i.db.lock"]


@needs_permissions
def test_a_read_only_folder_with_unfinished_work_is_explained() -> None:
    with open_folder() as folder:
        path = folder / "i.db"
        with Store.open(path, "write") as store:
            with store.batch():
                lora(store, "c")
            copy = folder / "copy"
            copy.mkdir()
            for name in ("i.db", "i.db-wal"):
                shutil.copy(folder / name, copy)
        copy.chmod(0o555)
        with unprivileged(), pytest.raises(IndexProblem, match=r"unfinished work in i\.db-wal"):
            Store.open(copy / "i.db")


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "i.db"
    with Store.open(path, "write") as store:
        with store.batch():
            first = lora(store, "first")
        (pages,) = store.conn.execute("PRAGMA page_count").fetchone()
        store.conn.execute(f"PRAGMA max_page_count = {pages + 5}")
        with pytest.raises(IndexProblem, match=r"no room left .* free some space"), store.batch():
            lora(store, "second")
            for number in range(1000):
                store.chunks.append("k", "", number, np.zeros(1000))
        assert store.find_lora("first") == (first, 1)
        assert store.find_lora("second") is None
        store.conn.execute("PRAGMA max_page_count = 1000000")
        with store.batch():
            lora(store, "second")
    with Store.open(path) as store:
        assert store.find_lora("second")
        assert store.chunks.count("k", "") == 0
        assert store.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)


WRITER = """
import sys, numpy as np
from lorafind.index.store import Store
from tests.index.make import lora
store = Store.open(sys.argv[1], "write")
store.conn.execute("PRAGMA cache_size = 10")  # so that an open batch reaches the disk
if sys.argv[2] == "delete":
    store.conn.execute("PRAGMA journal_mode = DELETE")
for batch in range(10_000):
    with store.batch():
        for k in range(100):
            i = lora(store, f"{batch}-{k}")
            store.chunks.append("k", "", i, np.full(2000, float(i)))
            if batch == 3 and k == 60:
                print("inside", flush=True)
                sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_writer_leaves_whole_batches_and_no_lock(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "i.db"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout
    assert process.stdout.readline() == "inside\n"
    process.kill()
    process.communicate()
    # Reading first: it must cope with what the killed writer left.
    with Store.open(path) as store:
        assert store.chunks.count("k", "") == 300
    with Store.open(path, "write") as store:
        assert store.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert store.conn.execute("PRAGMA foreign_key_check").fetchone() is None
        assert store.conn.execute("SELECT count(*) FROM loras").fetchone() == (300,)
        for ids, matrix in store.chunks.scan("k", ""):
            assert np.array_equal(matrix, np.repeat(ids[:, None].astype(float), 2000, axis=1))
        with store.batch():
            lora(store, "3-60")
