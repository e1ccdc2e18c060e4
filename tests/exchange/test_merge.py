"""Merged indexes hold what one index of everything would."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafind
from lorafind.bases.basis import PUBLISHED, Basis, to_stored
from lorafind.bases.stored import current, in_use, refresh
from lorafind.exchange.merge import merge
from lorafind.index import stars
from lorafind.index.build import build
from lorafind.index.problem import IndexProblem
from lorafind.index.relate import copies_mark, mark_of
from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION
from lorafind.relations.grades import Relation as Proof
from lorafind.signatures.constants import VERSION
from tests.exchange.make import collection, content, index, put_file, put_lora, root_id
from tests.index.same import dump, same


def merged(db: Path, *sources: Path) -> dict[str, Any]:
    """What the index holds after a merge, which a second one must not change."""
    with Store.open(db, "write") as store:
        merge(store, sources, relate=False)
        before = dump(store)
        changes = store.conn.total_changes
        again = merge(store, sources[::-1], relate=False)
        assert not again.anything
        assert store.conn.total_changes == changes
        same(before, dump(store))
    return before


def rows(db: Path) -> dict[str, Any]:
    with Store.open(db) as store:
        return dump(store)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's files, an index of them all (i.db) and of three shards (1.db …)."""
    folder = tmp_path_factory.mktemp("demo")
    collection(folder / "files")
    for name, shard in (("i", None), *((str(k), (k, 3)) for k in (1, 2, 3))):
        with Store.open(folder / f"{name}.db", "write") as store:
            build(store, [folder / "files"], device="cpu", shard=shard)
    return folder


@pytest.mark.parametrize("order", list(permutations("123"))[::2])
def test_shards_are_the_whole(demo: Path, tmp_path: Path, order: tuple[str, ...]) -> None:
    before = {k: (demo / f"{k}.db").read_bytes() for k in order}
    with Store.open(tmp_path / "all.db", "write") as store:
        done = merge(store, [demo / f"{k}.db" for k in order])
        assert done.anything and not done.missing and done.relations == 6
        same(dump(store), rows(demo / "i.db"))
        assert store.get_meta("shard") is None
        again = merge(store, [demo / f"{k}.db" for k in order])
        assert (again.anything, again.relations) == (False, 0)
        same(dump(store), rows(demo / "i.db"))
        # The next run of index has nothing to read.
        summary = build(store, [demo / "files"], device="cpu")
        assert (summary.added, summary.refreshed, summary.bytes, summary.gone) == (0, 0, 0, 0)
    assert {k: (demo / f"{k}.db").read_bytes() for k in order} == before


def test_shards_one_by_one_and_those_that_are_missing(demo: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "all.db", "write") as store:
        said = [merge(store, [demo / f"{k}.db"]).missing for k in "213"]
        assert said == [
            ["shards 1 and 3 of 3 are missing: merge again when the index is there."],
            ["shard 3 of 3 is missing: merge again when the index is there."],
            [],
        ]
        same(dump(store), rows(demo / "i.db"))


def test_a_shard_that_others_are_merged_into_is_none_any_more(demo: Path, tmp_path: Path) -> None:
    shutil.copy(demo / "1.db", tmp_path / "all.db")
    with Store.open(tmp_path / "all.db", "write") as store:
        assert merge(store, [demo / "3.db"]).missing[0].startswith("shard 2 of 3 is missing")
        assert not merge(store, [demo / "2.db"]).missing
        assert store.get_meta("shard") is None
        same(dump(store), rows(demo / "i.db"))


