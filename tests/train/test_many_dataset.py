"""The plan of a data set: artists alone, captions checked, seeds and names of LoRAs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafind.train.captions import Gathered, gather
from lorafind.train.dataset import Share, has_same, plan, split_of
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings
from lorafind.train.subsets import Wanted
from tests.train import tiny

WANTED = Wanted(train=3, size=3, calibration=1, queries=1, few=2, held=3)
SETTINGS = Settings(resolution=tiny.RESOLUTION, steps=2)


def pictures(folder: Path) -> Gathered:
    return gather([folder], resolution=tiny.RESOLUTION)


def planned(root: Path, **more: Any) -> dict[str, Share]:
    return {s.artist.name: s for s in plan(root, WANTED, SETTINGS, pictures, **more)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("made")
    for style in tiny.STYLES:
        tiny.paint(root / f"{style} maker", style, range(12))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Iterator[Path]:
    """Two artists with twelve pictures each, to be changed."""
    yield shutil.copytree(made, tmp_path / "root")


def test_loras_of_an_artist(root: Path) -> None:
    share = planned(root)["rings maker"]
    assert (share.pictures, share.reason, share.warnings) == (12, "", [])
    assert [lora.file for lora in share.loras] == [
        "rings-maker/rings-maker-train-01.safetensors",
        "rings-maker/rings-maker-train-02.safetensors",
        "rings-maker/rings-maker-train-03.safetensors",
        "rings-maker/rings-maker-calibration-01.safetensors",
        "rings-maker/rings-maker-validation-01.safetensors",
        "rings-maker/rings-maker-test-01.safetensors",
    ]
    assert share.loras[0].title == "rings maker train 01"
    for lora in share.loras:
        assert tuple(p.digest for p in lora.pictures) == lora.subset.pictures
        assert all(p.path.parent.name == "rings maker" and p.caption for p in lora.pictures)


def test_same_ones_are_another_set_up(root: Path) -> None:
    wanted = Wanted(train=3, size=3, calibration=1, queries=1, few=2, held=3, same=True)
    plain, both = (plan(root, w, SETTINGS, pictures) for w in (WANTED, wanted))
    assert not has_same(plain) and has_same(both)
    files = [lora.file for lora in both[0].loras]
    assert files[:6] == [lora.file for lora in plain[0].loras]
    assert files[6:] == [
        f"rings-maker/rings-maker-{split}-same-01.safetensors"
        for split in ("calibration", "validation", "test")
    ]
    splits = [split_of(lora.subset, has_same(both)) for lora in both[0].loras]
    assert splits == [
        *["train"] * 3,
        *("calibration", "validation", "test_diff"),
        *("calibration", "validation", "test_same"),
    ]
    assert split_of(plain[0].loras[-1].subset, has_same(plain)) == "test"


def test_each_its_own_seed_or_one_for_all(root: Path) -> None:
    every = [lora for share in planned(root).values() for lora in share.loras]
    assert len({lora.settings.seed for lora in every}) == len(every) == 12
    one = [lora for share in planned(root, one_seed=True).values() for lora in share.loras]
    assert {lora.settings.seed for lora in one} == {0}
    # The words [V] are drawn for each all the same.
    assert [lora.number for lora in one] == [lora.number for lora in every]
    assert len({lora.number for lora in every}) == 12


def test_the_same_wherever_it_lies_and_whoever_else_is_there(root: Path, tmp_path: Path) -> None:
    first = planned(root)["rings maker"]
    moved = root.rename(tmp_path / "elsewhere")
    shutil.rmtree(moved / "stripes maker")
    again = planned(moved)["rings maker"]
    assert [lora.subset for lora in again.loras] == [lora.subset for lora in first.loras]
    assert [lora.digest("b") for lora in again.loras] == [lora.digest("b") for lora in first.loras]


def test_a_digest_hangs_on_pictures_captions_settings_and_base(root: Path) -> None:
    lora = planned(root)["rings maker"].loras[0]
    known = {lora.digest("base"), lora.digest("other base")}
    assert len(known) == 2
    lora.pictures[0].path.with_suffix(".txt").write_text("a square")
    changed = planned(root)["rings maker"].loras[0]
    assert changed.subset == lora.subset
    assert changed.digest("base") not in known
    longer = Settings(resolution=tiny.RESOLUTION, steps=3)
    assert plan(root, WANTED, longer, pictures)[0].loras[0].digest("base") not in known


def test_what_is_wrong_with_one_artist_stops_no_other(root: Path) -> None:
    broken = root / "rings maker" / "rings-0.png"
    broken.write_bytes(b"no picture")
    tiny.paint(root / "sparse", "rings", range(20, 22))
    found = planned(root)
    assert "rings-0.png (no image that Pillow knows)" in found["rings maker"].reason
    assert found["sparse"].reason == "2 pictures are too few: at least 4 are needed."
    assert not found["rings maker"].loras and not found["sparse"].loras
    assert len(found["stripes maker"].loras) == 6


def test_captions_that_name_their_artist(root: Path) -> None:
    (root / "rings maker" / "rings-3.txt").write_text("a red picture by the Rings")
    refused = planned(root)["rings maker"]
    assert not refused.loras
    assert "1 captions name the artist, rings-3.png by “rings”" in refused.reason
    dropped = planned(root, names="drop")["rings maker"]
    assert (dropped.pictures, len(dropped.loras)) == (11, 6)
    assert all(p.path.name != "rings-3.png" for lora in dropped.loras for p in lora.pictures)
    assert dropped.warnings[0].endswith("left out.")
    allowed = planned(root, names="allow")["rings maker"]
    assert allowed.pictures == 12 and allowed.warnings[0].endswith("trained on.")
    with pytest.raises(TrainProblem, match="refuse, drop, allow"):
        planned(root, names="keep")


def test_a_picture_that_is_there_twice_counts_once(root: Path) -> None:
    """Else it could be trained on and held back."""
    own = root / "rings maker"
    for ending in (".png", ".txt"):
        shutil.copy(own / f"rings-1{ending}", own / f"again{ending}")
        shutil.copy(own / f"rings-2{ending}", root / "stripes maker" / f"stolen{ending}")
    # So many that every picture is drawn for one LoRA at least.
    wanted = Wanted(train=18, size=3, calibration=0, queries=3, few=2, held=3)
    rings, stripes = plan(root, wanted, SETTINGS, pictures)
    assert (rings.pictures, stripes.pictures) == (12, 13)
    assert stripes.warnings == ["stolen.png is also a picture of rings maker."]
    assert "there more than once" in rings.warnings[0] and len(rings.warnings) == 1
