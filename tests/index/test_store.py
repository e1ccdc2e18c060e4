"""What goes into the index comes out of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lorafind.files.scan import ScanReport
from lorafind.index.reconcile import Decisions, Link, Move
from lorafind.index.rows import Relation, StoredBasis
from lorafind.index.store import Store
from tests.index.make import MODULES, OLD, facts, found, known, lora, signature

ROOT = b"/r"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "i.db", "write") as store:
        with store.batch():
            store.conn.execute("INSERT INTO roots (path, single) VALUES (?, 0)", (ROOT,))
        yield store


def count(store: Store, table: str) -> int:
    return int(store.conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_files_round_trip(store: Store) -> None:
    item = found(b"\xff a.safetensors", inode=2**63 - 1, is_link=True)
    with store.batch():
        number = lora(store, "c")
        store.put_file(item, facts("s", lora_id=number), links=[found(b"b.safetensors")])
        store.put_file(found(b"t"), facts(None, status="text", reason="a note \udc80"))
    rows = store.known()
    assert rows[0] == known(item, rows[0].id, lora_id=number)
    assert rows[1].path == b"b.safetensors" and rows[1].lora_id == number
    assert (rows[2].status, rows[2].reason) == ("text", "a note \\udc80")
    with store.batch():
        store.put_file(item._replace(size=7), facts("new"))
    assert {row.path: (row.size, row.sha256) for row in store.known()}[item.path] == (7, "new")
    assert len(store.known()) == 3


def test_loras_and_layouts_round_trip(store: Store) -> None:
    with store.batch():
        first = lora(
            store,
            "c",
            facts={"name": "花 \ud800", "loss": float("nan")},
            notes=("a", "b"),
            extras={"te/token": "abc"},
        )
        second = lora(store, "d")
        assert lora(store, "c", version=2) == first
    assert store.find_lora("c") == (first, 2)
    assert store.find_lora("x") is None
    assert count(store, "layouts") == 1
    assert store.layout(1) == ("sd1", MODULES)
    with store.batch():
        assert store.put_layout("sd1", MODULES[::-1]) == 2
        assert store.put_layout("sd2", MODULES) == 3
        row_id = lora(store, "e", facts={"name": "花 \ud800", "loss": [float("nan"), 1.5]})
    name, loss = store.conn.execute(
        "SELECT facts ->> 'name', facts -> 'loss' FROM loras WHERE id = ?", (row_id,)
    ).fetchone()
    assert name == "花 \\ud800" and loss == "[null,1.5]"
    assert second != first


def test_ids_are_never_used_twice(store: Store) -> None:
    with store.batch():
        old = lora(store, "a")
    assert store.drop_orphans() == 1
    with store.batch():
        assert lora(store, "b") > old


def test_signatures_stream_back(store: Store) -> None:
    with store.batch():
        ids = [lora(store, str(k)) for k in range(5)]
        for k, number in enumerate(ids):
            store.put_signature(number, signature(k, groups=0b110111 if k else 0))
    for version, expected in ((1, ids), (2, [])):
        assert [number for number, _ in store.signatures(version)] == expected
    picked = dict(store.signatures(1, np.array([ids[3], ids[1]])))
    assert set(picked) == {ids[1], ids[3]}
    stored, made = picked[ids[3]], signature(3, groups=0b110111)
    assert stored.groups == made.groups
    for name in ("scales", "votes", "style"):
        assert np.array_equal(getattr(stored, name), getattr(made, name))
    assert dict(store.signatures(1, [ids[0]]))[ids[0]].style.shape == (0, 0)


def test_relations(store: Store) -> None:
    with store.batch():
        a, b, c = (lora(store, name) for name in "abc")
        proved = Relation(a, b, 1, "cast", 1, ["F16"], {"error": 1e-4})
        store.put_relations([proved, Relation(a, c, 1), Relation(b, c, 1, "near")])
        store.put_relations([Relation(b, c, 2, "kin", -1, ["kin"], {"cosine": 0.4})])
    assert list(store.relations(1)) == [proved]
    assert list(store.relations(1, b)) == [proved] == list(store.relations(1, a))
    assert [r.grade for r in store.relations(2, b)] == ["kin"]
    assert list(store.relations(1, c)) == []
    assert store.checked_pairs(1).tolist() == [[a, b], [a, c]]
    assert store.checked_pairs(3).shape == (0, 2)


def test_bases(store: Store) -> None:
    parts = {"mean": np.arange(6.0).reshape(2, 3), "components": np.ones((4, 2), ">f4")}
    with store.batch():
        store.put_basis(StoredBasis("own", "sd1", "style", 1, {"k": 20}, parts, made_ns=5))
        store.put_basis(StoredBasis("pub", "sdxl", "style", 1, {}, {}, made_ns=6))
        store.chunks.append("embedding", "own", 1, np.ones(3, "f4"))
    basis = store.basis("own")
    assert basis is not None and (basis.facts, basis.made_ns) == ({"k": 20}, 5)
    assert set(basis.parts) == set(parts)
    for name, part in parts.items():
        assert np.array_equal(basis.parts[name], part)
        assert basis.parts[name].dtype == part.dtype.newbyteorder("<")
    assert store.basis_ids() == ["pub", "own"]
    assert store.basis_ids("sd1") == ["own"]
    assert store.basis("none") is None
    with store.batch():
        store.put_basis(StoredBasis("own", "sd1", "style", 1, {}, {"mean": np.zeros(1)}))
    assert store.chunks.count("embedding", "own") == 0
    with store.batch():
        store.drop_basis("own")
    assert count(store, "basis_parts") == 0


def test_meta(store: Store) -> None:
    assert store.get_meta("a", 3) == 3
    with store.batch():
        store.set_meta("a", {"b": [1]})
        store.set_meta("a", {"b": [2]})
    assert store.get_meta("a") == {"b": [2]}


def test_a_batch_is_whole_or_nothing(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), store.batch():
        lora(store, "a")
        store.chunks.append("k", "", 1, np.zeros(3))
        raise KeyboardInterrupt
    assert store.find_lora("a") is None
    assert store.chunks.series() == []
    with store.batch():
        lora(store, "a")


def test_loras_without_files_go_with_all_that_hangs_on_them(store: Store) -> None:
    with store.batch():
        a, b = lora(store, "a"), lora(store, "b")
        for name, number in ((b"1", a), (b"2", b), (b"3", b)):
            store.put_file(found(name), facts(lora_id=number))
        for number in (a, b):
            store.put_signature(number, signature(number))
            store.chunks.append("identity", "sd1", number, np.zeros(3))
            store.chunks.append("embedding", "own", number, np.zeros(3))
        store.put_relations([Relation(a, b, 1, "near")])
    rows = store.known()
    assert store.remove_files(rows[1:2]) == 0
    assert count(store, "loras") == 2
    assert store.remove_files(rows[:1]) == 1
    assert store.find_lora("a") is None and store.find_lora("b") is not None
    assert count(store, "signatures") == 1
    assert count(store, "relations") == 0
    assert store.chunks.ids("identity", "sd1").tolist() == [b]
    assert store.chunks.ids("embedding", "own").tolist() == [b]
    assert store.forget_root(ROOT) == 1
    assert [count(store, t) for t in ("roots", "files", "loras", "layouts", "pending")] == [0] * 5


def test_an_overwritten_lora_is_an_orphan(store: Store) -> None:
    with store.batch():
        a, b = lora(store, "a"), lora(store, "b")
        store.put_file(found(b"1"), facts(lora_id=a))
    with store.batch():
        store.put_file(found(b"1"), facts(lora_id=b))
    assert store.drop_orphans() == 1
    assert store.find_lora("a") is None


def test_decisions_are_applied(store: Store) -> None:
    items = {name: found(name) for name in (b"old", b"over", b"gone", b"away", b"stat", b"src")}
    with store.batch():
        numbers = {name: lora(store, name.decode()) for name in items}
        for name, item in items.items():
            store.put_file(item, facts(name.decode(), lora_id=numbers[name]))
    rows = {row.path: row for row in store.known()}
    target = found(b"over", size=1000, inode=77)
    report = ScanReport(roots={ROOT: 42})
    store.apply(
        Decisions(
            moved=[Move(rows[b"old"], target, rows[b"over"])],
            linked=[
                Link(found(b"link", is_link=True), rows[b"src"]),
                Link(found(b"link2"), rows[b"old"]),
            ],
            refused=[found(b"fifo", outcome="not-a-file", reason="it is a named pipe")],
            refreshed=[Link(items[b"stat"]._replace(ctime_ns=9), rows[b"stat"])],
            gone=[rows[b"gone"]],
            offline=[(rows[b"away"], "why")],
        ),
        report,
    )
    after = {row.path: row for row in store.known()}
    assert set(after) == {*(b"over", b"gone", b"away", b"stat", b"src", b"link", b"link2", b"fifo")}
    assert after[b"over"].id == rows[b"old"].id
    assert (after[b"over"].inode, after[b"over"].lora_id) == (77, numbers[b"old"])
    assert after[b"over"].probe == b"old" and after[b"over"].read_ns == OLD + 10**12
    assert (after[b"link"].lora_id, after[b"link"].is_link) == (numbers[b"src"], True)
    assert after[b"link2"].sha256 == "old"
    assert (after[b"fifo"].status, after[b"fifo"].reason) == ("not-a-file", "it is a named pipe")
    assert after[b"stat"].ctime_ns == 9
    presences = {row.path: row.presence for row in after.values() if row.presence != "here"}
    assert presences == {b"gone": "gone", b"away": "offline"}
    (root,) = store.roots()
    assert root.device == 42 and root.offline == ""
    store.apply(Decisions(roots={ROOT: "it does not exist"}), ScanReport())
    (root,) = store.roots()
    assert root.device == 42 and root.offline == "it does not exist"
