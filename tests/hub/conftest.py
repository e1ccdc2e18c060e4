"""A Hub for the tests of bases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from lorafind.hub import download
from tests.hub.hub_net import NAME, Net
from tests.hub.hub_server import Repository, hub_server
from tests.hub.made_basis import write_basis

CONFIG = b'{"architecture": "sd1", "feature": "style", "signature_version": 1}'


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A basis of 1.2 MB."""
    folder = tmp_path_factory.mktemp("basis")
    return write_basis(folder / "wild.safetensors", width=60_000)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no token and no bases; returns the cache's folder."""
    for name, value in {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("LORAFIND_BASES", str(tmp_path / "bases"))
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.01))
    return tmp_path / "cache"


@pytest.fixture
def net(alone: Path, published: Path) -> Iterator[Net]:
    with hub_server() as server:
        repository = Repository()
        server.repositories[NAME] = repository
        files = {
            "basis.safetensors": published.read_bytes(),
            "config.json": CONFIG,
            "README.md": b"# wild",
            "evil.py": b"raise SystemExit",
        }
        yield Net(server, published, repository.commit(files))
