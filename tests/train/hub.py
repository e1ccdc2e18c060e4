"""The tiny pipeline in the place of the default model, as if it had been fetched from the Hub."""

from __future__ import annotations

from pathlib import Path

from lorafind.train.settings import MODEL
from tests.train import tiny

COMMIT = "0" * 40


def as_default(home: Path) -> Path:
    """Put it into the Hub's cache of a home folder; returns the cache."""
    cache = home / ".cache" / "huggingface" / "hub"
    place = cache / f"models--{MODEL.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    tiny.pipeline().save(place / "snapshots" / COMMIT)
    return cache
