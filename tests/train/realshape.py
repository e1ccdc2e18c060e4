"""A step at Stable Diffusion 1.5's real shape, in a process of its own, whose peak memory it tells.

``python -m tests.train.realshape SETTINGS``: the settings as JSON; prints JSON.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lorafind.train.engine import Engine
from lorafind.train.model import Base
from lorafind.train.settings import Settings
from tests.train import oracle

CONTEXT = 768


def unet(dtype: torch.dtype = torch.float32) -> Any:
    """SD1.5's U-Net with random weights, frozen."""
    from diffusers import UNet2DConditionModel

    model: Any = UNet2DConditionModel
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        made = model(sample_size=64, cross_attention_dim=CONTEXT, attention_head_dim=8)
    finally:
        torch.set_default_dtype(torch.float32)
    return made.requires_grad_(False).eval()


def base(dtype: torch.dtype = torch.float32) -> Base:
    """A base model of that U-Net and nothing else."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Base(unet(dtype), None, None, None, scheduler, "random", "0" * 64, "epsilon")


def peak() -> int:
    """The most memory that this process has taken, bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Run a step and tell."""
    settings = Settings(**json.loads(sys.argv[1]))
    side = settings.resolution // 8
    model = base()
    prepared = oracle.prepared(side=side, priors=3 if settings.prior_weight else 0, context=CONTEXT)
    with Engine.on(model, [(prepared, settings)]) as engine:
        layers, parameters = len(engine.adapters.names), engine.adapters.values.shape[1]
        began = time.perf_counter()
        loss = float(engine.gradients(0)[0])
        engine.update(0)
        took = time.perf_counter() - began
        moved = int(engine.adapters.values.count_nonzero())
    told = {"layers": layers, "parameters": parameters, "peak": peak(), "seconds": took}
    print(json.dumps({**told, "loss": loss, "nonzero": moved}))


if __name__ == "__main__":
    main()
