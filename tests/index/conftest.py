"""A bucket for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.remote import Store, serving


@pytest.fixture(scope="session")
def _server() -> Iterator[Store]:
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with serving() as store:
        yield store


@pytest.fixture
def bucket(_server: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    """An empty bucket that lorafind reaches as ``s3://collection``."""
    _server.connect(monkeypatch, tmp_path)
    yield _server
    _server.empty()
