"""An index of a bucket: the same as of the folder, kept up to date, and never lost.

The store is moto's S3 server, reached over HTTP; every request is counted.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorafind.api import Index
from lorafind.demo.make import make
from lorafind.files import remote, safetensors, spool
from lorafind.files.place import state
from lorafind.files.scan import join
from lorafind.formats import read
from lorafind.index import build, examine
from lorafind.index.problem import IndexProblem
from tests.index.same import dump
from tests.remote import Store, serving

URL = "s3://collection/demo"
THIN = Path(make.__code__.co_filename).parent / "data" / "thin"


@pytest.fixture
def few(bucket: Store) -> Store:
    """Three LoRAs, the last a copy of the second."""
    names = sorted(THIN.glob("lobster*"))
    bucket.put("demo/a.safetensors", names[0].read_bytes())
    bucket.put("demo/b.safetensors", names[1].read_bytes())
    bucket.put("demo/sub/c.safetensors", names[1].read_bytes())
    return bucket


def files(index: Index, root: str) -> dict[str, tuple[Any, ...]]:
    """Path below the root → what the index knows of it, but for what a file system adds."""
    rows = index.store.conn.execute(
        "SELECT r.path, f.path, f.size, f.status, f.reason, f.sha256, f.presence, l.content "
        "FROM files f JOIN roots r ON r.id = f.root LEFT JOIN loras l ON l.id = f.lora"
    )
    return {os.fsdecode(join(a, b)).removeprefix(root): tuple(rest) for a, b, *rest in rows}


def presence(index: Index) -> dict[str, str]:
    return {path: row[4] for path, row in files(index, URL).items()}


def test_a_bucket_gives_the_index_of_the_folder(bucket: Store, tmp_path: Path) -> None:
    make(tmp_path / "loras")
    (tmp_path / "loras/thin/lobster-train-01.civitai.info").write_text(
        '{"trainedWords": ["lbstr"], "model": {"name": "Lobster"}, "name": "v1"}'
    )
    (tmp_path / "loras/thin/lobster-train-01.preview.png").write_bytes(b"no picture")
    bucket.put_tree(tmp_path / "loras", "demo")
    with Index.open(tmp_path / "local.db", write=True) as index:
        index.build([tmp_path / "loras"])
        here, near = files(index, str(tmp_path / "loras")), dump(index.store)
    with Index.open(tmp_path / "remote.db", write=True) as index:
        first = index.build([URL], relate=False)
        assert (first.offline, first.unreachable) == ({}, {})
        loaded = Counter(path for method, path, span in bucket.requests if span)
        weights = {p: n for p, n in loaded.items() if p.endswith(".safetensors")}
        assert len(weights) == len(here) and set(weights.values()) == {1}
        index.build()
        assert files(index, URL) == here
        there = dump(index.store)
        for table in ("loras", "relations", "checked", "families"):
            assert there[table] == near[table], table
        (card,) = [row for row in index.ls() if row["name"] == "Lobster v1"]
        assert card["path"] == f"{URL}/thin/lobster-train-01.safetensors"
        (facts,) = index.store.conn.execute(
            "SELECT l.facts FROM loras l JOIN files f ON f.lora = l.id WHERE f.path = ?",
            (b"thin/lobster-train-01.safetensors",),
        ).fetchone()
        assert "lbstr" in facts and "lobster-train-01.preview.png" in facts
        bucket.requests.clear()
        again = index.build()
        assert (again.refreshed, again.added, again.gone) == (0, 0, 0)
        assert bucket.reads() == [] and again.unchanged == first.added
        assert {method for method, *_ in bucket.requests} == {"GET"}
        assert len(bucket.requests) == len({Path(p).parent for p in here}) + 1


def test_what_changes_in_a_bucket(few: Store, tmp_path: Path) -> None:
    names = sorted(THIN.glob("lobster*"))
    with Index.open(tmp_path / "x.db", write=True) as index:
        assert index.build([URL + "/"]).added == 3
        before = files(index, URL)
        same_size = bytearray(names[0].read_bytes())
        same_size[-2] ^= 1
        few.put("demo/a.safetensors", bytes(same_size))
        few.delete("demo/sub/c.safetensors")
        few.put("demo/d.safetensors", names[2].read_bytes())
        few.requests.clear()
        found = index.build()
        assert (found.refreshed, found.added, found.gone) == (1, 1, 1)
        after = files(index, URL)
        assert after["/a.safetensors"][5] != before["/a.safetensors"][5]
        assert after["/b.safetensors"] == before["/b.safetensors"]
        assert presence(index) == {
            "/a.safetensors": "here",
            "/b.safetensors": "here",
            "/d.safetensors": "here",
            "/sub/c.safetensors": "gone",
        }
        assert index.build(prune=True).pruned == 1
        assert index.forget(URL + "/") and files(index, URL) == {}


def test_copies_in_a_bucket_are_no_links_of_one_another(few: Store, tmp_path: Path) -> None:
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([URL])
        inodes = index.store.conn.execute("SELECT device, inode FROM files").fetchall()
        assert len(set(inodes)) == 3
        (group,) = [group for group in index.dupes() if group.grade == "file"]
        assert [member.stays for member in group.files[1:]] == [
            "in a store, where nothing is removed"
        ]


def test_a_server_that_is_down_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with Index.open(tmp_path / "x.db", write=True) as index:
        with serving() as store:
            store.connect(monkeypatch, tmp_path)
            store.put_tree(THIN, "demo")
            index.build([URL])
            known = files(index, URL)
        found = index.build(prune=True, force_prune=True)
        (why,) = found.offline.values()
        assert "cannot be reached" in why and "secret" not in why
        assert (found.gone, found.pruned) == (0, 0)
        assert set(presence(index).values()) == {"offline"}
        assert {p: r[5] for p, r in files(index, URL).items()} == {
            p: r[5] for p, r in known.items()
        }
        # What is known of it can still be searched with.
        assert len(list(index.similar(f"{URL}/lobster-train-01.safetensors"))) > 1


def test_a_bucket_that_lists_nothing_is_offline_not_gone(few: Store, tmp_path: Path) -> None:
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([URL])
        few.empty()
        found = index.build(prune=True, force_prune=True)
        assert "nothing is listed there" in found.offline[os.fsencode(URL)]
        assert set(presence(index).values()) == {"offline"}
        few.put("demo/b.safetensors", next(THIN.glob("lobster*-02*")).read_bytes())
        found = index.build()
        assert presence(index)["/b.safetensors"] == "here"
        assert presence(index)["/a.safetensors"] in ("gone", "offline")


def test_part_of_a_bucket(few: Store, tmp_path: Path) -> None:
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([URL + "/sub"])
        index.build([URL])
        assert [os.fsdecode(root.path) for root in index.store.roots()] == [URL]
        few.delete("demo/sub/c.safetensors")
        few.requests.clear()
        assert index.build([URL + "/sub"]).gone == 1
        assert index.build([URL + "/a.safetensors"]).unchanged == 1
        assert few.reads() == []


def test_an_object_that_changes_while_it_is_read(few: Store, tmp_path: Path) -> None:
    other = next(THIN.glob("ebgaramond*")).read_bytes()

    def change(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/a.safetensors"):
            few.before = lambda method, path: None
            few.put("demo/a.safetensors", other)

    few.before = change
    with Index.open(tmp_path / "x.db", write=True) as index:
        found = index.build([URL])
        (refused,) = found.refused
        assert (refused.outcome, refused.path) == (
            "changing",
            b"s3://collection/demo/a.safetensors",
        )
        assert index.build().refreshed == 1
        assert files(index, URL)["/a.safetensors"][1] == "lora"


def test_an_object_that_vanishes_or_is_forbidden(few: Store, tmp_path: Path) -> None:
    def vanish(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/a.safetensors"):
            few.delete("demo/a.safetensors")

    few.before = vanish
    with Index.open(tmp_path / "x.db", write=True) as index:
        found = index.build([URL])
        assert [(r.outcome, r.reason) for r in found.refused] == [
            ("vanished", "a.safetensors is no longer there")
        ]
        assert found.added == 2


def test_a_server_that_fails_for_one_object(few: Store, tmp_path: Path) -> None:
    def fail(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/a.safetensors"):
            raise RuntimeError("its disk is broken")

    few.before = fail
    with Index.open(tmp_path / "x.db", write=True) as index:
        found = index.build([URL])
        ((outcome, reason),) = [(r.outcome, r.reason) for r in found.refused]
        assert outcome == "inaccessible" and reason.startswith("a.safetensors cannot be read: ")
        assert found.added == 2
        few.before = lambda method, path: None
        assert index.build().refreshed == 1
        assert files(index, URL)["/a.safetensors"][1] == "lora"


def test_a_large_object_is_streamed(
    few: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Index.open(tmp_path / "whole.db", write=True) as index:
        index.build([URL], relate=False)
        whole, expected = files(index, URL), dump(index.store)["loras"]
    for module in (safetensors, read, build, examine):
        if hasattr(module, "STREAM_ABOVE"):
            monkeypatch.setattr(module, "STREAM_ABOVE", 20_000)
    monkeypatch.setattr(remote, "WHOLE", 10_000)
    monkeypatch.setattr(remote, "FIRST", 9_000)
    monkeypatch.setattr(remote, "BLOCK", 16_000)
    held: list[int] = []
    true = remote.read

    def counted(url: str, begin: int, end: int) -> bytes:
        held.append(end - begin)
        return true(url, begin, end)

    monkeypatch.setattr(remote, "read", counted)
    with Index.open(tmp_path / "streamed.db", write=True) as index:
        assert index.build([URL], relate=False).added == 3
        assert files(index, URL) == whole
        found = dump(index.store)["loras"]
    assert found.keys() == expected.keys()
    for content, row in found.items():
        assert row[1] == expected[content][1]
    assert max(held) <= 16_000 and len(held) > 9


def test_a_first_look_refuses_a_large_file_by_its_header(
    few: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WHOLE", 10_000)
    monkeypatch.setattr(remote, "FIRST", 9_000)
    head = b'{"x":{"dtype":"F32","shape":[5000],"data_offsets":[0,20000]}}'
    few.put("demo/z.safetensors", len(head).to_bytes(8, "little") + head + bytes(20_000))
    few.requests.clear()
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([URL])
        assert files(index, URL)["/z.safetensors"][1] == "unsupported"
    assert few.reads("z.safetensors") == ["bytes=0-8999"]


def test_a_proof_loads_each_object_once(few: Store, tmp_path: Path) -> None:
    make(tmp_path / "loras")
    few.put_tree(tmp_path / "loras", "demo")
    spool._copies.cache_clear()
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([URL], relate=False)
        few.requests.clear()
        assert index.build().relations > 0
    assert max(Counter(path for method, path, span in few.requests if span).values()) == 1


def test_a_copy_is_there_as_long_as_it_is_used(few: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(spool, "ROOM", 1)
    spool._copies.cache_clear()
    one = read.open_adapter(f"{URL}/a.safetensors")
    first = spool.copy_of(f"{URL}/a.safetensors").path
    other = read.open_adapter(f"{URL}/b.safetensors")
    for adapter in (one, other):
        assert adapter.fetch(next(iter(adapter.plan.modules)).keys[0]).numel()
    assert os.path.exists(first)
    del one
    assert not os.path.exists(os.path.dirname(first))
    spool._copies.cache_clear()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://collection/nothing", "Nothing is at s3://collection/nothing"),
        ("s3://nosuchbucket/x", "Nothing is at s3://nosuchbucket/x"),
        ("s3://id:hush@collection/x", "s3://collection: a URL with a password"),
        ("https://host/x.safetensors?token=hush", "https://host/x.safetensors: a URL with"),
        ("s3://", "name what is to be read in it"),
        ("nonsense://x/y", "no filesystem for nonsense:// is known to fsspec"),
    ],
)
def test_a_url_that_cannot_be_indexed(bucket: Store, tmp_path: Path, url: str, said: str) -> None:
    with Index.open(tmp_path / "x.db", write=True) as index:
        with pytest.raises(IndexProblem) as caught:
            index.build([url])
        assert said in str(caught.value) and "hush" not in str(caught.value)
        assert index.store.roots() == []


def test_a_store_in_memory(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    with Index.open(tmp_path / "x.db", write=True) as index:
        try:
            for path in THIN.glob("lobster*"):
                fs.pipe(f"/loras/{path.name}", path.read_bytes())
            assert index.build(["memory://loras"]).added == 6
            name = "memory://loras/lobster-train-01.safetensors"
            assert index.store.conn.execute(
                "SELECT size, mtime_ns FROM files WHERE path = 'lobster-train-01.safetensors' "
                "OR path = CAST('lobster-train-01.safetensors' AS BLOB)"
            ).fetchone() == tuple(state(name))
        finally:
            fs.rm("/loras", recursive=True)


def test_without_tag_and_time_an_object_is_never_known(tmp_path: Path, monkeypatch: Any) -> None:
    fs = pytest.importorskip("fsspec").filesystem("memory")
    told = type(fs).info, type(fs).ls

    def info(self: Any, path: str, **options: Any) -> Any:
        return told[0](self, path, **options) | {"created": None}

    def ls(self: Any, path: str, detail: bool = True, **options: Any) -> Any:
        return [row | {"created": None} for row in told[1](self, path, detail=True, **options)]

    monkeypatch.setattr(type(fs), "info", info)
    monkeypatch.setattr(type(fs), "ls", ls)
    try:
        data = bytearray(next(THIN.glob("lobster*")).read_bytes())
        fs.pipe("/bare/a.safetensors", bytes(data))
        with Index.open(tmp_path / "x.db", write=True) as index:
            assert index.build(["memory://bare"]).added == 1
            data[-2] ^= 1
            fs.pipe("/bare/a.safetensors", bytes(data))
            before = files(index, "memory://bare")
            assert index.build().refreshed == 1
            assert (
                files(index, "memory://bare")["/a.safetensors"][3] != (before["/a.safetensors"][3])
            )
    finally:
        fs.rm("/bare", recursive=True)
