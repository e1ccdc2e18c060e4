"""Carrying out a plan and taking it back: what goes, what stays, and that nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from lorafind.api import Index
from lorafind.clean.apply import How
from lorafind.clean.plan import read
from lorafind.clean.problem import CleanProblem
from lorafind.search.dupes import Choice, dupes
from tests.clean.conftest import OLD_NS, Shelf, contents, fill, snapshot

KINDS = ("move", "trash", "link")
GONE = {f"{n}/{name}.safetensors" for n in range(2) for name in ("copy", "half")}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trash of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data/Trash"


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system in memory."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root on Linux")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_move_and_undo(shelf: Shelf) -> None:
    before = snapshot(shelf.loras)
    done = shelf.apply(shelf.plan())
    assert {path: row.outcome for path, row in done.items()} == dict.fromkeys(GONE, "moved")
    for path, row in done.items():
        assert row.to == str(shelf.out / "loras" / path)
        assert row.keeper == str(shelf.loras / Path(path).parent / "keep.safetensors")
    went = GONE | {f"{n}/{x}" for n in range(2) for x in ("copy.json", "copy.preview.png")}
    went |= {"0/half.txt", "1/half.txt"}
    assert snapshot(shelf.out / "loras") == {path: before[path] for path in went}
    assert snapshot(shelf.loras) == {p: facts for p, facts in before.items() if p not in went}
    assert {back.outcome for back in shelf.undo()} == {"back"}
    assert snapshot(shelf.loras) == before and not snapshot(shelf.out)
    assert shelf.undo() == []


def test_a_relative_folder(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is where the caller stands, and stays there whatever follows."""
    monkeypatch.chdir(shelf.top)
    how = How("move", shelf.out.name)
    monkeypatch.chdir("/")
    assert how == How("move", str(shelf.out))
    with Index.open(shelf.db, write=True) as index:
        moved = [row for row in index.apply(shelf.plan(), how) if row.outcome == "moved"]
    assert moved and all(Path(row.to).is_relative_to(shelf.out) for row in moved)
    for kind, folder in (("move", ""), ("link", "out")):
        with pytest.raises(ValueError, match="folder"):
            How(cast(Any, kind), folder)


def test_trash_and_undo(shelf: Shelf, home: Path) -> None:
    before = snapshot(shelf.loras)
    (home / "files").mkdir(parents=True)
    (home / "files/copy.safetensors").write_text("older")
    done = shelf.apply(shelf.plan(), "trash")
    assert {row.outcome for row in done.values()} == {"trashed"}
    in_it = snapshot(home / "files")
    # Each file has its record, with the path that a file manager restores it to.
    for path, row in done.items():
        name = Path(row.to).name
        lines = (home / "info" / f"{name}.trashinfo").read_text().splitlines()
        assert lines[0] == "[Trash Info]"
        assert lines[1] == f"Path={shelf.loras / path}"
        assert in_it[name] == before[path]
        # What belongs together has names that still do.
        stem = name.removesuffix(".safetensors")
        assert all(Path(other).name.startswith(f"{stem}.") for other in row.with_it)
    assert len(list((home / "info").iterdir())) == 4 + 6
    assert (home / "files/copy.safetensors").read_text() == "older"
    assert {back.outcome for back in shelf.undo()} == {"back"}
    assert snapshot(shelf.loras) == before
    assert snapshot(home).keys() == {"files/copy.safetensors"}


def test_link_and_undo(shelf: Shelf) -> None:
    before = snapshot(shelf.loras)
    done = shelf.apply(shelf.plan(), "link")
    for n in range(2):
        folder = shelf.loras / str(n)
        assert done[f"{n}/copy.safetensors"].outcome == "linked"
        assert (folder / "copy.safetensors").samefile(folder / "keep.safetensors")
        assert not (folder / "copy.safetensors").is_symlink()
        assert done[f"{n}/half.safetensors"].outcome == "stays"
        assert "same bytes" in done[f"{n}/half.safetensors"].reason
    assert {back.outcome for back in shelf.undo()} == {"back"}
    assert snapshot(shelf.loras) == before
    assert not (shelf.loras / "0/copy.safetensors").samefile(shelf.loras / "0/keep.safetensors")