def published(db: Path) -> str:
    """Make a published basis of the collection's own, with its means, the one in use."""
    with Store.open(db, "write") as store:
        (architecture,) = (row[0] for row in store.conn.execute("SELECT architecture FROM bases"))
        own = current(store, architecture)
        assert own is not None
        space = own.spaces["model"]
        digests = dict(store.conn.execute("SELECT id, digest FROM layouts").fetchall())
        layouts = sorted(layout for layout in space.means if layout >= 0)
        centres = {g: np.array([space.means[k][g] for k in (-1, *layouts)]) for g in space.groups}
        facts = {
            **own.facts,
            "name": "mine",
            "feature": "style",
            "layouts": [digests[layout] for layout in layouts],
        }
        made = Basis(
            "pub-1", architecture, facts, {"model": space}, PUBLISHED, None, own.seen, centres
        )
        with store.batch():
            store.put_basis(to_stored(made))
            store.set_meta(in_use(architecture), made.id)
        refresh(store, architecture)
    return str(architecture)


def test_a_published_basis_in_use_comes_along(demo: Path, tmp_path: Path) -> None:
    shutil.copy(demo / "i.db", tmp_path / "i.db")
    architecture = published(tmp_path / "i.db")
    target = os.fspath(demo / "files" / "thin" / "lobster-train-01.safetensors")
    with lorafind.Index.open(tmp_path / "i.db") as one:
        wanted = [(n.path, n.score, n.basis) for n in one.similar(target)]
    assert wanted and {basis for _, _, basis in wanted} == {"pub-1"}
    with lorafind.Index.open(tmp_path / "all.db", write=True) as whole:
        # Here layouts have other ids.
        whole.merge([demo / "3.db"])
        (taken,) = whole.merge([tmp_path / "i.db"]).sources
        assert (taken.bases, taken.conflicts) == (1, [])
        assert [(n.path, n.score, n.basis) for n in whole.similar(target)] == wanted
        with whole.store.batch():
            whole.store.set_meta(in_use(architecture), "own")
        (taken,) = whole.merge([tmp_path / "i.db"]).sources
        assert not taken.anything
        assert taken.conflicts[0].endswith("`lorafind basis use pub-1` takes the other.")
        assert whole.store.get_meta(in_use(architecture)) == "own"


def test_proofs_are_not_made_again(tmp_path: Path) -> None:
    collection(tmp_path / "files")
    with Store.open(tmp_path / "i.db", "write") as store:
        build(store, [tmp_path / "files"], device="cpu")
        before = dump(store)
    # Without its files nothing could be proved now.
    shutil.rmtree(tmp_path / "files")
    with Store.open(tmp_path / "all.db", "write") as store:
        done = merge(store, [tmp_path / "i.db"])
        assert done.relations == 0
        same(dump(store), before)


def test_what_was_searched_is_not_searched_again(tmp_path: Path) -> None:
    """Nor is what a holder made needless taken for searched, once the holder is gone."""
    a = index(tmp_path / "a.db", {f"{k}": (f"{k}", 1) for k in range(9)})
    with Store.open(a, "write") as store, store.batch():
        # Ids with gaps, so that they are others in the whole.
        store.conn.execute("DELETE FROM files WHERE lora IN (2, 5)")
    with Store.open(a, "write") as store:
        assert store.drop_orphans() == 2
        with store.batch():
            store.set_meta(mark_of("sd"), 7)
            store.set_meta(copies_mark("sd"), 9)
            store.set_meta(stars.name_of("sd"), {"3": True, "9": False})
    b = index(tmp_path / "b.db", {"b": ("b", 1)}, seen=2)
    with Store.open(tmp_path / "all.db", "write") as store:
        merge(store, [a], relate=False)
        ids = {n: (store.find_lora(content(n)) or (0,))[0] for n in "02358"}
        assert ids["2"] == 2
        assert store.get_meta(mark_of("sd")) == (store.find_lora(content("6")) or (0,))[0] == 5
        assert store.get_meta(copies_mark("sd")) == ids["8"] == 7
        assert stars.load(store, "sd") == {ids["2"]: True, ids["8"]: False}
        merge(store, [b], relate=False)
        assert store.get_meta(copies_mark("sd")) == 7
    with Store.open(tmp_path / "later.db", "write") as store:
        merge(store, [b, a][:1], relate=False)
        merge(store, [a], relate=False)
        assert store.get_meta(mark_of("sd")) is None
        assert not stars.load(store, "sd")


