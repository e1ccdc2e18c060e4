"""A folder of links per group: a look at the collection by style that moves no file."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorafind.files.sidecars import PREVIEWS, READERS
from lorafind.groups.sort import Group
from lorafind.index.problem import IndexProblem

#: The file that tells a folder of links from a folder of the user's.
MARK = ".lorafind-groups"
_SAID = "Links made by `lorafind groups --link`; the next run to this folder makes them anew.\n"
#: Endings of what belongs to a LoRA beside it.
_BESIDE = (*(ending for ending, _ in READERS), *PREVIEWS)
#: Characters that some system does not allow in a name, or a terminal obeys.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff<>:"/\\|?*]')
_LONGEST = 80
#: Names that Windows keeps for devices.
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?$")


def safe_name(text: str) -> str:
    """``text`` as the name of a folder on any system; never empty."""
    name = _UNSAFE.sub("_", text).strip(" .")[:_LONGEST].strip(" .")
    return f"_{name}" if not name or _DEVICES.match(name) else name


@dataclass
class Linked:
    """links: to LoRAs; beside: to their sidecars and previews; missing: LoRAs without a file that
    is there now; same: whether the folder had all that already and was left as it is."""

    links: int = 0
    beside: int = 0
    missing: int = 0
    same: bool = False


def link(groups: Iterable[Group], folder: str | os.PathLike[str]) -> Linked:
    """Make ``folder`` with a sub-folder of symbolic links per group; no other file is touched.

    Sub-folders are called by number and central LoRA, below one of their architecture where there
    are several; what is in no group is in ``no group``. Sidecars and previews are linked beside
    their LoRA, under its name there. A folder of an earlier run is replaced as a whole, and left
    as it is where nothing would change. Raises IndexProblem where ``folder`` holds anything else,
    or the file system has no links.
    """
    target = Path(folder).expanduser().absolute()
    made_before = _refuse_used(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    found = list(groups)
    several = len({group.architecture for group in found}) > 1
    width = len(str(max((group.number for group in found), default=0)))
    made = Linked()
    work = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    work.mkdir()
    try:
        (work / MARK).write_text(_SAID, "utf-8")
        listed: dict[str, set[str]] = {}
        for group in found:
            base = work / safe_name(group.architecture) if several else work
            place = _Place(base / _name(group, width), listed)
            for member in group.members:
                paths = (member.path, *member.other_paths)
                path = next((p for p in paths if p and os.path.exists(p)), None)
                if path is None:
                    made.missing += 1
                    continue
                made.beside += place.add(os.path.abspath(path))
                made.links += 1
        if made_before and _links(work) == _links(target):
            made.same = True
            shutil.rmtree(work)
        else:
            _put(work, target, made_before)
    except BaseException:
        # It holds links, folders and the mark alone; links are not followed.
        shutil.rmtree(work, ignore_errors=True)
        raise
    return made


def _put(work: Path, target: Path, made_before: bool) -> None:
    """Give the new folder its name; one of an earlier run goes when the new one stands."""
    if not made_before:
        if target.is_dir():
            target.rmdir()
        os.rename(work, target)
        return
    old = work.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(work, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


def _links(folder: Path) -> dict[str, str]:
    """Relative path of every link → what it points to."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        for path in folder.rglob("*")
        if path.is_symlink()
    }


def _refuse_used(target: Path) -> bool:
    """True where ``target`` is of an earlier run, and nothing else has come into it since."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise IndexProblem(f"{target} is a file or a link: name a folder that is not there yet.")
    if not target.is_dir() or not any(target.iterdir()):
        return False
    if not (target / MARK).is_file():
        raise IndexProblem(
            f"{target} is not empty, and nothing in it is overwritten: name a folder that is not "
            "there yet."
        )
    for folder, folders, names in os.walk(target):
        for name in [*names, *folders]:
            path = Path(folder, name)
            if path.is_symlink() or path.is_dir() or path == target / MARK:
                continue
            raise IndexProblem(
                f"{path} is no link that lorafind made, and the folder is not made anew over it: "
                "move it away, or name another folder."
            )
    return True


def _name(group: Group, width: int) -> str:
    if group.central is None:
        return "no group"
    stem = os.path.splitext(os.path.basename(group.central.path))[0]
    return safe_name(f"{group.number:0{width}d} {stem}")


class _Place:
    """The folder of one group. Two LoRAs of one name get numbers, with their sidecars."""

    def __init__(self, folder: Path, listed: dict[str, set[str]]) -> None:
        self.folder, self._listed = folder, listed
        self._owners: dict[str, str] = {}
        folder.mkdir(parents=True)

    def add(self, path: str) -> int:
        """Link a LoRA and what stands beside it; how many sidecars that are."""
        folder, name = os.path.split(path)
        stem, suffix = os.path.splitext(name)
        shown, number = stem, 1
        # Without regard to case, as some file systems have it.
        while self._owners.setdefault(shown.casefold(), path) != path:
            number += 1
            shown = f"{stem} ({number})"
        self._link(path, shown + suffix)
        if folder not in self._listed:
            self._listed[folder] = set(os.listdir(folder))
        sidecars = {stem + ending: shown + ending for ending in _BESIDE} if stem else {}
        there = [one for one in sidecars if one in self._listed[folder] and one != name]
        for one in there:
            self._link(os.path.join(folder, one), sidecars[one])
        return len(there)

    def _link(self, path: str, name: str) -> None:
        try:
            os.symlink(path, self.folder / name)
        except (OSError, NotImplementedError) as error:
            raise IndexProblem(
                f"No link can be made in {self.folder.parent.parent} ({error}): name a folder on a "
                "file system that has links (on Windows: with Developer Mode on)."
            ) from error