def test_links_across_drives_are_symbolic(shelf: Shelf) -> None:
    with mounted(shelf.loras / "drive", "size=20m"):
        place = shelf.loras / "drive/copy.safetensors"
        shutil.copy2(shelf.loras / "0/copy.safetensors", place)
        before = snapshot(shelf.loras)
        shelf.index()
        done = shelf.apply(shelf.plan(), "link")
        assert done["drive/copy.safetensors"].outcome == "linked"
        assert os.readlink(place) == str(shelf.loras / "0/keep.safetensors")
        shelf.undo()
        assert snapshot(shelf.loras) == before


def test_move_across_drives(shelf: Shelf) -> None:
    before = snapshot(shelf.loras)
    with mounted(shelf.top / "drive", "size=20m"):
        done = shelf.apply(shelf.plan(), folder=shelf.top / "drive/x")
        assert {row.outcome for row in done.values()} == {"moved"}
        there = snapshot(shelf.top / "drive/x/loras")
        assert there.keys() > GONE
        assert all(before[path] == facts for path, facts in there.items())
        assert before.items() == {**snapshot(shelf.loras), **there}.items()
        shelf.undo()
        assert snapshot(shelf.loras) == before
        assert not snapshot(shelf.top / "drive")


def test_trash_of_another_drive(shelf: Shelf) -> None:
    with mounted(shelf.loras / "drive", "size=20m"):
        place = shelf.loras / "drive/copy me.safetensors"
        shutil.copy2(shelf.loras / "0/copy.safetensors", place)
        shelf.index()
        before = snapshot(shelf.loras)
        done = shelf.apply(shelf.plan(), "trash")
        trash = shelf.loras / f"drive/.Trash-{os.getuid()}"
        assert done["drive/copy me.safetensors"].to == str(trash / "files/copy me.safetensors")
        record = (trash / "info/copy me.safetensors.trashinfo").read_text()
        assert "\nPath=copy%20me.safetensors\n" in record
        # It is passed over, like every trash.
        shelf.index()
        with Index.open(shelf.db) as index:
            assert not any(".Trash-" in member.path for g in index.dupes() for member in g.files)
        shelf.undo()
        assert snapshot(shelf.loras) == before


def test_a_full_disk(shelf: Shelf) -> None:
    before = snapshot(shelf.loras)
    sizes = {path: (shelf.loras / path).stat().st_size for path in GONE}
    with mounted(shelf.top / "drive", f"size={max(sizes.values()) // 1024 + 20}k"):
        done = shelf.apply(shelf.plan(), folder=shelf.top / "drive")
        told = sorted(row.outcome for row in done.values())
        assert "failed" in told and "untouched" in told
        failed = next(row for row in done.values() if row.outcome == "failed")
        assert "No space left" in failed.reason and "it is where it was" in failed.reason
        assert contents(shelf.loras, shelf.top / "drive") == {d for d, _ in before.values()}
        # Nothing half done stands on the full drive.
        assert not list((shelf.top / "drive").rglob(".lorafind-*"))
        shelf.undo()
        assert snapshot(shelf.loras) == before
        # With room somewhere else the same plan goes through.
        done = shelf.apply(shelf.top / "plan.json")
        assert {row.outcome for row in done.values()} == {"moved"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_folder(kind: str, shelf: Shelf) -> None:
    with mounted(shelf.loras / "drive", "size=20m"):
        shutil.copy2(shelf.loras / "0/copy.safetensors", shelf.loras / "drive")
        shelf.index()
        plan = shelf.plan()
        before = snapshot(shelf.loras / "drive")
        remount = ["mount", "-o", "remount,ro", str(shelf.loras / "drive")]
        subprocess.run(remount, check=True)
        row = shelf.apply(plan, kind)["drive/copy.safetensors"]
        assert row.outcome == "failed"
        assert str(shelf.loras / "drive") in row.reason and "it is where it was" in row.reason
        assert snapshot(shelf.loras / "drive") == before
        assert row.path not in {back.path for back in shelf.undo() if back.outcome != "there"}


def test_a_folder_that_may_not_be_written_to_move_to(shelf: Shelf) -> None:
    before = snapshot(shelf.loras)
    with mounted(shelf.top / "drive", "ro"):
        done = shelf.apply(shelf.plan(), folder=shelf.top / "drive")
        assert {row.outcome for row in done.values()} == {"failed"}
        assert all("Read-only" in row.reason for row in done.values())
    assert snapshot(shelf.loras) == before


def spoil(path: Path) -> None:
    """Other bytes of the same length under the same time stamp."""
    facts = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_mtime_ns,) * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["copy", "keep"])
