"""Captions: beside the pictures, by BLIP, or none because none were wanted.

Beside ``a.png`` these are looked at, the first that there is: ``a.txt``, ``a.caption``, and the
line of a ``metadata.jsonl`` in its folder or the one above it whose ``file_name`` is the picture
(``text`` or ``caption`` is what it says; Hugging Face's ImageFolder).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lorafind.index.progress import Progress
from lorafind.train.images import Picture, survey
from lorafind.train.problem import TrainProblem

HOW = ("files", "blip", "none")
SUFFIXES = (".txt", ".caption")
TABLE = "metadata.jsonl"


class Captioner(Protocol):
    """What describes pictures, such as :class:`lorafind.train.blip.Blip`."""

    def caption(self, pictures: Sequence[Picture], watch: Progress | None = None) -> list[str]:
        """A caption per picture."""


@dataclass(frozen=True)
class Gathered:
    """What a training starts from.

    pictures: with captions; skipped: files left out because they cannot be read, and why;
    warnings: sentences.
    """

    pictures: list[Picture]
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def gather(
    sources: Sequence[Path],
    how: str = "files",
    *,
    resolution: int = 512,
    min_size: int | None = None,
    skip_unreadable: bool = False,
    captioner: Captioner | None = None,
    watch: Progress | None = None,
) -> Gathered:
    """All pictures of some folders and files, with captions.

    sources, resolution, min_size: see :func:`lorafind.train.images.survey`; how: ``files`` takes
    the captions beside the pictures and wants one for each; ``blip`` lets the captioner describe
    those that have none; ``none`` looks for no captions. skip_unreadable: go on without pictures
    that cannot be read; else one such picture stops everything, before anything was trained.

    Raises TrainProblem that names every unreadable picture or caption and every missing caption.
    """
    if how not in HOW:
        raise TrainProblem(f"Captions by {how!r}? Choose one of {', '.join(HOW)}.")
    if how == "blip" and captioner is None:
        raise ValueError("captions by BLIP need a captioner")
    seen = survey(sources, resolution, min_size, watch)
    problems = []
    total = len(seen.pictures) + len(seen.broken)
    if seen.broken and not skip_unreadable:
        names = ", ".join(f"{path} ({why})" for path, why in seen.broken)
        problems.append(
            f"{len(seen.broken):,} of {total:,} pictures cannot be read: {names}. Repair or remove "
            "them, or go on without them (--skip-unreadable)."
        )
    elif not seen.pictures:
        raise TrainProblem(f"None of the {total:,} pictures can be read.")
    pictures = seen.pictures
    if how != "none":
        pictures, missing, broken = _described(pictures)
        if broken:
            names = ", ".join(f"{path} ({why})" for path, why in broken)
            problems.append(f"Captions that cannot be read: {names}. Repair or remove them.")
        if missing and how == "files":
            problems.append(_missing(missing, total))
        if missing and captioner is not None and not problems:
            told = dict(zip(missing, captioner.caption(missing, watch), strict=True))
            pictures = [
                replace(p, caption=told[p], origin="blip") if p in told else p for p in pictures
            ]
    if problems:
        raise TrainProblem(" ".join(problems))
    return Gathered(pictures, seen.broken, seen.warnings)


def write_beside(pictures: Sequence[Picture]) -> list[Path]:
    """Write BLIP's captions as .txt beside their pictures; returns the files written.

    A file that is there stays as it is. Raises OSError where one cannot be written.
    """
    written = []
    for picture in pictures:
        path = picture.path.with_suffix(".txt")
        if picture.origin == "blip" and not path.exists():
            path.write_text(picture.caption + "\n", "utf-8")
            written.append(path)
    return written


def _missing(pictures: Sequence[Picture], total: int) -> str:
    if len(pictures) == total:
        what = f"None of the {total:,} pictures has a caption"
    else:
        names = ", ".join(str(p.path) for p in pictures)
        what = f"{len(pictures):,} of {total:,} pictures have no caption: {names}"
    return (
        f"{what}. Write one into a .txt of the same name beside each picture, let BLIP describe "
        "them (--caption blip), or train without captions (--caption none)."
    )


def _described(
    pictures: Sequence[Picture],
) -> tuple[list[Picture], list[Picture], list[tuple[Path, str]]]:
    """All pictures, those without a caption, and what cannot be read."""
    tables: dict[Path, dict[Path, str]] = {}
    broken: list[tuple[Path, str]] = []
    out, missing = [], []
    for picture in pictures:
        text, wrong = _beside(picture.path)
        if wrong:
            broken.append(wrong)
            continue
        for folder in picture.path.absolute().parents[:2]:
            if text:
                break
            if folder not in tables:
                tables[folder] = _table(folder / TABLE, broken)
            text = tables[folder].get(picture.path.absolute(), "")
        found = replace(picture, caption=text, origin="file" if text else "none")
        out.append(found)
        if not text:
            missing.append(found)
    return out, missing, broken


def _beside(path: Path) -> tuple[str, tuple[Path, str] | None]:
    """The caption in a file of the picture's name, empty for none, and what is wrong with it.

    Several lines are put into one.
    """
    for suffix in SUFFIXES:
        file = path.with_suffix(suffix)
        if file.is_file():
            try:
                text = " ".join(file.read_text("utf-8-sig").split())
            except (OSError, ValueError) as error:
                return "", (file, _why(error))
            if text:
                return text, None
    return "", None


def _table(file: Path, broken: list[tuple[Path, str]]) -> dict[Path, str]:
    """The captions in a metadata.jsonl by the absolute path of their picture."""
    found: dict[Path, str] = {}
    try:
        text = file.read_text("utf-8-sig") if file.is_file() else ""
    except (OSError, ValueError) as error:
        broken.append((file, _why(error)))
        return found
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            said = row.get("text", row.get("caption", ""))
            found[file.parent / row["file_name"]] = " ".join(str(said or "").split())
        except (ValueError, KeyError, TypeError, AttributeError):
            broken.append((file, f"line {number} is no JSON with a file_name"))
            break
    return found


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return getattr(error, "strerror", None) or str(error)
