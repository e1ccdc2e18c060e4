"""What a training is going to take."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafind.train import prior, seeds
from lorafind.train.captions import gather
from lorafind.train.estimate import estimate
from lorafind.train.images import Picture
from lorafind.train.model import Base
from lorafind.train.plan import available, make_plan
from lorafind.train.settings import Settings
from tests.train import tiny

MEMINFO = Path("/proc/meminfo")
SETTINGS = Settings(resolution=tiny.RESOLUTION, rank=2, steps=40)


@pytest.fixture(scope="module")
def pictures(rings: Path) -> list[Picture]:
    return gather([rings], resolution=tiny.RESOLUTION).pictures


def test_one_training(base: Base, pictures: list[Picture]) -> None:
    began = time.perf_counter()
    plan = make_plan(base, pictures, SETTINGS)
    took = time.perf_counter() - began
    assert (plan.pictures, plan.captions, plan.loras, plan.steps) == (6, {"file": 6}, 1, 40)
    assert 0 < plan.step < took
    assert plan.seconds == 40 * plan.step
    assert plan.estimate == estimate(base, SETTINGS)
    assert plan.memory == plan.estimate.memory
    # Two samples a step, forward and twice as much backward; two forward per step of an image.
    assert plan.class_images == 100
    assert plan.class_seconds == pytest.approx(100 * prior.STEPS * plan.step / 3)


def test_many_trainings(base: Base, pictures: list[Picture]) -> None:
    settings = replace(SETTINGS, prior_weight=0)
    mixed = [*pictures, replace(pictures[0], origin="none")]
    plan = make_plan(base, mixed, settings, loras=7, parallel=3, encoders=True)
    assert plan.captions == {"file": 6, "none": 1}
    assert plan.class_images == plan.class_seconds == 0
    assert plan.parallel == 3
    # Three passes: three LoRAs, three, and one.
    assert plan.seconds == pytest.approx(3 * 40 * plan.step)
    assert plan.estimate == estimate(base, settings, 3)
    parts = [*base.vae.state_dict().values(), *base.text_encoder.state_dict().values()]
    assert plan.memory - plan.estimate.memory == sum(
        t.numel() * 4 for t in parts if t.is_floating_point()
    )


def test_no_more_at_once_than_there_are(base: Base, pictures: list[Picture]) -> None:
    plan = make_plan(base, pictures, replace(SETTINGS, prior_weight=0), loras=2, parallel=8)
    assert plan.parallel == 2 and plan.seconds == 40 * plan.step


def test_given_class_images_are_not_made(base: Base, pictures: list[Picture], rings: Path) -> None:
    plan = make_plan(base, pictures, replace(SETTINGS, class_images=rings))
    assert plan.class_images == 0


@pytest.mark.skipif(not MEMINFO.exists(), reason="the oracle is Linux's")
def test_memory_that_there_is() -> None:
    total = int(MEMINFO.read_text("ascii").split()[1]) * 1024
    assert available(torch.device("cpu")) == total
    assert available(torch.device("meta")) == 0


def test_seeds_follow_from_pictures_and_files(pictures: list[Picture]) -> None:
    moved = [replace(p, path=Path("elsewhere.png"), caption="other") for p in reversed(pictures)]
    assert seeds.of_pictures(moved) == seeds.of_pictures(pictures)
    assert seeds.of_pictures(pictures[1:]) != seeds.of_pictures(pictures)
    assert len({seeds.of_file(seed, file) for seed in range(2) for file in "ab"}) == 4
    assert 0 <= seeds.of_pictures(pictures) < 2**32
