"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafind.train.cache import Prepared, prepare
from lorafind.train.captions import gather
from lorafind.train.model import Base, load_base
from lorafind.train.settings import Settings
from tests.train import tiny


@pytest.fixture(scope="session", autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of our own, an empty cache of the Hub, and no network."""
    from huggingface_hub import constants

    home: Path = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFIND_CACHE", str(home / "cache"))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield home


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline in diffusers' layout; not to be written to."""
    return tiny.pipeline().save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as one file in the original naming, float32, alone in its folder."""
    return tiny.pipeline().save_single(tmp_path_factory.mktemp("tiny") / "model.safetensors")


@pytest.fixture
def base(tiny_folder: Path) -> Base:
    """The tiny pipeline, loaded anew: a test may put adapters into it."""
    return load_base(str(tiny_folder))


@pytest.fixture(scope="session")
def rings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of one style with captions; not to be written to."""
    return tiny.paint(tmp_path_factory.mktemp("pictures") / "rings", "rings")


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of another style with captions; not to be written to."""
    return tiny.paint(tmp_path_factory.mktemp("pictures") / "stripes", "stripes")


@pytest.fixture(scope="session")
def prepared(tiny_folder: Path, rings: Path, stripes: Path) -> Prepared:
    """Rings with captions as instances, stripes as class images, at tiny.RESOLUTION."""
    settings = Settings(resolution=tiny.RESOLUTION, class_images=stripes)
    pictures = gather([rings], resolution=tiny.RESOLUTION).pictures
    return prepare(load_base(str(tiny_folder)), pictures, settings)
