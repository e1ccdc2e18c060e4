"""The process in which atheris runs; started by ``python -m tests.fuzz``."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["lorafind"]):
    from tests.fuzz import targets

#: After so many inputs what has been found is written down: the process ends without a word.
TELL = 100

_counts: Counter[str] = Counter()
_found: Counter[str] = Counter()
FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()


def _try(data: bytes) -> None:
    try:
        _counts[targets.one(data)] += 1
    except Exception as error:
        _keep(data, error)
    if (_counts.total() + _found.total()) % TELL == 0:
        _tell()


def _keep(data: bytes, error: Exception) -> None:
    """The first input of every kind of failure, with its traceback; the fuzzer goes on."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "lorafind" in f.filename] or frames
    at = ours[-1]
    name = f"{type(error).__name__}-{Path(at.filename).stem}-{at.lineno}"
    _found[name] += 1
    if _found[name] == 1:
        (FOLDER / f"{name}.input").write_bytes(data)
        (FOLDER / f"{name}.txt").write_text(
            "".join(traceback.format_exception(error)) + f"\n{data.hex()}\n"
        )


def _tell() -> None:
    told = {"inputs": _counts.total() + _found.total(), "outcomes": _counts, "found": _found}
    part = FOLDER / f"told-{os.getpid()}.part"
    part.write_text(json.dumps(told))
    part.replace(FOLDER / f"told-{os.getpid()}.json")


if __name__ == "__main__":
    for seed in targets.seeds():
        # Tables and caches are filled before anything is timed; failures come again.
        with suppress(Exception):
            targets.one(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], _try)
    atheris.Fuzz()
