"""The trash of the desktop: freedesktop.org Trash Specification 1.0.

Files of the drive that holds the home folder go to ``$XDG_DATA_HOME/Trash``, those of another drive
to ``.Trash/<uid>`` (made by its administrator, with the sticky bit, no link) or ``.Trash-<uid>`` at
its top, or, where neither can be had, to the one at home. macOS and Windows keep their own records,
which only their own programs write.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from lorafind.clean.moves import sync_folder
from lorafind.clean.problem import CleanProblem
from lorafind.files.scan import PASSED_FOLDERS


@dataclass(frozen=True)
class Bin:
    """A trash folder. top: of its drive, to which the paths in it are relative; empty at home."""

    folder: str
    top: str = ""


def supported() -> None:
    """Raises CleanProblem on a system whose trash is not of the freedesktop kind."""
    if sys.platform in ("win32", "darwin"):
        raise CleanProblem(
            "lorafind cannot use the trash of this system: give `--move DIR` instead, and empty "
            "DIR when you are sure."
        )


def in_trash(path: str) -> bool:
    """True for what lies in a trash folder, or in one that holds older states, also by a link."""
    home = os.path.realpath(_home())
    for place in (os.path.abspath(path), os.path.realpath(path)):
        parts = os.fsencode(place).lower().split(os.fsencode(os.sep))[:-1]
        if any(part in PASSED_FOLDERS or part.startswith(b".trash-") for part in parts):
            return True
        if place.startswith(home + os.sep) or b"/.local/share/trash/" in os.fsencode(place).lower():
            return True
    return False


def bin_for(path: str) -> Bin:
    """The trash folder for a file, made where there is none; raises OSError."""
    home = _home()
    os.makedirs(home, mode=0o700, exist_ok=True)
    device = os.stat(os.path.dirname(path)).st_dev
    found = Bin(home) if os.stat(home).st_dev == device else _of_drive(path) or Bin(home)
    for part in ("files", "info"):
        os.makedirs(os.path.join(found.folder, part), mode=0o700, exist_ok=True)
    return found


def places(trash: Bin, paths: Iterable[str]) -> list[tuple[str, str, str]]:
    """For files that go together: free path in the trash, path of its record, text of the record.

    All get one number where a name of theirs is taken, so that they still belong together.
    """
    paths = list(paths)
    number = 1
    while any(
        os.path.lexists(place)
        for path in paths
        for place in _pair(trash, _numbered(os.path.basename(path), number))
    ):
        number += 1
    now = datetime.now()
    found = []
    for path in paths:
        written = os.path.relpath(path, trash.top) if trash.top else path
        text = (
            f"[Trash Info]\nPath={quote(os.fsencode(written))}\n"
            f"DeletionDate={now:%Y-%m-%dT%H:%M:%S}\n"
        )
        found.append((*_pair(trash, _numbered(os.path.basename(path), number)), text))
    return found


def record(info: str, text: str) -> None:
    """Write the record of a file before it comes; raises FileExistsError where there is one."""
    with open(info, "x", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(os.path.dirname(info))


def forget(info: str, text: str) -> None:
    """Remove a record of ours, whole or cut; one with another text is another file's."""
    try:
        found = Path(info).read_bytes()
    except FileNotFoundError:
        return
    if text.encode().startswith(found):
        os.unlink(info)


def _home() -> str:
    data = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):
        data = os.path.join(os.path.expanduser("~"), ".local", "share")
    return os.path.join(data, "Trash")


def _of_drive(path: str) -> Bin | None:
    top = os.path.realpath(os.path.dirname(path))
    while not os.path.ismount(top):
        top = os.path.dirname(top)
    shared, own = os.path.join(top, ".Trash"), os.path.join(top, f".Trash-{os.getuid()}")
    try:
        facts = os.lstat(shared)
        if stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX:
            mine = os.path.join(shared, str(os.getuid()))
            os.makedirs(mine, mode=0o700, exist_ok=True)
            return Bin(mine, top)
    except OSError:
        # The specification: then the drive's second kind.
        pass
    try:
        os.makedirs(own, mode=0o700, exist_ok=True)
    except OSError:
        return None
    return None if os.path.islink(own) else Bin(own, top)


def _numbered(name: str, number: int) -> str:
    if number == 1:
        return name
    stem, dot, rest = name.partition(".")
    return f"{stem} ({number}){dot}{rest}"


def _pair(trash: Bin, name: str) -> tuple[str, str]:
    files, info = (os.path.join(trash.folder, part) for part in ("files", "info"))
    return os.path.join(files, name), os.path.join(info, f"{name}.trashinfo")