def test_a_file_that_changed_after_the_plan(name: str, kind: str, shelf: Shelf) -> None:
    plan = shelf.plan()
    spoil(shelf.loras / f"0/{name}.safetensors")
    before = snapshot(shelf.loras)
    done = shelf.apply(plan, kind)
    row = done["0/copy.safetensors"]
    assert row.outcome == "stays"
    assert f"0/{name}.safetensors changed since" in row.reason
    assert done["1/copy.safetensors"].outcome != "stays"
    assert snapshot(shelf.loras)["0/copy.safetensors"] == before["0/copy.safetensors"]


def test_a_plan_that_is_older_than_the_index(shelf: Shelf) -> None:
    """The files agree with the index, but not with what the user read."""
    plan = shelf.plan()
    for path in (shelf.loras / "0").glob("*.safetensors"):
        shutil.copyfile(shelf.loras / "1" / path.name, path)
        os.utime(path, ns=(OLD_NS + 7,) * 2)
    shelf.index()
    done = shelf.apply(plan)
    assert done["0/copy.safetensors"].outcome == "stays"
    assert "changed since the plan" in done["0/copy.safetensors"].reason


@pytest.mark.parametrize("what", ["gone", "folder", "link to it"])
def test_a_keeper_that_is_no_more(what: str, shelf: Shelf) -> None:
    plan = shelf.plan()
    keeper = shelf.loras / "0/keep.safetensors"
    keeper.unlink()
    if what == "folder":
        keeper.mkdir()
    elif what == "link to it":
        keeper.symlink_to("copy.safetensors")
    done = shelf.apply(plan)
    assert done["0/copy.safetensors"].outcome == done["0/half.safetensors"].outcome == "stays"
    assert (shelf.loras / "0/copy.safetensors").is_file()
    assert done["1/copy.safetensors"].outcome == "moved"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symbolic", [True, False])
def test_what_has_become_a_second_path(symbolic: bool, kind: str, shelf: Shelf) -> None:
    plan = shelf.plan()
    place, keeper = (shelf.loras / f"0/{name}.safetensors" for name in ("copy", "keep"))
    place.unlink()
    if symbolic:
        place.symlink_to(keeper)
    else:
        place.hardlink_to(keeper)
    before = snapshot(shelf.loras / "0")
    row = shelf.apply(plan, kind)["0/copy.safetensors"]
    assert row.outcome == "stays"
    assert snapshot(shelf.loras / "0")["copy.safetensors"] == before["copy.safetensors"]


def test_protected_after_the_plan(shelf: Shelf) -> None:
    plan = shelf.plan()
    with Index.open(shelf.db, write=True) as index:
        done = [
            (Path(row.path).parent.name, row.outcome, row.reason)
            for row in index.apply(
                plan, How("move", str(shelf.out)), protect=[str(shelf.loras / "0")]
            )
        ]
    assert [row[1:] for row in done if row[0] == "0"] == [("stays", "protected")] * 2
    assert {row[1] for row in done if row[0] == "1"} == {"moved"}


def test_the_user_chooses_another_keeper(shelf: Shelf) -> None:
    def swap(plan: dict[str, Any]) -> None:
        for group in plan["groups"]:
            for row in group["files"]:
                row["act"] = "keep" if "copy" in row["path"] else "remove"

    done = shelf.apply(shelf.edit(swap))
    assert done["0/keep.safetensors"].outcome == "moved"
    assert done["0/keep.safetensors"].keeper == str(shelf.loras / "0/copy.safetensors")


def test_a_keeper_that_holds_less_is_not_taken(shelf: Shelf) -> None:
    """F16 does not hold what F32 does, whatever the plan says."""

    def swap(plan: dict[str, Any]) -> None:
        plan["grades"] = ["near", "kin", "cast", "weights"]
        for group in plan["groups"]:
            for row in group["files"]:
                row["act"] = "keep" if "half" in row["path"] else "remove"

    before = snapshot(shelf.loras)
    done = shelf.apply(shelf.edit(swap))
    assert {row.outcome for row in done.values()} == {"stays"}
    assert all("something that the keeper lacks" in row.reason for row in done.values())
    assert snapshot(shelf.loras) == before


