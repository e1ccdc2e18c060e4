"""Features of images kept on disk, so that no image goes through an encoder twice.

One file per encoder, ``<encoder>-<16 hex of its identity>.npz``, in a folder that the caller names.
Arrays of one length n: ``paths`` (absolute, text), ``sizes`` (bytes) and ``times`` (modified,
nanoseconds), int64, and ``features``, n × D float32. A row counts as long as its file has that size
and time.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorafind.files.whole import whole


class Key(NamedTuple):
    """An image file as it was read: absolute path, bytes, time of its last change in ns."""

    path: str
    size: int
    time: int


def key_of(path: Path) -> Key:
    """The key of an image file. Raises OSError where it cannot be looked at."""
    state = path.stat()
    return Key(os.path.abspath(path), state.st_size, state.st_mtime_ns)


def cache_file(folder: Path, encoder: str, identity: str) -> Path:
    """Where the features of an encoder lie."""
    return folder / f"{encoder}-{identity[:16]}.npz"


def load(file: Path) -> dict[Key, np.ndarray]:
    """What the file holds: nothing where there is none. Raises ValueError where it is damaged."""
    if not file.exists():
        return {}
    try:
        with np.load(file, allow_pickle=False) as held:
            paths, sizes, times = held["paths"], held["sizes"], held["times"]
            features = held["features"].astype(np.float32, copy=False)
            if features.ndim != 2:
                raise ValueError("its features are no matrix")
            rows = zip(paths.tolist(), sizes.tolist(), times.tolist(), features, strict=True)
            return {Key(path, size, time): row for path, size, time, row in rows}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"damaged, computed again: {error}") from error


def save(file: Path, features: dict[Key, np.ndarray]) -> None:
    """Write the file whole, or leave the one that is there. Raises OSError where it cannot be."""
    keys = list(features)
    # Given a path, savez would put an ending of its own behind it.
    with whole(file) as part, part.open("wb") as opened:
        np.savez(
            opened,
            paths=np.array([k.path for k in keys], dtype=str),
            sizes=np.array([k.size for k in keys], np.int64),
            times=np.array([k.time for k in keys], np.int64),
            features=np.array(list(features.values()), np.float32),
        )
