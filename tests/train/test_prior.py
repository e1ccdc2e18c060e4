"""Class images: given, or made once by the base model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorafind.index.progress import Silent
from lorafind.train.cache import prepare
from lorafind.train.captions import gather
from lorafind.train.model import Base, load_base
from lorafind.train.prior import GUIDANCE, STEPS, class_pictures, noise
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings
from tests.train import tiny

SETTINGS = Settings(resolution=tiny.RESOLUTION, class_count=2, prior_prompt="a red ring")


class Counted(Silent):
    """How many class images were announced and made."""

    announced = made = 0

    def stage(self, title: str, files: int, size: int) -> None:
        self.announced = files if title == "Class images" else self.announced

    def advance(self, files: int, size: int) -> None:
        self.made += files


def make(base: Base, cache: Path, **changes: Any) -> tuple[list[Path], int]:
    """The class images, and how many of them were made now."""
    watch = Counted()
    found = class_pictures(base, replace(SETTINGS, **changes), cache, watch)
    assert watch.announced == watch.made
    return [p.path for p in found.pictures], watch.made


def test_they_are_what_the_pipeline_shows(base: Base, tiny_folder: Path, tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    paths, made = make(base, tmp_path)
    assert made == 2
    theirs: Any = StableDiffusionPipeline.from_pretrained(tiny_folder)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    for number, path in enumerate(paths):
        generator = torch.Generator().manual_seed(number)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        torch.testing.assert_close(noise(number, 64), latents, rtol=0, atol=0)
        image = theirs(
            "a red ring",
            latents=latents,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        ).images[0]
        # One step of 255 is rounding.
        ours = np.asarray(Image.open(path), int)
        np.testing.assert_allclose(ours, np.asarray(image, int), atol=1)
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_they_are_made_once(base: Base, tiny_folder: Path, tmp_path: Path) -> None:
    paths, made = make(base, tmp_path)
    kept = {path: path.read_bytes() for path in paths}
    assert make(base, tmp_path) == (paths, 0)
    # Neither seed nor precision nor anything else of the training makes new ones.
    half = load_base(str(tiny_folder), "bf16")
    assert make(half, tmp_path, seed=5, precision="bf16", steps=3, rank=1) == (paths, 0)
    # An interrupted run goes on; a broken file is made again; more are added.
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    assert make(base, tmp_path) == (paths, 1)
    os.unlink(paths[1])
    more, made = make(base, tmp_path, class_count=3)
    assert made == 2 and more[:2] == paths
    assert {path: path.read_bytes() for path in paths} == kept
    assert make(base, tmp_path, class_count=1) == (paths[:1], 0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_they_can_be_made_in_half_precision(
    tiny_folder: Path, tmp_path: Path, precision: str
) -> None:
    paths, _ = make(load_base(str(tiny_folder), precision), tmp_path, class_count=1)
    pixels = np.asarray(Image.open(paths[0]))
    assert pixels.shape == (64, 64, 3) and pixels.std() > 5


def test_other_models_and_prompts_have_their_own(base: Base, tmp_path: Path) -> None:
    folders = {make(base, tmp_path, class_count=1)[0][0].parent}
    folders.add(make(base, tmp_path, class_count=1, prior_prompt="a ring")[0][0].parent)
    base.sha256 = "0" * 64
    folders.add(make(base, tmp_path, class_count=1)[0][0].parent)
    assert len(folders) == 3


def test_given_ones(base: Base, stripes: Path, rings: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, class_images=stripes)
    found = class_pictures(base, settings, tmp_path, Silent())
    assert [p.path.parent for p in found.pictures] == [stripes] * 6
    small = tiny.paint(tmp_path / "given", "stripes", range(1), captions=False)
    tiny.draw("rings", 0, (32, 32)).save(small / "small.png")
    settings = replace(SETTINGS, class_images=small)
    pictures = gather([rings], resolution=64).pictures
    prepared = prepare(base, pictures, settings, cache=tmp_path / "cache")
    assert "small.png" in prepared.warnings[0]
    assert not (tmp_path / "cache" / "train" / "class").exists()
    (small / "broken.png").write_bytes(b"x")
    with pytest.raises(TrainProblem, match=r"broken\.png"):
        class_pictures(base, settings, tmp_path, Silent())
    with pytest.raises(TrainProblem, match="no file or folder"):
        class_pictures(base, replace(SETTINGS, class_images=tmp_path / "no"), tmp_path, Silent())


def test_none_without_prior_preservation(base: Base, rings: Path, tmp_path: Path) -> None:
    pictures = gather([rings], resolution=64).pictures
    prepared = prepare(base, pictures, replace(SETTINGS, prior_weight=0.0), cache=tmp_path)
    assert len(prepared.prior) == 0 and not (tmp_path / "train" / "class").exists()
