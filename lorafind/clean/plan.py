"""The plan of a clean-up: a JSON file that people read and edit before it is carried out.

::

    {"lorafind_plan": 1, "about": [...], "made": "2026-01-31T12:00:00+00:00",
     "grades": ["cast"], "protect": ["/loras/mine"],
     "groups": [{"grade": "file", "files": [
        {"path": "/loras/a.safetensors", "act": "keep", "grade": "keeper", "bytes": 9, "sha256": …},
        {"path": "/loras/b.safetensors", "act": "remove", "grade": "file", …}]}]}

Only ``path``, ``act`` and ``sha256`` of a file are acted on; the rest is for people. A file whose
act is ``remove`` goes if one of the files that its group keeps is proved to hold all that it does,
which is looked up in the index again. grades: those that were asked for by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafind.clean.problem import CleanProblem
from lorafind.files.place import absolute, is_remote

if TYPE_CHECKING:
    from lorafind.search.dupes import Choice, Group, Judge

VERSION = 1
ABOUT = (
    'Every file has an act: "remove" or "keep". Change them, or take files and groups out.',
    "Nothing is done to a file with keep, nor to one that is not in this plan.",
    "A group must keep a file; a file goes only if one that stays is proved to hold all it holds.",
    "Nothing happens before `lorafind apply` is run on this file, and that looks at all anew.",
)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Item:
    """A file of a plan. sha256: what it was when the plan was made, in hex."""

    path: str
    remove: bool
    sha256: str


@dataclass(frozen=True)
class Plan:
    """A plan that was read and checked. groups: of files, in the order of the plan."""

    path: str
    groups: tuple[tuple[Item, ...], ...]
    grades: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()

    @property
    def removals(self) -> list[tuple[Item, tuple[Item, ...]]]:
        """Every file that is to go, with its group."""
        return [(item, group) for group in self.groups for item in group if item.remove]


@dataclass(frozen=True)
class Written:
    """What a new plan holds: groups, files that may go, and their bytes."""

    groups: int
    files: int
    bytes: int


def write(path: Path, groups: Iterable[Group], choice: Choice, judge: Judge) -> Written:
    """Write a plan of the groups in which a file may go.

    Raises CleanProblem where the file exists (it may have been edited), OSError where it cannot be
    written; then there is none.
    """
    described = [_group(group, judge) for group in groups if group.freed_bytes]
    plan = {
        "lorafind_plan": VERSION,
        "about": ABOUT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "grades": list(choice.named),
        "protect": [absolute(folder) for folder in choice.protect],
        "groups": described,
    }
    text = json.dumps(plan, ensure_ascii=False, indent=1) + "\n"
    # Undecodable bytes of a file name, which UTF-8 cannot hold.
    text = _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115
    except FileExistsError as error:
        raise CleanProblem(
            f"{path} exists and may be a plan that you edited: give another name, or remove it."
        ) from error
    try:
        with file:
            file.write(text)
    except OSError:
        path.unlink()
        raise
    gone = [row for group in described for row in group["files"] if row["act"] == "remove"]
    return Written(len(described), len(gone), sum(row["bytes"] for row in gone))


def _group(group: Group, judge: Judge) -> dict[str, Any]:
    rows = []
    for member in group.files:
        known = judge.file(member.path)
        row: dict[str, Any] = {
            "path": member.path,
            "act": "remove" if member.removable else "keep",
            "grade": member.grade,
            "bytes": member.bytes,
            "sha256": known.sha256 if known else "",
        }
        if member.steps:
            row["steps"] = list(member.steps)
        if member.stays:
            row["stays"] = member.stays
        rows.append(row)
    return {"grade": group.grade, "files": rows}


def read(path: Path) -> Plan:
    """Read a plan and check it whole; raises CleanProblem, OSError.

    A plan in which a group loses all of its files, or in which one file both stays and goes, is
    refused before anything is done.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise CleanProblem(
            f"{path} is no JSON{where}: correct it, or make the plan anew."
        ) from error
    if not isinstance(found, dict) or "lorafind_plan" not in found:
        raise CleanProblem(f"{path} is no plan: `lorafind dupes --plan FILE` makes one.")
    if found["lorafind_plan"] != VERSION:
        raise CleanProblem(f"{path} is a plan of another version of lorafind: make it anew.")
    rows = _list(found.get("groups"), path, "groups")
    groups = tuple(
        _items(row.get("files") if isinstance(row, dict) else None, path, number)
        for number, row in enumerate(rows, 1)
    )
    plan = Plan(
        os.path.abspath(path),
        groups,
        _texts(found.get("grades", []), path, "grades"),
        _texts(found.get("protect", []), path, "protect"),
    )
    _check(plan, path)
    return plan


def _items(rows: Any, path: Path, number: int) -> tuple[Item, ...]:
    where = f"group {number}"
    found = []
    for row in _list(rows, path, f"files of {where}"):
        name = row.get("path") if isinstance(row, dict) else None
        full = isinstance(name, str) and (os.path.isabs(name) or is_remote(name))
        if not isinstance(name, str) or not full or "\0" in name:
            raise CleanProblem(f"{path}: a file of {where} has no full path: correct it.")
        if row.get("act") not in ("keep", "remove"):
            raise CleanProblem(
                f'{path}: the act of {name} in {where} must be "keep" or "remove": correct it.'
            )
        digest = row.get("sha256")
        if not isinstance(digest, str):
            raise CleanProblem(
                f"{path}: {name} in {where} has lost its sha256: make the plan anew."
            )
        place = name if is_remote(name) else os.path.normpath(name)
        found.append(Item(place, row["act"] == "remove", digest))
    return tuple(found)


def _list(value: Any, path: Path, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise CleanProblem(f"{path} has no list of {what}: correct it, or make the plan anew.")
    return value


def _texts(value: Any, path: Path, what: str) -> tuple[str, ...]:
    words = _list(value, path, what)
    if not all(isinstance(word, str) for word in words):
        raise CleanProblem(f"{path}: {what} must be a list of texts: correct it.")
    return tuple(words)


def _check(plan: Plan, path: Path) -> None:
    kept = {item.path for group in plan.groups for item in group if not item.remove}
    for number, group in enumerate(plan.groups, 1):
        gone = [item for item in group if item.remove]
        if gone and len(gone) == len(group):
            raise CleanProblem(
                f"{path}: group {number} ({gone[0].path} …) would lose all of its files: set the "
                'act of one of them to "keep". Nothing was done.'
            )
        for item in gone:
            if item.path in kept:
                raise CleanProblem(
                    f"{path}: {item.path} is to be kept and to be removed: decide for one. "
                    "Nothing was done."
                )
