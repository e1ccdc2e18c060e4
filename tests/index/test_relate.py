"""Relations of a large index: copies by buckets, everything in blocks, crowds of copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorafind.api import Index
from lorafind.demo.make import make
from lorafind.index import pairs, relate
from lorafind.index.progress import Silent
from lorafind.index.relate import compared_in_full, copies_mark, mark_of, outlook, unrelated
from lorafind.index.store import Store
from lorafind.relations.buckets import COPIES
from lorafind.search.dupes import Choice
from tests.search import small
from tests.search.small import Factors, each, random, save


def turned_factors(found: Factors, seed: int) -> Factors:
    """Other factors of one ΔW."""
    g = np.random.default_rng(seed)
    made: Factors = {}
    for key, (up, down) in found.items():
        q = np.linalg.qr(g.standard_normal((up.shape[1], up.shape[1])))[0]
        made[key] = ((up @ q).astype("f4"), (q.T @ down).astype("f4"))
    return made


def bf16(a: np.ndarray) -> np.ndarray:
    """Rounded to BF16, kept in float32."""
    return (a.view(np.uint32) + np.uint32(0x8000) & np.uint32(0xFFFF0000)).view(np.float32)


def collection(folder: Path) -> None:
    """Copies and relatives of every kind, among strangers."""
    for seed in range(6):
        one = random(seed)
        save(folder / f"{seed}-a.safetensors", one)
        save(folder / f"{seed}-b.safetensors", each(one, lambda a: a.astype(np.float16)))
        save(folder / f"{seed}-c.safetensors", each(one, bf16))
        save(folder / f"{seed}-d.safetensors", turned_factors(one, seed))
        save(folder / f"{seed}-e.safetensors", small.resized(one, 2))
        save(
            folder / f"{seed}-f.safetensors",
            {key: (up * np.float32(0.5), down) for key, (up, down) in one.items()},
        )
        half = dict(list(one.items())[:8])
        save(folder / f"{seed}-g.safetensors", half)


def relations(store: Store, grades: tuple[str, ...] | None = None) -> dict[tuple[str, str], Any]:
    """Contents of a pair → everything that the index knows of it."""
    rows = store.conn.execute(
        "SELECT a.content, b.content, grade, direction, steps, numbers FROM relations "
        "JOIN loras a ON a.id = x JOIN loras b ON b.id = y WHERE grade != ''"
    ).fetchall()
    return {row[:2]: row[2:] for row in rows if grades is None or row[2] in grades}


def without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every full comparison seems to take too long."""
    monkeypatch.setattr(relate, "PATIENCE", -1.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection and its index, compared in full, as small ones are."""
    place = tmp_path_factory.mktemp("whole")
    collection(place / "l")
    small.index(place / "x.db", place / "l")
    return place


def fresh(whole: Path, place: Path) -> Path:
    """The same LoRAs under the same ids, never compared."""
    shutil.copy(whole / "x.db", place / "x.db")
    with Store.open(place / "x.db", "write") as store, store.batch():
        store.conn.execute("DELETE FROM relations")
        store.conn.execute("DELETE FROM families")
        for name in (mark_of("sd"), copies_mark("sd")):
            store.conn.execute("DELETE FROM meta WHERE key = ?", (name,))
    return place / "x.db"


def test_copies_are_all_found_without_the_rest(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = fresh(whole, tmp_path)
    without_patience(monkeypatch)
    with Store.open(whole / "x.db") as full, Store.open(db, "write") as store:
        assert unrelated(store)
        relate.relate(store, Silent())
        assert not unrelated(store)
        expected = relations(full, COPIES)
        assert len(expected) >= 6 * 6
        assert relations(store, COPIES) == expected
        # What was looked at besides would have been found as well.
        assert relations(store).items() <= relations(full).items()
        assert len(relations(store)) < len(relations(full))
        assert compared_in_full(store) == (0, 42)
        assert compared_in_full(full) == (42, 42)
        (left,) = outlook(store)
        assert (left.loras, left.left) == (42, 42)
        assert outlook(full) == []


def test_copies_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the full comparison proves to be one ΔW stands in the search for copies alone."""
    make(tmp_path / "l")
    # And a third of it once more, in BF16.
    for path in sorted((tmp_path / "l").rglob("*.safetensors"))[::3]:
        try:
            tensors = load_file(path)
        except SafetensorError:
            continue
        half = {k: t.bfloat16() for k, t in tensors.items() if t.is_floating_point()}
        save_file({**tensors, **half}, path.with_name(f"again {path.name}"))
    small.index(tmp_path / "x.db", tmp_path / "l")
    (tmp_path / "copies").mkdir()
    with Store.open(tmp_path / "x.db") as full:
        expected = relations(full, COPIES)
    shutil.copy(tmp_path / "x.db", tmp_path / "copies/x.db")
    without_patience(monkeypatch)
    with Store.open(tmp_path / "copies/x.db", "write") as store:
        with store.batch():
            store.conn.execute("DELETE FROM relations")
            store.conn.execute("DELETE FROM meta WHERE key LIKE 'related/%' OR key LIKE 'copies/%'")
        relate.relate(store, Silent())
        assert len(expected) >= 5
        assert relations(store, COPIES) == expected
        assert compared_in_full(store)[0] == 0


def test_then_everything(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = fresh(whole, tmp_path)
    without_patience(monkeypatch)
    with Store.open(whole / "x.db") as full, Store.open(db, "write") as store:
        relate.relate(store, Silent())
        relate.relate(store, Silent(), deep=True)
        assert relations(store) == relations(full)
        assert outlook(store) == []
        assert not unrelated(store)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_blocks_find_what_the_whole_does(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    db = fresh(whole, tmp_path)
    monkeypatch.setattr(relate, "WHOLE", 0)
    monkeypatch.setattr(relate, "BLOCK", size)
    with Store.open(whole / "x.db") as full, Store.open(db, "write") as store:
        relate.relate(store, Silent())
        assert relations(store) == relations(full)


class Stop(Silent):
    """Interrupts after so many blocks of the full comparison."""

    def __init__(self, after: int) -> None:
        self.left, self.deep = after, False

    def stage(self, title: str, files: int, size: int) -> None:
        self.deep = title == "Comparing all LoRAs"

    def advance(self, files: int, size: int) -> None:
        self.left -= self.deep
        if not self.left:
            raise KeyboardInterrupt


def test_it_goes_on_where_it_was(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = fresh(whole, tmp_path)
    monkeypatch.setattr(relate, "WHOLE", 0)
    monkeypatch.setattr(relate, "BLOCK", 4)
    blocks = []
    real = pairs.all_pairs

    def counted(*arguments: Any, **named: Any) -> Any:
        blocks.append(arguments[2].tolist())
        return real(*arguments, **named)

    monkeypatch.setattr(relate, "all_pairs", counted)
    with Store.open(db, "write") as store:
        with pytest.raises(KeyboardInterrupt):
            relate.relate(store, Stop(3))
        # The third was proved, but not marked yet.
        assert store.get_meta(mark_of("sd")) == 8
        assert store.get_meta(copies_mark("sd")) == 42
        assert compared_in_full(store) == (8, 42)
    with Store.open(whole / "x.db") as full, Store.open(db, "write") as store:
        relate.relate(store, Silent(), deep=True)
        assert blocks[:4] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [9, 10, 11, 12]]
        assert relations(store) == relations(full)


def test_broken_off_between_the_two_searches(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run does not take it for one that was to look for copies only."""
    db = fresh(whole, tmp_path)

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with Store.open(db, "write") as store:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(relate, "all_pairs", broken)
            relate.relate(store, Silent())
        assert store.get_meta(copies_mark("sd")) == 42
        assert unrelated(store)
    with Store.open(whole / "x.db") as full, Store.open(db, "write") as store:
        relate.relate(store, Silent())
        assert relations(store) == relations(full)
        assert not unrelated(store)


def test_what_comes_later_is_compared_as_far_as_the_rest(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = fresh(whole, tmp_path)
    without_patience(monkeypatch)
    with Store.open(db, "write") as store:
        relate.relate(store, Silent())
        before = len(relations(store))
    again = tmp_path / "again"
    save(again / "copy.safetensors", turned_factors(random(2), 99))
    save(again / "small.safetensors", small.resized(random(3), 3))
    small.index(db, again)
    with Store.open(db, "write") as store:
        assert len(relations(store)) - before == 4
        assert {row[0] for row in relations(store).values()} >= {"weights"}
        relate.relate(store, Silent(), deep=True)
        found = {row[0] for row in relations(store).values()}
        assert {"weights", "resized", "scaled", "part"} <= found
        assert compared_in_full(store) == (44, 44)


def crowd(folder: Path, finer: int, coarse: int) -> None:
    """Many other factors of one ΔW, some in half precision, mixed."""
    one = random(1)
    for k in range(finer + coarse):
        made = turned_factors(one, k)
        if k % (finer + coarse) < coarse:
            made = each(made, lambda a: a.astype(np.float16))
        save(folder / f"{k:03}.safetensors", made)


@pytest.mark.parametrize(("finer", "coarse"), [(40, 0), (20, 30)])
def test_a_crowd_of_copies_is_not_proved_pair_by_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finer: int, coarse: int
) -> None:
    count = finer + coarse
    crowd(tmp_path / "l", finer, coarse)
    monkeypatch.setattr(pairs, "_STEP", 8)
    small.index(tmp_path / "x.db", tmp_path / "l")
    with Index.open(tmp_path / "x.db") as index:
        (proofs,) = index.store.conn.execute("SELECT count(*) FROM relations").fetchone()
        assert proofs < count * (count - 1) / 2 * 0.75
        (group,) = index.dupes(Choice())
        assert len(group.files) == count
        # One stays; the rest may go because of it.
        assert sum(member.removable for member in group.files) == count - 1
        assert not unrelated(index.store)


def test_without_its_holder_a_crowd_is_compared_again(tmp_path: Path) -> None:
    crowd(tmp_path / "l", 40, 0)
    small.index(tmp_path / "x.db", tmp_path / "l")
    with Index.open(tmp_path / "x.db") as index:
        (group,) = index.dupes(Choice())
        (text,) = index.store.conn.execute(
            "SELECT value FROM meta WHERE key LIKE 'stars/%'"
        ).fetchone()
        holders = set(json.loads(text))
    gone = [
        path
        for path in (tmp_path / "l").iterdir()
        if path.name == Path(group.keeper).name or len(holders) > 39
    ]
    for path in gone:
        path.unlink()
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build(prune=True, device="cpu")
        (group,) = index.dupes(Choice())
        assert len(group.files) == 40 - len(gone)
        assert sum(member.removable for member in group.files) == 39 - len(gone)
