"""What a data set's folder says about its LoRAs: ``labels.csv`` and ``train-many.json``.

labels.csv: a line per LoRA that is there; ``file``, ``artist``, ``genre``, ``split`` and ``images``
as :mod:`lorafind.bases.labels` reads them, ``setup`` (``same``: trained on as many pictures as the
data base's LoRAs; ``diff``: on fewer), ``seed`` and ``word`` ([V]).

train-many.json: an object; ``loras``: file → ``digest`` (SHA-256 of all that the file hangs on),
``word`` and ``pictures`` (paths below the data set's source); ``failed``: file or artist → why.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafind.files.whole import whole
from lorafind.train.problem import TrainProblem

LABELS = "labels.csv"
RECORD = "train-many.json"
COLUMNS = ("file", "artist", "genre", "split", "images", "setup", "seed", "word")
_VERSION = 1


@dataclass
class Record:
    """The facts of LoRAs that were trained or begun, and what failed."""

    loras: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Of a data set's folder; empty where nothing was begun. Raises TrainProblem."""
        file = folder / RECORD
        try:
            found = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise TrainProblem(f"{file} cannot be read: {error}.") from error
        if not isinstance(found, dict) or found.get("version") != _VERSION:
            raise TrainProblem(f"{file} is of another version of lorafind, or no record at all.")
        return cls(found["loras"], found["failed"])

    def write(self, folder: Path) -> None:
        """Whole or not at all. Raises OSError."""
        held = {"version": _VERSION, "loras": self.loras, "failed": self.failed}
        with whole(folder / RECORD) as part:
            part.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_labels(folder: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write labels.csv whole or not at all; rows: with COLUMNS. Raises OSError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole(folder / LABELS) as part:
        part.write_text(text.getvalue(), "utf-8")
