"""Roots never overlap, whatever is named in whatever order."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lorafind.files.scan import Target
from lorafind.index.problem import IndexProblem
from lorafind.index.store import Store
from tests.index.make import facts, found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a b").mkdir()
    (folder / "a" / "x.safetensors").touch()
    return folder


def test_roots_are_remembered_and_named_by_nothing(tmp_path: Path, tree: Path) -> None:
    with Store.open(tmp_path / "i.db", "write") as store:
        with pytest.raises(IndexProblem, match="`lorafind index FOLDER`"):
            store.targets()
        assert store.targets([tree]) == [Target(os.fsencode(tree))]
        file = tmp_path / "one.safetensors"
        file.touch()
        assert store.targets([file]) == [Target(os.fsencode(file), single=True)]
        assert store.targets() == [
            Target(os.fsencode(tree)),
            Target(os.fsencode(file), single=True),
        ]
        with pytest.raises(IndexProblem, match="nowhere does not exist"):
            store.targets([tree.parent / "nowhere"])
        assert len(store.roots()) == 2


def test_below_a_known_root_is_part_of_it(tmp_path: Path, tree: Path) -> None:
    root = os.fsencode(tree)
    with Store.open(tmp_path / "i.db", "write") as store:
        store.targets([tree])
        assert store.targets([tree / "a" / "b", tree / "a b"]) == [
            Target(root, b"a/b"),
            Target(root, b"a b"),
        ]
        assert store.targets([tree / "a" / "x.safetensors"]) == [Target(root, b"a/x.safetensors")]
        # What is gone below a known root is still a part of it.
        assert store.targets([tree / "gone.safetensors"]) == [Target(root, b"gone.safetensors")]
        assert store.targets([tree / "a" / "b", tree / "a", tree / "a"]) == [Target(root, b"a")]
        assert store.targets([tree / "a", tree]) == [Target(root)]
        assert len(store.roots()) == 1


def test_a_new_root_takes_in_those_below_it(tmp_path: Path, tree: Path) -> None:
    inner, beside = os.fsencode(tree / "a"), os.fsencode(tree / "a b")
    file = os.fsencode(tree / "a" / "x.safetensors")
    with Store.open(tmp_path / "i.db", "write") as store:
        store.targets([tree / "a" / "x.safetensors"])
        store.targets([tree / "a b"])
        with store.batch():
            store.put_file(found(b"", file), facts("x"))
            store.put_file(found(b"\xff.safetensors", beside), facts("y"))
        assert store.targets([inner]) == [Target(inner)]
        assert {(row.root, row.path) for row in store.known()} == {
            (inner, b"x.safetensors"),
            (beside, b"\xff.safetensors"),
        }
        assert store.targets([inner, tree]) == [Target(os.fsencode(tree))]
        assert {(row.root, row.path, row.sha256) for row in store.known()} == {
            (os.fsencode(tree), b"a/x.safetensors", "x"),
            (os.fsencode(tree), b"a b/\xff.safetensors", "y"),
        }
        assert [root.path for root in store.roots()] == [os.fsencode(tree)]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_a_link_to_a_root_is_that_root(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    with Store.open(tmp_path / "i.db", "write") as store:
        store.targets([tmp_path / "link"])
        assert store.targets([tree / "a"]) == [Target(os.fsencode(tmp_path / "link"), b"a")]
        assert len(store.roots()) == 1
