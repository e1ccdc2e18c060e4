"""Permissions are tested as an ordinary user, even where the tests run as root."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_NOBODY = 65534

needs_permissions = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no permission bits"
)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user can reach (pytest's own are closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="lorafind-"))
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o777)
        shutil.rmtree(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """The block runs with the rights of nobody where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