def test_strangers_put_into_one_group(shelf: Shelf) -> None:
    def mix(plan: dict[str, Any]) -> None:
        first, second = (group["files"] for group in plan["groups"])
        first[0], second[0] = second[0], first[0]

    before = snapshot(shelf.loras)
    done = shelf.apply(shelf.edit(mix))
    assert {row.outcome for row in done.values()} == {"stays"}
    assert snapshot(shelf.loras) == before


def test_a_keeper_in_a_trash_folder(shelf: Shelf) -> None:
    """Also where the trash itself was indexed, and has the oldest file."""
    trash = shelf.top / ".Trash-1000/files"
    fill(trash, 1, seed=0)
    os.utime(trash / "0/keep.safetensors", ns=(1, 1))
    with Index.open(shelf.db, write=True) as index:
        index.build([trash / "0"], device="cpu")
        keepers = {group.keeper for group in dupes(index.store, Choice())}
    assert keepers == {str(shelf.loras / f"{n}/keep.safetensors") for n in range(2)}

    def swap(plan: dict[str, Any]) -> None:
        for group in plan["groups"]:
            for row in group["files"]:
                row["act"] = "keep" if ".Trash" in row["path"] else "remove"
        plan["groups"] = [
            g for g in plan["groups"] if any(".Trash" in r["path"] for r in g["files"])
        ]

    before = snapshot(shelf.loras)
    done = shelf.apply(shelf.edit(swap))
    assert len(done) == 3 and {row.outcome for row in done.values()} == {"stays"}
    assert all("trash folder" in row.reason for row in done.values())
    assert snapshot(shelf.loras) == before


def test_a_shared_sidecar_stays(shelf: Shelf) -> None:
    folder = shelf.loras / "0"
    shutil.copyfile(shelf.loras / "1/keep.safetensors", folder / "copy.preview.safetensors")
    (folder / "copy.ckpt").write_bytes(b"x")
    (folder / "half.civitai.info").symlink_to("half.txt")
    done = shelf.apply(shelf.plan())
    # copy.ckpt has a claim on copy.json, copy.preview on the picture.
    assert done["0/copy.safetensors"].with_it == ()
    assert "copy.json, copy.preview.png" in done["0/copy.safetensors"].reason
    assert done["0/half.safetensors"].with_it == (str(shelf.out / "loras/0/half.txt"),)
    assert (folder / "copy.json").is_file() and (folder / "copy.preview.png").is_file()
    assert (folder / "half.civitai.info").is_symlink()


def test_nothing_is_written_over(shelf: Shelf) -> None:
    stranger = shelf.out / "loras/0/copy.json"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("a stranger")
    plan = shelf.plan()
    done = shelf.apply(plan)
    assert stranger.read_text() == "a stranger"
    assert done["0/copy.safetensors"].to == str(shelf.out / "loras (2)/0/copy.safetensors")
    assert (shelf.out / "loras (2)/0/copy.json").is_file()
    # On the way back neither.
    taken = shelf.loras / "0/copy.safetensors"
    taken.write_text("another stranger")
    told = {Path(back.path).name: back for back in shelf.undo() if back.outcome == "stays"}
    assert told.keys() == {"copy.safetensors"}
    assert "another file has taken its place" in told["copy.safetensors"].reason
    assert taken.read_text() == "another stranger"
    assert Path(done["0/copy.safetensors"].to).is_file()
    taken.unlink()
    shelf.undo()
    assert not snapshot(shelf.out).keys() - {"loras/0/copy.json"}


def test_what_changed_where_it_was_put_is_not_brought_back(shelf: Shelf) -> None:
    done = shelf.apply(shelf.plan())
    spoil(Path(done["0/copy.safetensors"].to))
    stays = [back for back in shelf.undo() if back.outcome == "stays"]
    assert [back.reason for back in stays] == ["it changed since"]
    assert Path(done["0/copy.safetensors"].to).is_file()


def test_the_index_knows_after_it_ran_again(shelf: Shelf) -> None:
    shelf.apply(shelf.plan())
    with Index.open(shelf.db, write=True) as index:
        summary = index.build([shelf.loras, shelf.out], device="cpu")
        assert summary.moved == 4 and summary.added == 0
    shelf.undo()
    with Index.open(shelf.db, write=True) as index:
        assert index.build([shelf.loras, shelf.out], device="cpu").moved == 4
        assert sum(len(group.files) for group in index.dupes()) == 6


