"""Scan, decide, read and record again and again: the index always equals a fresh one.

The reader of these tests takes a file's SHA-256 for its content; the oracle is ``os.walk``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafind.files.scan import ScanReport, probe, scan
from lorafind.index.reconcile import Decisions, pruning, reconcile
from lorafind.index.rows import FileFacts
from lorafind.index.store import Store
from tests.index.make import OLD, lora


def index(store: Store, roots: list[Path] | None = None, slowly: float = 0.0) -> Decisions:
    """One run of an index whose LoRAs are SHA-256 digests; a batch per file."""
    targets = store.targets(roots or [])
    report = ScanReport()
    found = list(scan(targets, report))
    decisions = reconcile(
        store.known(),
        found,
        report,
        targets,
        {root.path: root.device for root in store.roots()},
        version=1,
        probe=lambda item: probe(item.full),
    )
    store.apply(decisions, report)
    for read in decisions.read:
        started = time.time_ns()
        data = Path(os.fsdecode(read.found.full)).read_bytes()
        sha = hashlib.sha256(data).hexdigest()
        with store.batch():
            number = lora(store, sha)
            time.sleep(slowly)
            facts = FileFacts("lora", 1, started, "", sha, probe(read.found.full), number)
            store.put_file(read.found, facts, read.links)
    store.drop_orphans()
    return decisions


def indexed(store: Store) -> dict[str, str]:
    """Path → content of what is there, as the index has it."""
    rows = store.conn.execute(
        "SELECT roots.path, files.path, content, sha256 FROM files JOIN roots ON root = roots.id "
        "LEFT JOIN loras ON lora = loras.id WHERE presence = 'here'"
    ).fetchall()
    assert all(content == sha for _, _, content, sha in rows)
    return {os.fsdecode(os.path.join(root, path)): content for root, path, content, _ in rows}


def on_disk(*roots: Path) -> dict[str, str]:
    """Path → content of what is there, by os.walk."""
    return {
        os.path.join(folder, name): hashlib.sha256(Path(folder, name).read_bytes()).hexdigest()
        for root in roots
        for folder, _, names in os.walk(root)
        for name in names
    }


class Disk:
    """Two roots of a few files, and what people do with them."""

    def __init__(self, folder: Path) -> None:
        self.roots = [folder / "r", folder / "q"]
        self.clock = 0
        for root in self.roots:
            (root / "sub").mkdir(parents=True)
            # So that no root is ever empty, which would be taken for an unmounted drive.
            self.write(root / "anchor.safetensors", b"anchor")

    def place(self, number: int) -> Path:
        root = self.roots[number % 2]
        return (root / "sub" if number % 3 else root) / f"{number}.safetensors"

    def write(self, path: Path, data: bytes) -> None:
        self.clock += 1
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(OLD, OLD + self.clock * 10**9))

    def do(self, what: str, a: int, b: int) -> None:
        source, target = self.place(a), self.place(b)
        if what == "write":
            # Few sizes and contents, so that sizes, probes and contents often agree.
            self.write(target, bytes([a % 3]) * (1 + a % 2))
        if what == "large":
            middle = bytearray(300_000)
            # Same beginning and end: the samples between them must tell.
            middle[140_000:160_000] = bytes([a % 2]) * 20_000
            self.write(target, bytes(middle))
        if not source.exists() or source == target:
            return
        match what:
            case "move":
                os.replace(source, target)
            case "copy":
                target.unlink(missing_ok=True)
                shutil.copy2(source, target)
                self.clock += 1
                os.utime(target, ns=(OLD, OLD + self.clock * 10**9))
            case "delete":
                source.unlink()
            case "touch":
                self.clock += 1
                os.utime(source, ns=(OLD, OLD + self.clock * 10**9))
            case "hardlink" if not target.exists():
                os.link(source, target)
            case "symlink" if not target.exists() and not source.is_symlink():
                target.symlink_to(source)
        for root in self.roots:
            for path in root.rglob("*"):
                if path.is_symlink() and not path.exists():
                    path.unlink()


FREQUENT = ("move", "index", "index")
RARE = ("write", "large", "copy", "delete", "touch", "hardlink", "symlink")
steps = st.lists(
    st.tuples(st.sampled_from(FREQUENT + RARE), st.integers(0, 7), st.integers(0, 7)), max_size=30
)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_the_index_equals_a_fresh_one(steps: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk = Disk(folder)
        with Store.open(folder / "i.db", "write") as store:
            index(store, disk.roots)
            for step in [*steps, ("index", 0, 0)]:
                if step[0] != "index":
                    disk.do(*step)
                    continue
                index(store)
                assert indexed(store) == on_disk(*disk.roots)
                again = index(store)
                assert again == Decisions(unchanged=again.unchanged)
            store.remove_files(pruning(store.known(), force=True).remove)
            assert {row.presence for row in store.known()} == {"here"}
            contents = {c for (c,) in store.conn.execute("SELECT content FROM loras")}
            assert contents == set(on_disk(*disk.roots).values())


def test_moves_are_not_read(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    for number in range(8):
        disk.write(disk.place(number), bytes([number]) * 200_000)
    with Store.open(tmp_path / "i.db", "write") as store:
        assert len(index(store, disk.roots).read) == 10
        os.rename(disk.roots[0] / "sub", disk.roots[1] / "moved")
        moved = index(store)
        assert len(moved.moved) == len(on_disk(disk.roots[1] / "moved")) == 2
        assert not moved.read and not moved.gone
        assert indexed(store) == on_disk(*disk.roots)


def test_a_root_that_is_away_keeps_its_files(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with Store.open(tmp_path / "i.db", "write") as store:
        index(store, disk.roots)
        before = indexed(store)
        drive = tmp_path / "drive"
        os.rename(disk.roots[0], drive)
        for mount_point in (False, True):
            if mount_point:
                disk.roots[0].mkdir()
            assert set(index(store).roots) == {os.fsencode(disk.roots[0])}
            assert {row.presence for row in store.known() if row.root.endswith(b"/r")} == {
                "offline"
            }
            assert pruning(store.known(), force=True).remove == []
        disk.roots[0].rmdir()
        os.rename(drive, disk.roots[0])
        back = index(store)
        assert not back.read and len(back.refreshed) == 1
        assert indexed(store) == before
        assert [root.offline for root in store.roots()] == ["", ""]


KILLED = """
import sys
from pathlib import Path
from lorafind.index.store import Store
from tests.index.test_cycle import index
with Store.open(sys.argv[1], "write") as store:
    index(store, [Path(sys.argv[2])], slowly=0.02)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    for number in range(60):
        disk.write(disk.place(2 * number), number.to_bytes(2, "big"))
    root, path = disk.roots[0], tmp_path / "i.db"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(root)])
    done = 0
    while done < 10:
        assert process.poll() is None
        time.sleep(0.01)
        if path.exists() and path.stat().st_size:
            try:
                with Store.open(path) as store:
                    done = len(store.known())
            except Exception:
                # The schema is being made.
                continue
    process.kill()
    process.wait()
    with Store.open(path, "write") as store:
        rest = index(store)
        assert 0 < len(rest.read) <= len(on_disk(root)) - done
        assert indexed(store) == on_disk(root)
        assert store.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
