"""Fixtures for all tests."""

from __future__ import annotations

import os
import pathlib

import pytest


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of test files that are not ours to publish; tests that need it skip without."""
    default = pathlib.Path(__file__).resolve().parents[2] / "shared"
    folder = pathlib.Path(os.environ.get("LORAFIND_SHARED", default))
    if not (folder / "loras").is_dir():
        pytest.skip(f"no test files at {folder}: set LORAFIND_SHARED")
    return folder
