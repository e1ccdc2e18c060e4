"""A series behaves like a dict, whatever is sealed, buried and compacted below it."""

from __future__ import annotations

import sqlite3
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafind.index import chunks as chunks_module
from lorafind.index.chunks import dtype_from_text, dtype_to_text
from lorafind.index.store import Store

RECORD = np.dtype([("unit", "<f2", (3, 4)), ("norm", "<f8", (3,))])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "i.db", "write") as store:
        yield store


def contents(store: Store, kind: str = "k", key: str = "") -> dict[int, list[float]]:
    result = {}
    for ids, matrix in store.chunks.scan(kind, key):
        assert len(ids) == len(matrix) <= chunks_module.CHUNK_ROWS
        for number, row in zip(ids.tolist(), matrix.tolist(), strict=True):
            assert number not in result
            result[number] = row
    return result


def counts(store: Store) -> tuple[int, int, int]:
    """Rows of chunks, tombstones and pending."""
    return store.conn.execute(
        "SELECT (SELECT coalesce(sum(rows), 0) FROM chunks), (SELECT count(*) FROM tombstones), "
        "(SELECT count(*) FROM pending)"
    ).fetchone()


def fill(store: Store, first: int, last: int, value: float = 0.0) -> None:
    with store.batch():
        ids = np.arange(first, last + 1)
        store.chunks.append_many("k", "", ids, np.stack([ids + value, -ids], 1).astype("f4"))


