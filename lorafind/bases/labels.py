"""Labelled folders: which LoRA is of which artist, and what it is for.

Either one sub-folder per artist, or a CSV file (by default ``labels.csv`` in the folder) with the
columns ``file`` and ``artist`` and, where they are known, ``genre``, ``split`` and ``images`` (how
many pictures it was trained on). Splits: ``train``, ``calibration``, ``validation``, ``test``, and
``test_same`` and ``test_diff`` where there are queries trained like the data base and queries
trained on fewer pictures.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lorafind.bases.problem import BasisProblem

SPLITS = ("train", "calibration", "validation", "test", "test_same", "test_diff")
#: Training, calibration, validation and test LoRAs of an artist (the paper: 24 + 3 + 3, of the 24
#: three for calibration).
SHARES = {"train": 21, "calibration": 3, "validation": 3, "test": 3}
SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt", ".pth")


@dataclass(frozen=True)
class Labelled:
    """One LoRA file. genre, split: empty where nothing is said; images: 0 where unknown."""

    path: Path
    artist: str
    genre: str = ""
    split: str = ""
    images: int = 0


def read_labels(folder: Path, labels: Path | None = None) -> list[Labelled]:
    """The labelled LoRAs of a folder, by path.

    Raises BasisProblem where the folder, the file or a column is missing, a split is unknown, or
    nothing is labelled.
    """
    if not folder.is_dir():
        raise BasisProblem(f"{folder} is no folder: name one with a sub-folder per artist.")
    beside = folder / "labels.csv"
    if labels is None and beside.is_file():
        labels = beside
    found = _from_csv(folder, labels) if labels else _from_folders(folder)
    if not found:
        raise BasisProblem(
            f"{folder} has no labelled LoRA: make a sub-folder per artist, or name a CSV file "
            "with the columns file and artist (--labels)."
        )
    return sorted(found, key=lambda one: str(one.path))


def _from_folders(folder: Path) -> list[Labelled]:
    found = []
    for artist in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[:1] != "."):
        for place, _, names in os.walk(artist):
            found += [
                Labelled(Path(place, name), artist.name)
                for name in names
                if name.lower().endswith(SUFFIXES) and name[:1] != "."
            ]
    return found


def _from_csv(folder: Path, labels: Path) -> list[Labelled]:
    try:
        with labels.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BasisProblem(f"{labels} cannot be read as CSV: {error}.") from error
    for column in ("file", "artist"):
        if column not in columns:
            raise BasisProblem(f"{labels} has no column {column!r}: its first line names columns.")
    found = []
    for number, row in enumerate(rows, 2):
        split = (row.get("split") or "").strip()
        if split and split not in SPLITS:
            raise BasisProblem(
                f"{labels}, line {number}: {split!r} is no split; known are {', '.join(SPLITS)}."
            )
        if not (row["artist"] or "").strip() or not (row["file"] or "").strip():
            raise BasisProblem(f"{labels}, line {number}: a file and an artist are needed.")
        images = (row.get("images") or "").strip()
        found.append(
            Labelled(
                folder / row["file"].strip(),
                row["artist"].strip(),
                (row.get("genre") or "").strip(),
                split,
                int(images) if images.isdigit() else 0,
            )
        )
    return found


def with_splits(labelled: Sequence[Labelled], seed: int = 0) -> list[Labelled]:
    """The same with a split for each.

    Splits that are named are kept, and those that have none train. Where no split is named at all,
    the LoRAs of each artist are divided at random in the proportions of SHARES; an artist with
    fewer than six only trains.
    """
    if any(one.split for one in labelled):
        return [one if one.split else replace(one, split="train") for one in labelled]
    by_artist: dict[str, list[int]] = defaultdict(list)
    for row, one in enumerate(labelled):
        by_artist[one.artist].append(row)
    rng = np.random.default_rng(seed)
    split = ["train"] * len(labelled)
    total = sum(SHARES.values())
    for artist in sorted(by_artist):
        rows = rng.permutation(by_artist[artist])
        if len(rows) < 6:
            continue
        taken = 0
        for name in ("test", "validation", "calibration"):
            number = max(1, round(len(rows) * SHARES[name] / total))
            for row in rows[taken : taken + number]:
                split[row] = name
            taken += number
    return [replace(one, split=split[row]) for row, one in enumerate(labelled)]


def queries(labelled: Sequence[Labelled]) -> tuple[str, ...]:
    """The splits of queries that there are: of test, test_same and test_diff."""
    have = {one.split for one in labelled}
    return tuple(name for name in SPLITS if name.startswith("test") and name in have)
