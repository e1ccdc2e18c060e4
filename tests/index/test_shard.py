"""Shards: every file in exactly one, whatever the machine; together they are the whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lorafind.api import Index
from lorafind.cli.app import make_app
from lorafind.demo.make import make
from lorafind.files.scan import Found
from lorafind.index.problem import IndexProblem
from lorafind.index.shard import META, Shard
from tests.index.same import dump, same

N = 3


def at(root: bytes, path: bytes) -> Found:
    return Found(root, path, 1, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's files, with a hard link, a symbolic one and a linked folder."""
    folder = tmp_path_factory.mktemp("shard") / "loras"
    make(folder)
    one = sorted((folder / "wild").iterdir())[0]
    os.link(one, folder / "hard.safetensors")
    os.symlink(one, folder / "soft.safetensors")
    os.symlink(folder / "thin", folder / "linked", target_is_directory=True)
    for path in folder.rglob("*.safetensors"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    return folder


def build(db: Path, paths: Sequence[Path], **options: Any) -> dict[str, Any]:
    with Index.open(db, write=True) as index:
        index.build(paths, device="cpu", **options)
        return dump(index.store)


def parts(folder: Path, paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [build(folder / f"{i}.db", paths, shard=(i, N)) for i in range(1, N + 1)]


# ---------------------------------------------------------------------------- who gets what


@given(st.binary(min_size=1, max_size=40), st.integers(1, 50), st.binary(max_size=20))
def test_every_path_is_in_exactly_one_shard_wherever_its_root_is(
    path: bytes, n: int, place: bytes
) -> None:
    owners = [i for i in range(1, n + 1) if Shard(i, n).has(at(b"/a", path))]
    assert len(owners) == 1
    assert Shard(owners[0], n).has(at(b"/mnt/" + place, path))


def test_the_assignment_never_changes() -> None:
    """Numbers of `b2sum -l 64`: shards of several versions and machines can be merged."""
    drawn = {
        path: next(i for i in range(1, 9) if Shard(i, 8).has(at(b"/r", path)))
        for path in (b"a.safetensors", b"b/c.safetensors", b"\xff.safetensors")
    }
    assert drawn == {b"a.safetensors": 4, b"b/c.safetensors": 3, b"\xff.safetensors": 3}


def test_shards_are_of_about_one_size() -> None:
    paths = [b"%d.safetensors" % k for k in range(10_000)]
    sizes = [sum(Shard(i, 10).has(at(b"/r", p)) for p in paths) for i in range(1, 11)]
    assert min(sizes) > 850 and max(sizes) < 1150


def test_a_file_named_by_itself_is_drawn_by_its_name() -> None:
    for k in range(20):
        name = b"%d.safetensors" % k
        for i in range(1, N + 1):
            assert Shard(i, N).has(at(b"/a/b/" + name, b"")) == Shard(i, N).has(at(b"/c", name))


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "-1/3", "1/3/5", "a/b", "1.0/3"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ValueError, match="shard"):
        Shard.parse(text)


def test_a_shard_is_written_as_it_is_read() -> None:
    assert Shard.parse("2/12") == (2, 12)
    assert str(Shard.parse("2/12")) == "2/12"


# ---------------------------------------------------------------------------- the indexes


def test_the_shards_together_are_the_whole(collection: Path, tmp_path: Path) -> None:
    whole = build(tmp_path / "all.db", [collection], relate=False)
    files: dict[str, Any] = {}
    loras: dict[str, Any] = {}
    for part in parts(tmp_path, [collection]):
        assert not files.keys() & part["files"].keys()
        assert part["files"], "an empty shard shows nothing"
        assert not part["relations"] and not part["bases"]
        assert part["roots"] == whole["roots"]
        files |= part["files"]
        loras |= part["loras"]
    assert files == whole["files"]
    assert loras.keys() == whole["loras"].keys()
    for content, (facts, *rest) in whole["loras"].items():
        told, *others = loras[content]
        assert {name: told[name] for name in facts} == facts
        assert others == rest
    links = ["hard", "soft"]
    contents = {files[str(collection / f"{name}.safetensors")][-1] for name in links}
    assert contents == {files[str(sorted((collection / "wild").iterdir())[0])][-1]}


def test_merged_shards_are_the_index_of_one_machine(collection: Path, tmp_path: Path) -> None:
    whole = build(tmp_path / "whole.db", [collection])
    assert whole["relations"] and whole["bases"]
    parts(tmp_path, [collection])
    with Index.open(tmp_path / "all.db", write=True) as index:
        index.merge([tmp_path / f"{i}.db" for i in range(1, N + 1)])
        same(dump(index.store), whole)
        # It is the index of all files now: nothing is read again, nothing is gone.
        again = index.build([collection], device="cpu")
        assert (again.added, again.refreshed, again.gone) == (0, 0, 0)
        same(dump(index.store), whole)


def test_new_files_move_nothing(collection: Path, tmp_path: Path) -> None:
    shutil.copytree(collection, tmp_path / "l", symlinks=True)
    before = parts(tmp_path, [tmp_path / "l"])
    for k in range(5):
        shutil.copy2(collection / "hard.safetensors", tmp_path / "l" / f"new-{k}.safetensors")
    with Index.open(tmp_path / "1.db", write=True) as index:
        assert index.build(shard=(1, N)).refreshed == 0
    after = parts(tmp_path, [])
    added = 0
    for old, new in zip(before, after, strict=True):
        assert old["files"].items() <= new["files"].items()
        added += len(new["files"]) - len(old["files"])
    assert added == 5


class Interrupting:
    """Progress that ends the run at the n-th commit, as Ctrl-C does."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def stage(self, title: str, files: int, size: int) -> None: ...

    def advance(self, files: int, size: int) -> None:
        self.left -= bool(files)
        if not self.left:
            raise KeyboardInterrupt

    def note(self, sentence: str) -> None: ...


def test_an_interrupted_shard_goes_on(
    collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafind.index.build.COMMIT_SECONDS", 0.0)
    undisturbed = build(tmp_path / "a.db", [collection], shard=(1, 2))
    with Index.open(tmp_path / "b.db", write=True) as index:
        with pytest.raises(KeyboardInterrupt):
            index.build([collection], device="cpu", shard=(1, 2), progress=Interrupting(4))
        kept = len(dump(index.store)["loras"])
        assert 0 < kept < len(undisturbed["loras"])
        summary = index.build(device="cpu", shard=(1, 2))
        assert summary.unchanged > 0
        same(dump(index.store), undisturbed)


def test_a_root_that_takes_in_another_gives_files_to_other_shards(
    collection: Path, tmp_path: Path
) -> None:
    inner = [collection / "wild", collection / "copies"]
    parts(tmp_path, inner)
    outer = parts(tmp_path, [collection])
    (tmp_path / "fresh").mkdir()
    fresh = parts(tmp_path / "fresh", [collection])
    for one, two in zip(outer, fresh, strict=True):
        assert one["roots"] == two["roots"]
        assert one["files"] == two["files"]
        assert one["loras"].keys() == two["loras"].keys()


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("made", "asked", "said"),
    [
        ((1, 2), None, r"holds shard 1/2, not all files: run it with --shard 1/2"),
        ((1, 2), (2, 2), r"holds shard 1/2, not shard 2/2"),
        ((1, 2), (1, 3), r"holds shard 1/2, not shard 1/3"),
        (None, (1, 2), r"holds all files, not those of shard 1/2"),
    ],
)
def test_an_index_keeps_its_shard(
    collection: Path,
    tmp_path: Path,
    made: tuple[int, int] | None,
    asked: tuple[int, int] | None,
    said: str,
) -> None:
    before = build(tmp_path / "x.db", [collection / "wild"], shard=made, relate=False)
    with Index.open(tmp_path / "x.db", write=True) as index:
        assert index.store.get_meta(META) == (None if made is None else list(made))
        with pytest.raises(IndexProblem, match=said):
            index.build(shard=asked)
        assert dump(index.store) == before


def test_an_index_without_files_may_change_its_shard(collection: Path, tmp_path: Path) -> None:
    with Index.open(tmp_path / "x.db", write=True) as index:
        with pytest.raises(IndexProblem, match="does not exist"):
            index.build([tmp_path / "nowhere"], shard=(1, 2))
        index.build([collection / "wild"], device="cpu", relate=False)
        assert index.store.get_meta(META) is None
        assert len(dump(index.store)["files"]) == 4


def test_the_command(collection: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        call = ["--db", str(tmp_path / "1.db"), "index", str(collection / "wild"), *arguments]
        done = CliRunner().invoke(make_app(), call)
        return done.exit_code, done.stdout, done.stderr

    code, out, err = run("--shard", "1/2")
    assert (code, out) == (0, "")
    assert "left to other shards" in err and "lorafind merge" in err
    code, out, err = run("--shard", "3/2")
    assert (code, out) == (2, "") and "there is no shard 3/2" in err
    code, out, err = run()
    assert code == 4 and "run it with --shard 1/2" in err
