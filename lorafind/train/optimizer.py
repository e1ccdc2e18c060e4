"""The optimisers and the learning rate."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings


def optimizer(settings: Settings, parameters: Tensor) -> torch.optim.Optimizer:
    """Adam for all numbers of one LoRA; with weight decay it is AdamW.

    Raises TrainProblem where 8-bit Adam is asked for and bitsandbytes is not installed.
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adam8bit":
        try:
            optimizers: Any = importlib.import_module("bitsandbytes.optim")
        except ImportError as error:
            raise TrainProblem(
                "8-bit Adam needs the package bitsandbytes: install it with pip install "
                "bitsandbytes, or train with the plain Adam."
            ) from error
        eight: torch.optim.Optimizer = optimizers.AdamW8bit([parameters], **options)
        return eight
    fused = parameters.device.type in ("cpu", "cuda")
    return torch.optim.AdamW([parameters], fused=fused, **options)


def rate(settings: Settings, step: int) -> float:
    """The learning rate of a step, from 0: linear from 0 over the warm-up, then as scheduled.

    cosine: half a period, to 0 at the last step's end.
    """
    full, warmup = settings.learning_rate, settings.warmup
    if step < warmup:
        return full * step / warmup
    if settings.schedule == "constant":
        return full
    done = (step - warmup) / max(1, settings.steps - warmup)
    return full * (1 + math.cos(math.pi * done)) / 2
