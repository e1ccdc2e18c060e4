"""A LoRA of pictures as a query, kept in the cache."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lorafind.train import checkpoint
from lorafind.train.cache import prepare
from lorafind.train.captions import gather
from lorafind.train.images import Picture
from lorafind.train.loop import Quiet, Stopped, train
from lorafind.train.model import load_base
from lorafind.train.query import holds_pictures, query_file, train_query
from lorafind.train.settings import Settings
from tests.train import tiny


def pictures(folder: Path) -> list[Picture]:
    return gather([folder], resolution=tiny.RESOLUTION).pictures


@pytest.fixture
def settings(tiny_folder: Path) -> Settings:
    return Settings(
        model=str(tiny_folder), resolution=tiny.RESOLUTION, steps=3, rank=2, prior_weight=0
    )


def test_the_place_hangs_on_contents_and_settings_alone(
    rings: Path, stripes: Path, settings: Settings, tmp_path: Path
) -> None:
    own = query_file(pictures(rings), settings, tmp_path)
    assert own.parent == tmp_path / "train" / "queries"
    moved = shutil.copytree(rings, tmp_path / "moved")
    for number, picture in enumerate(sorted(moved.glob("*.png"), reverse=True)):
        picture.with_suffix(".txt").rename(moved / f"{number}.txt")
        picture.rename(moved / f"{number}.png")
    assert query_file(pictures(moved), settings, tmp_path) == own
    (moved / "0.txt").write_text("another caption")
    others = {
        query_file(pictures(moved), settings, tmp_path),
        query_file(pictures(rings)[1:], settings, tmp_path),
        query_file(pictures(stripes), settings, tmp_path),
        query_file(pictures(rings), replace(settings, steps=4), tmp_path),
        query_file(pictures(rings), replace(settings, prior_weight=1), tmp_path),
        query_file(pictures(rings), replace(settings, prior_weight=1, class_count=9), tmp_path),
        query_file(pictures(rings), replace(settings, model="owner/name"), tmp_path),
        query_file(pictures(rings), replace(settings, model="owner/name@v2"), tmp_path),
    }
    assert len(others) == 8 and own not in others


def test_another_base_model_in_the_same_place_is_another(
    rings: Path, settings: Settings, tmp_path: Path
) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"one")
    os.utime(model, ns=(0, 10**18))
    here = replace(settings, model=str(model))
    before = query_file(pictures(rings), here)
    assert query_file(pictures(rings), here) == before
    model.write_bytes(b"two")
    os.utime(model, ns=(0, 10**18 + 1))
    assert query_file(pictures(rings), here) != before


def test_trained_as_train_does_also_after_an_interruption(
    rings: Path, settings: Settings, tmp_path: Path
) -> None:
    class Interrupted(Quiet):
        def advance(self, files: int, size: int) -> None:
            if base.vae is None:
                raise KeyboardInterrupt

    own = pictures(rings)
    base = load_base(settings.model)
    expected = tmp_path / "expected.safetensors"
    train(base, prepare(base, own, settings), settings, expected)
    path = query_file(own, settings, tmp_path)
    with pytest.raises(Stopped, match="the same command goes on from there"):
        train_query(base, own, settings, path, Interrupted())
    assert checkpoint.path(path).is_file() and not path.exists()
    train_query(load_base(settings.model), own, settings, path)
    assert path.read_bytes() == expected.read_bytes()
    assert os.listdir(path.parent) == [path.name]


def test_what_is_a_picture(rings: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert holds_pictures(rings)
    assert holds_pictures(rings / "rings-0.png")
    assert not holds_pictures(tmp_path / "a.txt")
    assert not holds_pictures(tmp_path / "folder.png")
    assert not holds_pictures(tmp_path / "nothing.png")
    (tmp_path / "folder.png").rmdir()
    assert not holds_pictures(tmp_path)
