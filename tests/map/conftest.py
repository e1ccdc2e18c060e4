"""The demo collection, indexed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafind.demo.make import make
from tests.search import small


@pytest.fixture(scope="package")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo collection; its index is ``i.db`` beside the folder."""
    folder = tmp_path_factory.mktemp("map") / "demo"
    make(folder)
    small.index(folder.parent / "i.db", folder)
    return folder