operation = st.one_of(
    st.tuples(st.just("set"), st.lists(st.integers(1, 24), min_size=1, max_size=9, unique=True)),
    st.tuples(st.just("delete"), st.lists(st.integers(1, 24), max_size=9, unique=True)),
    st.tuples(st.just("abort"), st.lists(st.integers(1, 24), max_size=3, unique=True)),
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(st.lists(operation, max_size=4), max_size=12))
def test_a_series_is_a_dict(
    batches: list[list[tuple[str, list[int]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of five rows, so that a few operations seal and compact."""
    monkeypatch.setattr(chunks_module, "CHUNK_ROWS", 5)
    conn = sqlite3.connect(":memory:", isolation_level=None)
    store = Store(Path("memory"), conn, None)
    chunks_module_schema(store)
    model: dict[int, list[float]] = {}
    value = 0.0
    for operations in batches:
        after = dict(model)
        try:
            with store.batch():
                for what, ids in operations:
                    if what == "delete":
                        store.chunks.delete(ids, "k", "")
                        after = {i: row for i, row in after.items() if i not in ids}
                        continue
                    value += 1
                    rows = np.array([[i, value] for i in ids], "f4").reshape(-1, 2)
                    store.chunks.append_many("k", "", ids, rows)
                    after |= {i: [float(i), value] for i in ids}
                    if what == "abort":
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            after = model
        model = after
        assert contents(store) == model
        assert sorted(store.chunks.ids("k", "").tolist()) == sorted(model)
        assert store.chunks.count("k", "") == len(model)
        for i in range(1, 25):
            row = store.chunks.get("k", "", i)
            assert (None if row is None else row.tolist()) == model.get(i)
        sealed, dead, waiting = counts(store)
        assert waiting < 5 and sealed % 5 == 0
        # No chunk of five keeps more than one tombstone (a quarter).
        assert dead <= sealed // 5
    conn.close()


def chunks_module_schema(store: Store) -> None:
    from lorafind.index.schema import migrate

    migrate(store.db)
    store.conn.execute("PRAGMA foreign_keys = ON")


def test_sealing_at_4096(store: Store) -> None:
    fill(store, 1, 4095)
    assert counts(store) == (0, 0, 4095)
    fill(store, 4096, 4096)
    assert counts(store) == (4096, 0, 0)
    fill(store, 4097, 4097 + 8192)
    assert counts(store) == (3 * 4096, 0, 1)
    assert contents(store) == {i: [i, -i] for i in range(1, 12290)}


def test_tombstones_and_compaction_above_a_quarter(store: Store) -> None:
    fill(store, 1, 4096)
    with store.batch():
        store.chunks.delete(range(1, 1025), "k")
    assert counts(store) == (4096, 1024, 0)
    with store.batch():
        store.chunks.delete([4096], "k")
    assert counts(store) == (0, 0, 3071)
    assert contents(store) == {i: [i, -i] for i in range(1025, 4096)}


def test_replacing_sealed_vectors(store: Store) -> None:
    fill(store, 1, 4096)
    fill(store, 10, 12, value=0.5)
    assert counts(store) == (4096, 3, 3)
    assert contents(store) == {i: [i + 0.5 if 10 <= i <= 12 else i, -i] for i in range(1, 4097)}


def test_sealed_blocks_are_not_copied(store: Store) -> None:
    fill(store, 1, 4096)
    ((ids, matrix),) = store.chunks.scan("k", "")
    for array in (ids, matrix):
        assert not array.flags.owndata and not array.flags.writeable


def test_a_scan_keeps_two_blocks_in_memory(store: Store) -> None:
    width = 256
    with store.batch():
        for first in range(0, 12 * 4096, 4096):
            rows = np.zeros((4096, width), "f4")
            store.chunks.append_many("k", "", range(first + 1, first + 4097), rows)
    block = 4096 * width * 4
    tracemalloc.start()
    total = sum(len(ids) for ids, _ in store.chunks.scan("k", ""))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 12 * 4096
    assert peak < 2.5 * block


def test_a_scan_sees_one_state_while_another_process_seals(tmp_path: Path, store: Store) -> None:
    fill(store, 1, 4096 + 4000)
    with Store.open(tmp_path / "i.db") as reader:
        scan = reader.chunks.scan("k", "")
        seen = next(scan)[0].tolist()
        # The pending rows become a chunk, the first chunk is dissolved.
        fill(store, 9001, 9100)
        with store.batch():
            store.chunks.delete(range(1, 2000))
        for ids, _ in scan:
            seen += ids.tolist()
        assert sorted(seen) == list(range(1, 8097))
        assert len(contents(reader)) == 8096 + 100 - 1999


def test_records_and_shapes(store: Store) -> None:
    random = np.random.default_rng(1)
    rows = np.zeros(5000, RECORD)
    rows["unit"] = random.standard_normal((5000, 3, 4))
    rows["norm"] = random.random((5000, 3))
    with store.batch():
        store.chunks.append_many("identity", "sd1", range(1, 5001), rows)
        store.chunks.append("matrix", "", 7, np.arange(6, dtype=">i4").reshape(2, 3))
    for ids, block in store.chunks.scan("identity", "sd1"):
        assert np.array_equal(block["unit"], rows["unit"][ids - 1])
        assert np.array_equal(block["norm"], rows["norm"][ids - 1])
    one = store.chunks.get("identity", "sd1", 17)
    assert one is not None and np.array_equal(one, rows[16])
    ((ids, block),) = store.chunks.scan("matrix", "")
    assert block.shape == (1, 2, 3) and block[0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("dtype", ["f2", ">f4", "i1", "<i8", RECORD])
def test_dtypes_survive_as_text(dtype: str | np.dtype) -> None:
    expected = np.dtype(dtype).newbyteorder("<")
    assert dtype_from_text(dtype_to_text(np.dtype(dtype))) == expected


def test_series_are_apart(store: Store) -> None:
    with store.batch():
        for key, value in (("a", 1.0), ("b", 2.0)):
            store.chunks.append("k", key, 1, np.array([value], "f4"))
        store.chunks.append("other", "a", 1, np.array([3], "i1"))
    assert [(s.kind, s.key) for s in store.chunks.series()] == [
        ("k", "a"),
        ("k", "b"),
        ("other", "a"),
    ]
    with store.batch():
        store.chunks.delete([1], "k", "a")
        store.chunks.drop("k", "b")
    assert contents(store, "k", "a") == {} == contents(store, "k", "b")
    assert contents(store, "other", "a") == {1: [3]}
    assert [s.key for s in store.chunks.series("k")] == ["a"]
    with store.batch():
        store.chunks.delete([1])
    assert contents(store, "other", "a") == {}


def test_another_dtype_or_shape_is_refused(store: Store) -> None:
    fill(store, 1, 2)
    for wrong in (np.zeros(3, "f4"), np.zeros(2, "f8")):
        with pytest.raises(ValueError, match="k/"), store.batch():
            store.chunks.append("k", "", 3, wrong)
    with pytest.raises(ValueError, match="vectors"), store.batch():
        store.chunks.append_many("k", "", [3], np.zeros((2, 2), "f4"))
    assert len(contents(store)) == 2
