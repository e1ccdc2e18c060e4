"""The plan: what stands in a new one, and what an edited one may say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafind.api import Index
from lorafind.clean.plan import read
from lorafind.clean.problem import CleanProblem
from tests.clean.conftest import Shelf, snapshot


def test_a_new_plan_removes_what_may_go(shelf: Shelf) -> None:
    found = json.loads(shelf.plan().read_text())
    acts = {
        str(Path(row["path"]).relative_to(shelf.loras)): (row["act"], row["grade"])
        for group in found["groups"]
        for row in group["files"]
    }
    assert acts == {
        f"{n}/{name}.safetensors": act
        for n in range(2)
        for name, act in {
            "keep": ("keep", "keeper"),
            "copy": ("remove", "file"),
            "half": ("remove", "weights"),
        }.items()
    }
    hashes = {digest for digest, _ in snapshot(shelf.loras).values()}
    assert all(row["sha256"] in hashes for group in found["groups"] for row in group["files"])
    plan = read(shelf.top / "plan.json")
    assert len(plan.removals) == 4 and len(plan.groups) == 2


def test_an_existing_file_is_never_replaced(shelf: Shelf) -> None:
    path = shelf.plan()
    path.write_text("mine")
    with Index.open(shelf.db) as index, pytest.raises(CleanProblem, match="exists and may be"):
        index.plan(path)
    assert path.read_text() == "mine"


def test_protected_folders_keep_their_files(shelf: Shelf) -> None:
    found = json.loads(shelf.plan(protect=[str(shelf.loras / "1")]).read_text())
    assert len(found["groups"]) == 1
    assert found["protect"] == [str(shelf.loras / "1")]


def all_gone(plan: dict[str, Any]) -> None:
    for row in plan["groups"][1]["files"]:
        row["act"] = "remove"


def no_keeper(plan: dict[str, Any]) -> None:
    plan["groups"][0]["files"] = [r for r in plan["groups"][0]["files"] if r["act"] == "remove"]


def both(plan: dict[str, Any]) -> None:
    gone = next(row for row in plan["groups"][0]["files"] if row["act"] == "remove")
    plan["groups"][1]["files"].append({**gone, "act": "keep"})


def typo(plan: dict[str, Any]) -> None:
    plan["groups"][0]["files"][1]["act"] = "delete"


def relative(plan: dict[str, Any]) -> None:
    plan["groups"][0]["files"][1]["path"] = "copy.safetensors"


def no_hash(plan: dict[str, Any]) -> None:
    del plan["groups"][0]["files"][1]["sha256"]


def no_groups(plan: dict[str, Any]) -> None:
    del plan["groups"]


def newer(plan: dict[str, Any]) -> None:
    plan["lorafind_plan"] = 2


def other(plan: dict[str, Any]) -> None:
    del plan["lorafind_plan"]


def groups_of_texts(plan: dict[str, Any]) -> None:
    plan["groups"] = ["a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (all_gone, "would lose all of its files"),
        (no_keeper, "would lose all of its files"),
        (both, "to be kept and to be removed"),
        (typo, 'must be "keep" or "remove"'),
        (relative, "no full path"),
        (no_hash, "lost its sha256"),
        (no_groups, "no list of groups"),
        (newer, "another version"),
        (other, "is no plan"),
        (groups_of_texts, "no list of files of group 1"),
    ],
)
def test_what_an_edit_may_not_say(
    change: Callable[[dict[str, Any]], None], said: str, shelf: Shelf
) -> None:
    before = snapshot(shelf.loras)
    with pytest.raises(CleanProblem, match=said):
        shelf.apply(shelf.edit(change))
    assert snapshot(shelf.loras) == before and not shelf.out.exists()


def test_no_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text in ("", "{", "[" * 100_000, '{"lorafind_plan": 1, "groups": [,]}'):
        path.write_text(text)
        with pytest.raises(CleanProblem, match="is no JSON"):
            read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CleanProblem, match="is no JSON"):
        read(path)


def test_names_that_are_not_utf8(shelf: Shelf) -> None:
    import os

    strange = os.fsencode(shelf.loras) + b"/0/\xff\xc3.safetensors"
    os.rename(shelf.loras / "0/copy.safetensors", strange)
    shelf.index()
    path = shelf.plan()
    path.read_text(encoding="utf-8")
    gone = [item.path for item, _ in read(path).removals]
    assert os.fsdecode(strange) in gone
