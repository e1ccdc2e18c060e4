"""URLs, and what a store says of its objects: through real filesystems of fsspec."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lorafind.files import listing, remote, sidecars
from lorafind.files.mounts import filesystem
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.place import (
    absolute,
    below,
    beside,
    folder_of,
    handled,
    is_remote,
    state,
)
from lorafind.files.safetensors import Opened
from lorafind.files.scan import Found, ScanReport, Target, probe, scan

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def walked(
    root: bytes, prefix: bytes = b"", single: bool = False
) -> tuple[list[Found], ScanReport]:
    report = ScanReport()
    return list(scan([Target(root, prefix, single)], report)), report


@pytest.mark.parametrize(
    ("text", "remote_one", "written"),
    [
        ("s3://b/x/", True, "s3://b/x"),
        ("S3A://b/x", True, "s3://b/x"),
        ("gcs://b//x", True, "gs://b//x"),
        ("hf://o/r@refs%2Fpr%2F1/x y#?.safetensors", True, None),
        ("memory://", True, "memory://"),
        ("sftp://me@host:22/x", True, "sftp://me@host:22/x"),
        ("file:///a/b/", False, "/a/b"),
        ("/a//b/../c", False, "/a/c"),
        ("~/x", False, os.path.expanduser("~/x")),
        ("C://x", False, os.path.abspath("C://x")),
        ("1://x", False, os.path.abspath("1://x")),
    ],
)
def test_how_a_place_is_written(text: str, remote_one: bool, written: str | None) -> None:
    assert is_remote(text) is is_remote(os.fsencode(text)) is remote_one
    assert absolute(text) == (text if written is None else written)


@pytest.mark.parametrize(
    "url",
    [
        "s3://id:hush@bucket/x",
        "sftp://me:hush@host/x",
        "https://h/x?token=hush",
        "https://h/x?a=1&X-Amz-Signature=hush",
        "abfs://c/x?sig=hush",
    ],
)
def test_a_secret_in_a_url_is_not_taken(url: str) -> None:
    with pytest.raises(OSError, match="password, key or token") as caught:
        absolute(url)
    assert "hush" not in str(caught.value) and "hush" not in str(caught.value.filename)


def test_parts_of_places() -> None:
    assert beside("s3://b/x.safetensors", "x.txt") == "s3://b/x.txt"
    assert beside("memory://x.safetensors", "x.txt") == "memory://x.txt"
    assert beside("a/x", "y") == os.path.join("a", "y")
    assert folder_of("s3://b/d/x") == "s3://b/d" and folder_of("memory://x") == "memory://"
    assert folder_of("a/x") == "a"
    assert below(b"s3://b/dd/x", b"s3://b/d") == b"" and below(b"s3://b/d/x", b"s3://b/d") == b"x"
    assert below(b"memory://x/y", b"memory://") == b"x/y"
    assert handled("s3://b//x") == "s3://b//x" and handled("/a") == Path("/a")
    assert filesystem("s3://b/x") == "s3"


def test_local_files_never_import_fsspec(tmp_path: Path) -> None:
    data = Path(listing.__file__).parents[1] / "demo" / "data" / "wild"
    code = (
        "import sys\n"
        "from lorafind.api import Index\n"
        f"with Index.open({str(tmp_path / 'x.db')!r}, write=True) as index:\n"
        f"    index.build([{str(data)!r}])\n"
        "    list(index.similar('lobster-train-07'))\n"
        "names = ('fsspec', 's3fs', 'lorafind.files.remote', 'lorafind.files.listing')\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_a_listing_becomes_founds(memory: Any) -> None:
    for name, data in {
        "a.safetensors": b"1234",
        "A.SAFETENSORS": b"12",
        "b.pt": b"1",
        "note.txt": b"x",
        "sub/c.safetensors": b"123",
        "sub/._c.safetensors": b"123",
        "sub/deep/d e#?.safetensors": b"1",
        "half.safetensors": b"",
        "half.safetensors.part": b"12",
        ".trash/z.safetensors": b"1",
    }.items():
        memory.pipe(f"/r/{name}", data)
    found, report = walked(b"memory://r")
    assert [(f.path, f.size, f.outcome) for f in found] == [
        (b"A.SAFETENSORS", 2, ""),
        (b"a.safetensors", 4, ""),
        (b"b.pt", 1, "pickle"),
        (b"sub/c.safetensors", 3, ""),
        (b"sub/deep/d e#?.safetensors", 1, ""),
    ]
    assert sorted(report.passed) == [
        b"memory://r/.trash",
        b"memory://r/half.safetensors",
        b"memory://r/half.safetensors.part",
        b"memory://r/sub/._c.safetensors",
    ]
    assert len({(f.device, f.inode) for f in found}) == len(found)
    assert report.stable == {found[0].device: True}
    for item in found:
        assert tuple(state(item.full)) == (item.size, item.mtime_ns)
    assert [f.path for f in walked(b"memory://r", b"sub")[0]] == [f.path for f in found[3:]]
    (one,), _ = walked(b"memory://r/a.safetensors", single=True)
    assert (one.full, one.size) == (b"memory://r/a.safetensors", 4)
    (one,), _ = walked(b"memory://r", b"a.safetensors")
    assert one == found[1]
    assert [f.path for f in walked(b"memory://")[0]] == [b"r/" + f.path for f in found]


def test_what_lists_nothing_is_out_of_reach(memory: Any) -> None:
    memory.pipe("/r/a.safetensors", b"1")
    for root, prefix, single in [
        (b"memory://gone", b"", False),
        (b"memory://gone/x.safetensors", b"", True),
        (b"memory://gone", b"x", False),
    ]:
        found, report = walked(root, prefix, single)
        assert (found, list(report.missing)) == ([], [root])
    # Its neighbours are there, so that it is gone.
    for root, prefix, single in [(b"memory://r/x", b"", True), (b"memory://r", b"x", False)]:
        found, report = walked(root, prefix, single)
        assert (found, report.missing, list(report.roots)) == ([], {}, [root])


def test_one_folder_that_cannot_be_listed(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/r/good/a.safetensors", b"1")
    memory.pipe("/r/bad/b.safetensors", b"1")
    listed = type(memory).ls

    def ls(self: Any, path: str, detail: bool = True, **options: Any) -> Any:
        if path.endswith("/bad"):
            raise PermissionError("Access Denied\nRequest id 7")
        return listed(self, path, detail, **options)

    monkeypatch.setattr(type(memory), "ls", ls)
    found, report = walked(b"memory://r")
    assert [f.path for f in found] == [b"good/a.safetensors"] and not report.missing
    assert "access is denied (Access Denied)" in report.unreachable[b"memory://r/bad"]


def test_a_change_shows_in_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = datetime(2024, 1, 2, 3, 4, 5, 678_000, UTC)

    def facts(**changes: Any) -> remote.Facts:
        info = {"size": 7, "ETag": '"a"', "LastModified": moment, "type": "file"} | changes
        return remote._facts("s3://b/x", info)

    first = facts()
    assert first.state == facts(ETag="a", LastModified=moment.replace(microsecond=0)).state
    assert first.state.st_mtime_ns // 10**9 == int(moment.timestamp()) and first.tagged
    others = [
        facts(ETag="b"),
        facts(size=8),
        facts(LastModified=moment.replace(second=6)),
        remote._facts("s3://b/y", {"size": 7, "ETag": "a", "LastModified": moment}),
    ]
    assert len({first.mark, *(other.mark for other in others)}) == 5
    assert all(other.state != first.state for other in others)
    # The Hub: the tag of the content alone; its times are in some answers only.
    lfs = {"size": 7, "blob_id": "p", "lfs": {"sha256": "q"}, "last_commit": None}
    told = lfs | {"last_commit": {"date": moment}, "last_modified": moment}
    assert remote._facts("hf://o/r/x", lfs) == remote._facts("hf://o/r/x", told)
    assert remote._facts("hf://o/r/x", lfs | {"lfs": {"sha256": "z"}}).mark != first.mark
    # No tag: the time as exact as it is told.
    plain = {"size": 7, "mtime": 1.25}
    assert not remote._facts("sftp://h/x", plain).tagged
    assert (
        remote._facts("sftp://h/x", plain).mark
        != remote._facts("sftp://h/x", plain | {"mtime": 1.5}).mark
    )
    assert remote._facts("sftp://h/x", {"size": 7, "modified": "2024-01-02T03:04:05Z"}).mtime > 0
    assert remote._facts("x://h/x", {"size": 7, "modified": "yesterday"}).mtime == 0


def test_ranges(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 40
    memory.pipe("/r/x", data)
    asked: list[tuple[int, int]] = []
    true = remote.read

    def read(url: str, begin: int, end: int) -> bytes:
        asked.append((begin, end))
        return true(url, begin, end)

    monkeypatch.setattr(remote, "read", read)
    with Opened("memory://r/x") as opened:
        pieces = bytearray(len(data))
        for begin in range(0, len(data), 1000):
            opened.fill(memoryview(pieces)[begin : begin + 1000])
        opened.settle()
    assert bytes(pieces) == data and asked == [(0, len(data))]
    monkeypatch.setattr(remote, "WHOLE", 100)
    monkeypatch.setattr(remote, "FIRST", 50)
    monkeypatch.setattr(remote, "BLOCK", 4000)
    asked.clear()
    with Opened("memory://r/x") as opened:
        opened.fill(memoryview(pieces))
    assert bytes(pieces) == data
    assert asked == [(0, 50), (50, 4050), (4050, 8050), (8050, 10240)]
    asked.clear()
    with Opened("memory://r/x", until=3010) as opened:
        opened.seek(3000)
        part = bytearray(10)
        opened.fill(memoryview(part))
    assert bytes(part) == data[3000:3010] and asked == [(3000, 3010)]


def test_a_change_between_two_requests(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WHOLE", 10)
    monkeypatch.setattr(remote, "FIRST", 10)
    monkeypatch.setattr(remote, "BLOCK", 10)
    for size in (20, 5):
        memory.pipe("/r/x", bytes(20))
        with pytest.raises(NotAnAdapter) as caught, Opened("memory://r/x") as opened:
            opened.fill(memoryview(bytearray(10)))
            time.sleep(0.01)
            memory.pipe("/r/x", bytes(size))
            opened.fill(memoryview(bytearray(10)))
            opened.settle()
        assert caught.value.outcome == "changing"
    memory.pipe("/r/x", bytes(20))
    with pytest.raises(NotAnAdapter) as caught, Opened("memory://r/x") as opened:
        opened.fill(memoryview(bytearray(10)))
        memory.rm("/r/x")
        opened.fill(memoryview(bytearray(10)))
    assert caught.value.outcome == "vanished"
    memory.pipe("/r/d/x", b"1")
    with pytest.raises(NotAnAdapter) as caught:
        Opened("memory://r/d")
    assert caught.value.outcome == "not-a-file"


@pytest.mark.parametrize(
    ("raised", "said", "number"),
    [
        (FileNotFoundError("k"), "it is not there", errno.ENOENT),
        (PermissionError("Forbidden"), "access is denied (Forbidden)", errno.EACCES),
        (TimeoutError("slow\nstack"), "slow", errno.EIO),
        (RuntimeError(), "RuntimeError", errno.EIO),
        (ValueError("to http://me:hush@proxy/ failed"), "to http://proxy/ failed", errno.EIO),
        (OSError(errno.ECONNREFUSED, "refused"), "refused", errno.ECONNREFUSED),
    ],
)
def test_what_libraries_raise(
    memory: Any, monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise raised

    monkeypatch.setattr(type(memory), "info", fail)
    with pytest.raises(OSError) as caught:
        state("memory://r/x")
    assert said in str(caught.value.strerror) and "hush" not in str(caught.value)
    assert (caught.value.errno, caught.value.filename) == (number, "memory://r/x")


def test_a_library_that_is_missing() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from lorafind.files.place import state\n"
        "try:\n    state('s3://b/x')\nexcept OSError as error:\n    print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == 's3:// needs the extra "s3": pip install "lorafind[s3]"\n', done.stderr


def test_sidecars_in_a_store(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/r/x.safetensors", b"")
    memory.pipe("/r/x.txt", b"a note")
    memory.pipe("/r/x.json", b"{broken")
    memory.pipe("/r/x.preview.png", b"")
    found = sidecars.read_sidecars("memory://r/x.safetensors")
    assert (found.notes, found.preview) == ("a note", "x.preview.png")
    assert found.broken == (("x.json", "it is not JSON"),)
    own = "memory://r/adapter_model.safetensors"
    assert sidecars.adapter_config(own) is None
    memory.pipe("/r/adapter_config.json", b'{"r": 4}')
    assert sidecars.adapter_config(own) == {"r": 4}
    assert sidecars.display_name(own, sidecars.Sidecar(), sidecars.Facts()) == "r"

    def fail(*_: Any, **__: Any) -> Any:
        raise TimeoutError("no answer")

    # The scale may be in it: without it the ΔW would be another, so that nothing is told.
    monkeypatch.setattr(type(memory), "cat_file", fail)
    with pytest.raises(NotAnAdapter, match="no answer"):
        sidecars.adapter_config(own)


def test_an_object_is_not_probed() -> None:
    with pytest.raises(OSError, match="not probed"):
        probe("memory://r/x")


def test_a_server_that_knows_no_ranges(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/r/x", bytes(range(100)))
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start, end: bytes(range(100)))
    assert remote.read("memory://r/x", 0, 10) == bytes(range(10))
    with pytest.raises(OSError, match="no parts of files"):
        remote.read("memory://r/x", 10, 20)
