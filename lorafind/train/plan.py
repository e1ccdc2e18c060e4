"""What a training is going to take, said before it begins."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorafind.train import prior
from lorafind.train.estimate import Estimate, estimate, seconds_per_step
from lorafind.train.images import Picture
from lorafind.train.model import Base
from lorafind.train.settings import Settings


@dataclass(frozen=True)
class Plan:
    """One training, or the trainings of a data set.

    pictures: in all; captions: origin (``file``, ``blip``, ``none``) → how many of them; loras: to
    train, ``parallel`` at once, each for ``steps``; class_images: the most that are made before;
    estimate: of what trains at once; encoders: bytes of VAE and text encoder, where they stay in
    memory though no samples are drawn; step: seconds of a step of all that train at once;
    class_image: of making one; available: bytes of memory that there are, 0 where unknown.
    """

    pictures: int
    captions: dict[str, int]
    loras: int
    parallel: int
    steps: int
    class_images: int
    estimate: Estimate
    encoders: int
    step: float
    class_image: float
    available: int

    @property
    def memory(self) -> int:
        """Bytes, at most."""
        return self.estimate.memory + self.encoders

    @property
    def seconds(self) -> float:
        """Of training alone."""
        return -(-self.loras // self.parallel) * self.steps * self.step

    @property
    def class_seconds(self) -> float:
        """Of making class images, at most."""
        return self.class_images * self.class_image


def make_plan(
    base: Base,
    pictures: Sequence[Picture],
    settings: Settings,
    *,
    loras: int = 1,
    parallel: int = 1,
    encoders: bool = False,
) -> Plan:
    """Measure a few steps on random numbers, and count.

    pictures: of all LoRAs; loras: still to train; parallel: at once; encoders: VAE and text encoder
    stay in memory between them. Raises TrainProblem where the
    memory does not suffice for a step.
    """
    runs = max(1, min(parallel, loras))
    step = seconds_per_step(base, settings, runs)
    samples = runs * settings.batch_size * (2 if settings.prior_weight else 1)
    made = settings.class_count if settings.prior_weight and not settings.class_images else 0
    # A class image goes through the U-Net twice a step (guidance); a pass back costs two forward.
    image = prior.STEPS * 2 * step / samples / 3
    return Plan(
        len(pictures),
        dict(Counter(picture.origin for picture in pictures)),
        loras,
        runs,
        settings.steps,
        made,
        estimate(base, settings, runs),
        _encoders(base) if encoders and not settings.sample_prompts else 0,
        step,
        image,
        available(base.device),
    )


def _encoders(base: Base) -> int:
    parts = (part for part in (base.vae, base.text_encoder) if part is not None)
    return sum(p.nbytes for part in parts for p in part.parameters())


def available(device: torch.device) -> int:
    """Bytes of memory of a device (a GPU: free ones), 0 where they cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0
