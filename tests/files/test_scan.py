"""What the walk yields, passes over and never opens."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from lorafind.files.scan import PROBE, SAMPLE, SAMPLES, Found, ScanReport, Target, join, probe, scan
from tests.unprivileged import needs_permissions, open_folder, unprivileged

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX file types")


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def walk(*roots: Path, allow_pickle: bool = False) -> tuple[list[Found], ScanReport]:
    report = ScanReport()
    targets = [Target(os.fsencode(root), single=root.is_file()) for root in roots]
    return list(scan(targets, report, allow_pickle)), report


def names(found: list[Found]) -> list[str]:
    return [os.fsdecode(item.path) for item in found]


def test_facts_are_those_of_stat(tmp_path: Path) -> None:
    file = put(tmp_path / "a" / "B.SafeTensors", b"12345")
    put(tmp_path / "a" / "notes.txt")
    (item,) = walk(tmp_path)[0]
    facts = file.stat()
    assert item == Found(
        os.fsencode(tmp_path),
        b"a/B.SafeTensors",
        5,
        facts.st_mtime_ns,
        facts.st_ctime_ns,
        facts.st_dev,
        facts.st_ino,
    )
    assert item.full == os.fsencode(file)


def test_paths_are_sorted_and_below_their_root(tmp_path: Path) -> None:
    for name in ("b.safetensors", "c/x.safetensors", "a.safetensors", "c/d/y.safetensors"):
        put(tmp_path / name)
    assert names(walk(tmp_path)[0]) == [
        "a.safetensors",
        "b.safetensors",
        "c/x.safetensors",
        "c/d/y.safetensors",
    ]


def test_a_file_is_a_root_whatever_its_name(tmp_path: Path) -> None:
    file = put(tmp_path / "odd.name")
    (item,) = walk(file)[0]
    assert (item.root, item.path, item.full, item.outcome) == (
        os.fsencode(file),
        b"",
        os.fsencode(file),
        "",
    )


def test_a_target_below_a_root_walks_only_there(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x.safetensors")
    put(tmp_path / "b" / "y.safetensors")
    report = ScanReport()
    found = list(scan([Target(os.fsencode(tmp_path), b"b")], report))
    assert names(found) == ["b/y.safetensors"]


def test_pickles_are_refused_unless_allowed(tmp_path: Path) -> None:
    for name in ("a.pt", "b.bin", "c.ckpt", "d.PTH", "e.safetensors"):
        put(tmp_path / name)
    found, _ = walk(tmp_path)
    assert [item.outcome for item in found] == ["pickle"] * 4 + [""]
    assert "--allow-pickle" in found[0].reason
    assert {item.outcome for item in walk(tmp_path, allow_pickle=True)[0]} == {""}
    (single,) = walk(tmp_path / "a.pt")[0]
    assert single.outcome == "pickle"


def test_part_files_and_trash_are_passed_over(tmp_path: Path) -> None:
    kept = put(tmp_path / "kept.safetensors")
    put(tmp_path / "finished.safetensors", b"whole")
    put(tmp_path / "finished.safetensors.part", b"stale")
    passed = [
        put(tmp_path / name, data)
        for name, data in {
            "a.safetensors.part": b"x",
            "b.safetensors.crdownload": b"x",
            "c.safetensors.aria2": b"x",
            "c.safetensors": b"preallocated",
            "d.safetensors.download": b"x",
            "d.safetensors": b"",
            "e.safetensors.tmp": b"x",
            "._kept.safetensors": b"AppleDouble",
        }.items()
    ]
    trash = [".Trash-1000", ".trash", "$RECYCLE.BIN", ".lm-pending-delete", ".stversions", ".zfs"]
    for folder in trash:
        put(tmp_path / folder / "x.safetensors")
    put(tmp_path / ".local" / "share" / "Trash" / "files" / "x.safetensors")
    found, report = walk(tmp_path)
    assert names(found) == ["finished.safetensors", kept.name]
    expected = {os.fsencode(path) for path in passed}
    expected |= {os.fsencode(tmp_path / folder) for folder in trash}
    expected.add(os.fsencode(tmp_path / ".local" / "share" / "Trash"))
    expected.add(os.fsencode(tmp_path / "finished.safetensors.part"))
    assert set(report.passed) == expected


@posix
def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    put(tmp_path / "folder.safetensors" / "inside.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    # Its path must be short (108 bytes on Linux).
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)
        try:
            server.bind("socket.safetensors")
        finally:
            os.chdir(here)
        found, _ = walk(tmp_path)
    reasons = {os.fsdecode(item.path): item.reason for item in found if item.outcome}
    assert {item.outcome for item in found} == {"not-a-file", ""}
    assert names([item for item in found if not item.outcome]) == [
        "folder.safetensors/inside.safetensors"
    ]
    assert reasons["folder.safetensors"] == "it is a folder"
    assert reasons["pipe.safetensors"] == "it is a named pipe"
    assert reasons["socket.safetensors"] == "it is a socket"
    assert "does not exist" in reasons["dangling.safetensors"]
    assert "loop.safetensors" in reasons


@posix
def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    name = b"caf\xe9 \xff\n.safetensors"
    try:
        with open(join(folder, name), "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    (item,) = walk(tmp_path)[0]
    assert item.path == name
    assert len(probe(item.full)) == 16


@posix
def test_linked_folders_once_and_real_ones_first(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    put(root / "z" / "x.safetensors")
    put(other / "y.safetensors")
    (root / "a").symlink_to(root / "z")
    (root / "b").symlink_to(other)
    (root / "c").symlink_to(other)
    (root / "z" / "up").symlink_to(root)
    assert names(walk(root)[0]) == ["z/x.safetensors", "b/y.safetensors"]
    both, _ = walk(root, other)
    assert [(os.fsdecode(item.root), item.path) for item in both] == [
        (str(other), b"y.safetensors"),
        (str(root), b"z/x.safetensors"),
    ]


@posix
def test_linked_files_have_the_facts_of_their_target(tmp_path: Path) -> None:
    file = put(tmp_path / "a.safetensors", b"123")
    (tmp_path / "b.safetensors").symlink_to(file)
    os.link(file, tmp_path / "c.safetensors")
    found, _ = walk(tmp_path)
    assert [item.is_link for item in found] == [False, True, False]
    assert len({(item.device, item.inode, item.size) for item in found}) == 1


@needs_permissions
def test_unreadable_folders_are_reported_and_the_walk_goes_on() -> None:
    with open_folder() as folder:
        put(folder / "a" / "x.safetensors")
        put(folder / "b" / "y.safetensors")
        put(folder / "c" / "z.safetensors")
        (folder / "a").chmod(0o000)
        (folder / "c").chmod(0o444)
        with unprivileged():
            found, report = walk(folder)
    assert [(item.path, item.outcome) for item in found] == [
        (b"b/y.safetensors", ""),
        (b"c/z.safetensors", "inaccessible"),
    ]
    assert set(report.unreachable) == {
        os.fsencode(folder / "a"),
        os.fsencode(folder / "c" / "z.safetensors"),
    }


@posix
def test_a_dangling_link_that_may_be_a_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "nas").symlink_to(tmp_path / "unmounted")
    _, report = walk(tmp_path)
    assert set(report.unreachable) == {os.fsencode(tmp_path / "nas")}


def test_missing_roots_and_empty_folders_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    root = os.fsencode(tmp_path)
    report = ScanReport()
    targets = [
        Target(root),
        Target(root + b"/nowhere"),
        Target(root + b"/nowhere/a.safetensors", single=True),
        Target(root + b"/empty/a.safetensors", single=True),
    ]
    assert list(scan(targets, report)) == []
    assert set(report.missing) == {root + b"/nowhere", root + b"/nowhere/a.safetensors"}
    assert report.empty == {root + b"/empty": (tmp_path / "empty").stat().st_dev}


def test_a_missing_part_of_an_empty_root_shows_the_root_as_empty(tmp_path: Path) -> None:
    report = ScanReport()
    root = os.fsencode(tmp_path)
    assert list(scan([Target(root, b"sub/folder")], report)) == []
    assert not report.missing
    assert set(report.empty) == {root}


def test_probe_sees_both_ends_and_samples_between(tmp_path: Path) -> None:
    size = 64 * PROBE
    file = put(tmp_path / "a", bytes(size))
    first = probe(file)

    def changed(at: int, length: int = 1) -> bool:
        data = bytearray(size)
        data[at : at + length] = b"1" * length
        file.write_bytes(data)
        return probe(file) != first

    assert changed(0) and changed(8 + PROBE - 1) and changed(size - PROBE) and changed(size - 1)
    # Whatever is changed over a fourteenth of the inside is seen.
    inside = (size - 8 - 2 * PROBE) // SAMPLES
    assert all(changed(8 + PROBE + k * inside // 2, inside) for k in range(2 * SAMPLES - 1))
    # It stays cheap: the rest is not looked at.
    assert not changed(8 + PROBE + SAMPLE)
    # Short files: every byte counts.
    assert len({probe(put(tmp_path / "s", data)) for data in (b"", b"a", b"ab", b"ba")}) == 4
