"""Migrations, and what another program sees of the file."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from sqlite_utils import Database

from lorafind.index import schema
from lorafind.index.opening import connect_to_write
from lorafind.index.problem import IndexProblem
from lorafind.index.store import Store
from tests.index.make import lora, signature

MODES: tuple[Literal["read", "write"], ...] = ("read", "write")


def test_every_table_and_column_is_documented(tmp_path: Path) -> None:
    with Store.open(tmp_path / "i.db", "write") as store:
        tables = [name for name in store.db.table_names() if not name.startswith("sqlite_")]
        columns = {name: [c.name for c in store.db[name].columns] for name in tables}
    assert schema.__doc__
    texts: dict[str, str] = {}
    for line in schema.__doc__.splitlines():
        name = line.split(" ")[0] or (next(reversed(texts)) if texts else "")
        if name in tables:
            texts[name] = texts.get(name, "") + " " + line
    assert set(texts) == set(tables)
    for table, names in columns.items():
        for name in names:
            assert name in texts[table], f"{table}.{name}"


def test_migrations_are_applied_once_and_in_order(tmp_path: Path) -> None:
    conn = connect_to_write(tmp_path / "i.db")
    db = Database(conn, execute_plugins=False)

    def second(db: Database) -> None:
        db.execute("ALTER TABLE loras ADD COLUMN extra TEXT")

    steps = (*schema.MIGRATIONS, second)
    assert schema.migrate(db) == list(range(1, schema.VERSION + 1))
    assert schema.migrate(db, steps) == [schema.VERSION + 1]
    assert schema.migrate(db, steps) == []
    assert schema.version(conn) == schema.VERSION + 1
    assert "extra" in {column.name for column in db["loras"].columns}
    conn.close()


def test_a_failing_migration_leaves_the_index_as_it_was(tmp_path: Path) -> None:
    conn = connect_to_write(tmp_path / "i.db")
    db = Database(conn, execute_plugins=False)
    schema.migrate(db)

    def broken(db: Database) -> None:
        db.execute("CREATE TABLE half (id INTEGER)")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        schema.migrate(db, (*schema.MIGRATIONS, broken))
    assert schema.version(conn) == schema.VERSION
    assert "half" not in db.table_names()
    conn.close()


def test_numpy_and_sqlite_alone_can_read_it(tmp_path: Path) -> None:
    """The BLOB layouts of the documentation, read without lorafind."""
    vectors = np.random.default_rng(0).standard_normal((4100, 6)).astype("f2")
    with Store.open(tmp_path / "i.db", "write") as store, store.batch():
        number = lora(store, "c")
        store.put_signature(number, signature(3))
        store.chunks.append_many("identity", "sd1", range(1, 4101), vectors)
        store.chunks.seal()
        store.chunks.delete([2], "identity")
    conn = sqlite3.connect(tmp_path / "i.db")
    assert conn.execute("PRAGMA application_id").fetchone() == (0x4C4F5241,)
    (norms,) = conn.execute("SELECT norms FROM loras").fetchone()
    assert np.frombuffer(norms, "<f4").tolist() == [9.0, 16.0]
    groups, style, scales = conn.execute("SELECT groups, style, scales FROM signatures").fetchone()
    assert groups == 5
    assert np.array_equal(np.frombuffer(style, "i1").reshape(2, 32_768), signature(3).style)
    assert np.array_equal(np.frombuffer(scales, "<f4"), signature(3).scales)
    rows, ids, data = conn.execute("SELECT rows, ids, data FROM chunks").fetchone()
    assert rows == 4096
    assert np.frombuffer(ids, "<i8").tolist() == list(range(1, 4097))
    assert np.array_equal(np.frombuffer(data, "<f2").reshape(rows, 6), vectors[:4096])
    assert conn.execute("SELECT position FROM tombstones").fetchall() == [(1,)]
    waiting = conn.execute("SELECT lora, payload FROM pending ORDER BY lora").fetchall()
    assert [lora for lora, _ in waiting] == [4097, 4098, 4099, 4100]
    assert np.array_equal(np.frombuffer(waiting[0][1], "<f2"), vectors[4096])
    conn.close()


def test_newer_older_foreign_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "i.db"
    Store.open(path, "write").close()
    conn = sqlite3.connect(path)
    conn.execute(f"PRAGMA user_version = {schema.VERSION + 6}")
    conn.close()
    for mode in MODES:
        with pytest.raises(IndexProblem, match=r"newer lorafind .* update lorafind"):
            Store.open(path, mode)

    other = tmp_path / "photos.db"
    conn = sqlite3.connect(other)
    conn.execute("CREATE TABLE photos (id)")
    conn.close()
    for mode in MODES:
        with pytest.raises(IndexProblem, match="another program"):
            Store.open(other, mode)

    broken = tmp_path / "broken.db"
    broken.write_bytes(b"not a database at all, but long enough to be looked at" * 100)
    before = broken.read_bytes()
    for mode in MODES:
        with pytest.raises(IndexProblem, match="damaged"):
            Store.open(broken, mode)
    assert broken.read_bytes() == before


def test_damage_inside_the_file_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "i.db"
    with Store.open(path, "write") as store, store.batch():
        store.chunks.append_many("k", "", range(1, 2001), np.ones((2000, 64), "f4"))
    data = bytearray(path.read_bytes())
    data[4 * schema.PAGE_SIZE :] = b"\xab" * len(data[4 * schema.PAGE_SIZE :])
    path.write_bytes(data)
    with pytest.raises(IndexProblem, match="damaged"), Store.open(path) as store:
        list(store.chunks.scan("k", ""))
        store.known()
        store.conn.execute("PRAGMA integrity_check").fetchall()
        raise AssertionError("nothing was noticed")


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(IndexProblem, match=r"no index at .* `lorafind index FOLDER`"):
        Store.open(tmp_path / "i.db")
    assert not (tmp_path / "i.db").exists()
    (tmp_path / "e.db").touch()
    with pytest.raises(IndexProblem, match="empty"):
        Store.open(tmp_path / "e.db")
    Store.open(tmp_path / "e.db", "write").close()
    Store.open(tmp_path / "e.db").close()
