"""A folder of links per group: a look at the collection by style that moves no file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from lorafind.groups.sort import Group
from lorafind.index.problem import IndexProblem

#: Characters that some system does not allow in a name, or a terminal obeys.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff<>:"/\\|?*]')
_LONGEST = 80
#: Names that Windows keeps for devices.
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?$")


def safe_name(text: str) -> str:
    """``text`` as the name of a folder on any system; never empty."""
    name = _UNSAFE.sub("_", text).strip(" .")[:_LONGEST].strip(" .")
    return f"_{name}" if not name or _DEVICES.match(name) else name


def link(groups: Iterable[Group], folder: str | os.PathLike[str]) -> tuple[int, int]:
    """Make ``folder`` with a sub-folder of symbolic links per group; no other file is touched.

    Sub-folders are called by number and central LoRA, below one of their architecture where there
    are several; what is in no group is in ``no group``. Returns the number of links, and of LoRAs
    without a file that is there now. The folder appears when it is complete. Raises IndexProblem
    where ``folder`` is there and not empty, or the file system has no links.
    """
    target = Path(folder).expanduser().absolute()
    _refuse_used(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    found = list(groups)
    several = len({group.architecture for group in found}) > 1
    width = len(str(max((group.number for group in found), default=0)))
    made = missing = 0
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        for group in found:
            base = work / safe_name(group.architecture) if several else work
            place = base / _name(group, width)
            place.mkdir(parents=True)
            for member in group.members:
                paths = (member.path, *member.other_paths)
                path = next((p for p in paths if p and os.path.exists(p)), None)
                if path is None:
                    missing += 1
                    continue
                _link(os.path.abspath(path), place)
                made += 1
        # mkdtemp keeps others out.
        work.chmod(0o777 & ~_umask())
        if target.is_dir():
            target.rmdir()
        os.rename(work, target)
    except BaseException:
        # It holds links and folders alone; links are not followed.
        shutil.rmtree(work, ignore_errors=True)
        raise
    return made, missing


def _refuse_used(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise IndexProblem(f"{target} is a file or a link: name a folder that is not there yet.")
    if target.is_dir() and any(target.iterdir()):
        raise IndexProblem(
            f"{target} is not empty, and nothing in it is overwritten: name a folder that is not "
            "there yet."
        )


def _name(group: Group, width: int) -> str:
    if group.central is None:
        return "no group"
    stem = os.path.splitext(os.path.basename(group.central.path))[0]
    return safe_name(f"{group.number:0{width}d} {stem}")


def _link(path: str, place: Path) -> None:
    stem, suffix = os.path.splitext(os.path.basename(path))
    number = 1
    while True:
        name = f"{stem}{suffix}" if number == 1 else f"{stem} ({number}){suffix}"
        try:
            os.symlink(path, place / name)
            return
        except FileExistsError:
            number += 1
        except (OSError, NotImplementedError) as error:
            raise IndexProblem(
                f"No link can be made in {place.parent} ({error}): name a folder on a file system "
                "that has links (on Windows: with Developer Mode on)."
            ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
