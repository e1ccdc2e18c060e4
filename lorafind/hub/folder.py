"""The user's own bases: the files of one folder, and how they are found by name.

The folder is ``LORAFIND_BASES``, by default ``bases`` in the user's data folder. A basis there goes
by the name of its file (with or without ``.safetensors``), its id, or the name that it has itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from lorafind.bases.problem import BasisProblem

SUFFIX = ".safetensors"


def folder() -> Path:
    """Where the user's bases lie; it need not exist."""
    if given := os.environ.get("LORAFIND_BASES"):
        return Path(given).expanduser()
    import platformdirs

    return platformdirs.user_data_path("lorafind", appauthor=False) / "bases"


def files() -> list[Path]:
    """The basis files of the folder, by name."""
    return sorted(folder().glob(f"*{SUFFIX}"))


def local(name: str) -> Path | None:
    """The file of a path or of a basis in the folder; None where nothing here has this name.

    Raises BasisProblem where several have it, or a path to a file leads nowhere.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    here = files()
    if of_file := [file for file in here if name in (file.name, file.stem)]:
        return of_file[0]
    if name.endswith(SUFFIX):
        raise BasisProblem(f"There is no basis file {name}, neither there nor in {folder()}.")
    told = [file for file in here if name in _names(file)]
    if len(told) > 1:
        raise BasisProblem(
            f"{len(told)} bases in {folder()} are called {name}: name one by its file, "
            f"{' or '.join(file.stem for file in told)}."
        )
    return told[0] if told else None


def unknown(name: str, others: Sequence[str] = ()) -> str:
    """The sentence for a name that stands for nothing; others: more names that would do."""
    known = [n for file in files() for n in (file.stem, *_names(file))] + list(others)
    close = get_close_matches(name, known, n=1)
    if close:
        meant = f"Did you mean {close[0]}?"
    elif name.count("/") == 1:
        meant = f"On the Hub it would be hf:{name}."
    else:
        meant = "`lorafind basis list` shows those that are here."
    return f"There is no basis {name}. {meant}"


def vacant(target: Path, name: str) -> Path:
    """The file that a copy of a basis becomes: the target, or in it where it is a folder.

    Raises BasisProblem where there is one already.
    """
    target = target.expanduser()
    if target.is_dir():
        stem = name.partition("@")[0].rpartition("/")[2]
        target = target / (stem.removesuffix(SUFFIX) + SUFFIX)
    if target.exists():
        raise BasisProblem(f"{target} is there already: remove it, or choose another place.")
    return target


def copy(path: Path, target: Path) -> Path:
    """Copy a basis; the file appears under its name when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        shutil.copyfile(path, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _names(file: Path) -> tuple[str, ...]:
    """Id and name that a basis file has in itself; none where it cannot be read."""
    from lorafind.bases.file import read_facts

    try:
        facts = read_facts(file)
    except BasisProblem:
        # `basis list` says what is wrong with it.
        return ()
    return str(facts["id"]), str(facts["name"])