names = st.sampled_from("abcde")
tables = st.dictionaries(
    st.sampled_from(["x", "y", "z", "sub/x"]),
    st.tuples(st.none() | names, st.integers(1, 50)),
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(tables, st.sampled_from([b"/r", b"/q", b"/r/sub"])), max_size=3))
def test_any_order_gives_the_newest_readings(
    tmp_path_factory: pytest.TempPathFactory,
    sources: list[tuple[dict[str, tuple[str | None, int]], bytes]],
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    oracle: dict[str, tuple[int, str | None]] = {}
    paths = []
    for number, (table, root) in enumerate(sources):
        # Readings are as unique as nanoseconds.
        table = {path: (name, 10 * read + number) for path, (name, read) in table.items()}
        paths.append(index(folder / f"{number}.db", table, root, seen=number + 1))
        for path, (name, read) in table.items():
            whole = f"{root.decode()}/{path}"
            oracle[whole] = max(oracle.get(whole, (0, None)), (read, name), key=lambda o: o[0])
    results = [merged(folder / "all.db", *paths), merged(folder / "back.db", *paths[::-1])]
    for k, one in enumerate(paths[::-1]):
        with Store.open(folder / "each.db", "write") as store:
            merge(store, [one], relate=False)
            results += [dump(store)] * (k == len(paths) - 1)
    for result in results:
        same(result, results[0])
        assert {p: row[-1] for p, row in result["files"].items()} == {
            path: None if name is None else content(name) for path, (_, name) in oracle.items()
        }
        assert result["loras"].keys() == {content(n) for _, n in oracle.values() if n is not None}
        roots = result["roots"].keys()
        assert not {b"/r", b"/r/sub"} <= roots
    with Store.open(folder / "all.db") as store:
        assert not store.conn.execute("PRAGMA foreign_key_check").fetchall()
        for name in {name for _, name in oracle.values() if name is not None}:
            found = store.find_lora(content(name))
            assert found is not None and found[1] == VERSION


def test_relations_keep_their_direction(tmp_path: Path) -> None:
    a = index(
        tmp_path / "a.db", {"s": ("small", 1), "l": ("large", 1)}, pairs=(("large", "small"),)
    )
    b = index(tmp_path / "b.db", {"l": ("large", 1)}, seen=2)
    c = index(tmp_path / "c.db", {"s": ("small", 1)}, seen=3)
    for order in ((b, c, a), (c, b, a), (a, b, c)):
        target = tmp_path / f"{'-'.join(p.stem for p in order)}.db"
        with Store.open(target, "write") as store:
            for path in order:
                merge(store, [path], relate=False)
            (row,) = store.relations(RELATION_VERSION)
            number = {
                name: (store.find_lora(content(name)) or (0,))[0] for name in ("small", "large")
            }
            proof = Proof.from_json(row.numbers)
            assert {row.x, row.y} == set(number.values())
            larger = row.x if row.direction == 1 else row.y
            assert larger == number["large"]
            side = 0 if row.x == larger else 1
            assert proof.larger == "xy"[side]
            assert proof.dominates[side] and not proof.dominates[1 - side]
            assert proof.shares[side] == 1.0 and proof.shares[1 - side] == 0.5
            assert proof.differs["rank"][side] == [16]
            assert dump(store)["families"] == [sorted(map(content, ("small", "large")))]


def test_the_newer_version_of_a_lora_holds(tmp_path: Path) -> None:
    new = index(tmp_path / "new.db", {"x": ("a", 1)})
    with Store.open(tmp_path / "old.db", "write") as store, store.batch():
        root_id(store, b"/r", 2)
        put_lora(store, "a", VERSION - 1, norm=7.0)
        put_file(store, b"/r", "y", "a", 2)
    wanted = rows(new)["loras"]
    for order in ([new, tmp_path / "old.db"], [tmp_path / "old.db", new]):
        with Store.open(tmp_path / f"{order[0].stem}-first.db", "write") as store:
            for path in order:
                merge(store, [path], relate=False)
            found = dump(store)["loras"]
            # Two files: what a file says about itself is not compared.
            (one,), (two,) = found.values(), wanted.values()
            assert one[0]["version"] == VERSION and one[0]["norm"] == two[0]["norm"]
            assert one[1:] == two[1:]
    # Alone it is taken as it is, and read again by the next run of index.
    assert (
        merged(tmp_path / "alone.db", tmp_path / "old.db")["loras"]
        == rows(tmp_path / "old.db")["loras"]
    )


def test_presence_is_that_of_the_last_look(tmp_path: Path) -> None:
    here = index(tmp_path / "here.db", {"x": ("a", 1)}, seen=5)
    gone = index(tmp_path / "gone.db", {"x": ("a", 1)}, seen=7, presence="gone")
    for order in permutations([here, gone]):
        found = merged(tmp_path / f"{order[0].stem}-first.db", *order)
        assert [row[-2] for row in found["files"].values()] == ["gone"]
    # The same where one index knows the folder as a part of another.
    part = index(tmp_path / "part.db", {"y": ("a", 1)}, root=b"/r/sub", seen=4, presence="gone")
    whole = index(tmp_path / "whole.db", {"sub/y": ("a", 1)}, seen=5)
    for order in permutations([part, whole]):
        found = merged(tmp_path / f"{order[0].stem}-nested.db", *order)
        assert [row[-2] for row in found["files"].values()] == ["here"]
    # What was pruned in the source stays, until the whole is pruned.
    with Store.open(gone, "write") as store:
        store.remove_files(store.known())
        assert not store.conn.execute("SELECT 1 FROM loras").fetchone()
    assert len(merged(tmp_path / "here-first.db", gone)["files"]) == 1


KILLED = """
import os, signal, sys
from lorafind.exchange import intake
from lorafind.exchange.merge import merge
from lorafind.index.store import Store
intake.ROWS = 2
left = int(sys.argv[1])
def count(statement):
    global left
    left -= statement.startswith(("INSERT", "UPDATE", "DELETE", "COMMIT"))
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
with Store.open(sys.argv[2], "write") as store:
    store.conn.set_trace_callback(count)
    merge(store, sys.argv[3:], relate=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_merge_goes_on_where_it_was(tmp_path: Path) -> None:
    table = {f"{k}": (f"lora {k % 17}", k + 1) for k in range(20)}
    pairs = tuple((f"lora {a}", f"lora {b}") for a in range(17) for b in range(a) if a % 2)
    source = index(tmp_path / "a.db", table, pairs=pairs)
    wanted = merged(tmp_path / "straight.db", source)
    assert len(wanted["relations"]) == 64
    target = tmp_path / "all.db"
    found = set()
    for statements in range(20, 500, 20):
        code = subprocess.run([sys.executable, "-c", KILLED, str(statements), target, source])
        if code.returncode == 0:
            break
        assert code.returncode == -signal.SIGKILL
        with Store.open(target) as store:
            counts = [
                store.conn.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for name in ("loras", "signatures", "files", "relations")
            ]
            found.add(tuple(counts))
            if counts[2]:
                # A file never stands there before its LoRA is whole.
                assert all(row[0]["version"] == VERSION for row in dump(store)["loras"].values())
    else:
        pytest.fail("it never ends")
    # It was killed in every stage.
    assert {tuple(c > 0 for c in counts) for counts in found} >= {
        (True, False, False, False),
        (True, True, False, False),
        (True, True, True, False),
        (True, True, True, True),
    }
    with Store.open(target) as store:
        same(dump(store), wanted)
    same(merged(target, source), wanted)


def test_bad_sources_change_nothing(tmp_path: Path) -> None:
    good = index(tmp_path / "good.db", {f"{k}": (f"{k}", 1) for k in range(20)})
    target = index(tmp_path / "all.db", {"x": ("x", 1)})
    data = good.read_bytes()
    (tmp_path / "cut.db").write_bytes(data[: len(data) // 2])
    middle = bytearray(data)
    middle[3 * 16384 : 9 * 16384] = bytes(6 * 16384)
    (tmp_path / "damaged.db").write_bytes(middle)
    (tmp_path / "text.db").write_bytes(b"no database" * 100)
    (tmp_path / "empty.db").touch()
    shutil.copy(good, tmp_path / "newer.db")
    with sqlite3.connect(tmp_path / "newer.db") as conn:
        conn.execute("PRAGMA user_version = 99")
    with sqlite3.connect(tmp_path / "other.db") as conn:
        conn.execute("CREATE TABLE t (x)")
    conn.close()
    shutil.copy(good, tmp_path / "unfinished.db")
    with sqlite3.connect(tmp_path / "unfinished.db") as conn:
        conn.execute("UPDATE loras SET version = -version WHERE id = 3")
    conn.close()
    before = rows(target)
    link = tmp_path / "link.db"
    link.symlink_to(target)
    for name, words in {
        "cut": "cut off|damaged",
        "damaged": "damaged",
        "text": "damaged",
        "empty": "is empty",
        "newer": "newer lorafind",
        "other": "another program",
        "unfinished": "ended before it was done",
        "all": "merged into",
        "link": "merged into",
        "nowhere": "no index at",
    }.items():
        with Store.open(target, "write") as store:
            changes = store.conn.total_changes
            with pytest.raises(IndexProblem, match=words) as caught:
                merge(store, [good, tmp_path / f"{name}.db"])
            assert "\n" not in str(caught.value)
            assert store.conn.total_changes == changes
    same(rows(target), before)


def test_rows_that_no_index_has_are_told(tmp_path: Path) -> None:
    bad = index(tmp_path / "bad.db", {"x": ("x", 1)})
    with Store.open(bad, "write") as store:
        store.conn.execute("PRAGMA foreign_keys = OFF")
        store.conn.execute("UPDATE files SET lora = 77")
    with (
        Store.open(tmp_path / "all.db", "write") as store,
        pytest.raises(IndexProblem, match=r"bad.db holds what no index can .*LoRA 77"),
    ):
        merge(store, [bad])


def test_damage_that_shows_on_the_way_leaves_the_index_whole(tmp_path: Path) -> None:
    good = index(tmp_path / "good.db", {f"{k}": (f"{k}", 1) for k in range(20)})
    target = index(tmp_path / "all.db", {"x": ("x", 1)})
    before = rows(target)
    with sqlite3.connect(good) as conn:
        (page,) = conn.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'signatures'")
        # In WAL mode the pages may not be in the file yet.
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    conn.close()
    data = bytearray(good.read_bytes())
    tail = len(data) // 16384 * 3 // 4
    for number in range(tail, tail + 4):
        # The beginning of a page of a long BLOB is the number of its next one.
        data[number * 16384 : number * 16384 + 4] = b"\xff" * 4
    assert page[0] < tail
    (tmp_path / "bad.db").write_bytes(data)
    with (
        Store.open(target, "write") as store,
        pytest.raises(IndexProblem, match=r"bad\.db is damaged"),
    ):
        merge(store, [tmp_path / "bad.db"])
    with Store.open(target, "write") as store:
        assert {os.fsdecode(row.path) for row in store.known()} == {"x"}
        # A later run of index takes what is left of it out.
        store.drop_orphans()
    same(rows(target), before)
    both = merged(target, good)
    assert len(both["files"]) == 21 and len(both["loras"]) == 21