def test_a_second_time(shelf: Shelf) -> None:
    plan = shelf.plan()
    shelf.apply(plan)
    after = snapshot(shelf.top / "out")
    assert {row.outcome for row in shelf.apply(plan).values()} == {"gone"}
    assert snapshot(shelf.top / "out") == after
    assert len(read(plan).removals) == 4


def test_a_file_that_stays_in_another_group_under_another_name(shelf: Shelf) -> None:
    """A folder behind a link: the path differs, the file is the same."""
    (shelf.top / "door").symlink_to(shelf.loras)

    def alias(plan: dict[str, Any]) -> None:
        group = plan["groups"][0]
        gone = next(row for row in group["files"] if row["path"].endswith("copy.safetensors"))
        path = gone["path"].replace(str(shelf.loras), str(shelf.top / "door"))
        plan["groups"].append({"files": [{**gone, "path": path, "act": "keep"}]})

    before = snapshot(shelf.loras)
    done = shelf.apply(shelf.edit(alias))
    stays = [path for path, row in done.items() if row.outcome == "stays"]
    assert len(stays) == 1 and stays[0].endswith("copy.safetensors")
    assert done[stays[0]].reason == "a second path to a file that stays"
    assert snapshot(shelf.loras)[stays[0]] == before[stays[0]]


def test_a_folder_that_is_gone_is_not_made_again(shelf: Shelf) -> None:
    """It may be that of a drive which is not mounted."""
    done = shelf.apply(shelf.plan())
    (shelf.loras / "0").rename(shelf.loras / "away")
    stays = [back for back in shelf.undo() if back.outcome == "stays"]
    assert stays and all("make or mount it" in back.reason for back in stays)
    assert not (shelf.loras / "0").exists()
    assert Path(done["0/copy.safetensors"].to).is_file()
    (shelf.loras / "away").rename(shelf.loras / "0")
    assert {back.outcome for back in shelf.undo()} <= {"back", "there"}
    assert (shelf.loras / "0/copy.safetensors").is_file()


def test_a_log_that_cannot_be_written_any_more(shelf: Shelf) -> None:
    """Nothing is done that is not in the log; what is in it can be undone even then."""
    before = snapshot(shelf.loras)
    plan = shelf.plan()
    with mounted(shelf.top / "i.db.undo", "size=4k"):
        done = shelf.apply(plan)
        told = [row.outcome for row in done.values()]
        assert told[0] == "moved" and told[-1] == "untouched" and "failed" not in told
        assert "undo log" in list(done.values())[-1].reason
        assert sum(path in snapshot(shelf.loras) for path in GONE) == told.count("untouched")
        assert {back.outcome for back in shelf.undo()} <= {"back", "there"}
        assert snapshot(shelf.loras) == before


def test_a_log_that_cannot_be_begun(shelf: Shelf) -> None:
    before = snapshot(shelf.loras)
    plan = shelf.plan()
    (shelf.top / "i.db.undo").write_text("in the way")
    with pytest.raises(CleanProblem, match="Nothing was done"):
        shelf.apply(plan)
    assert snapshot(shelf.loras) == before


def test_an_act_that_fails_half_way_is_taken_back(shelf: Shelf) -> None:
    """The weights fit on the drive, their picture does not."""
    (shelf.loras / "0/copy.preview.png").write_bytes(os.urandom(2**20))
    before = snapshot(shelf.loras)
    size = (shelf.loras / "0/copy.safetensors").stat().st_size

    def one(plan: dict[str, Any]) -> None:
        for group in plan["groups"]:
            for row in group["files"]:
                row["act"] = "remove" if row["path"].endswith("0/copy.safetensors") else "keep"

    path = shelf.edit(one)
    with mounted(shelf.top / "drive", f"size={(size + 2**18) // 1024}k"):
        (row,) = shelf.apply(path, folder=shelf.top / "drive").values()
        assert row.outcome == "failed" and row.reason.endswith("; it is where it was")
        assert snapshot(shelf.loras) == before
        assert not snapshot(shelf.top / "drive")
    assert shelf.undo() == []
