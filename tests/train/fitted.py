"""A tiny pipeline that already tells noise from pictures a little.

A U-Net with random weights learns the same of any pictures, to predict noise at all, and LoRAs of
two sets come out alike. Here its last layer is the best for pictures of coloured blocks, by least
squares, which takes a second; what LoRAs then learn is more of their own pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from tests.train import tiny

#: Pictures that the layer is fitted on.
COUNT = 64
#: Ridge, relative to the number of equations.
RIDGE = 1e-3


def pipeline() -> tiny.Pipeline:
    """The pipeline of seed 0 with a fitted last layer."""
    from diffusers import DDPMScheduler

    made = tiny.pipeline()
    words = made.tokenizer("a picture", padding="max_length", return_tensors="pt").input_ids
    schedule = DDPMScheduler.from_config(made.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(COUNT, 3, 8, 8, generator=generator) * 2 - 1
    with torch.no_grad():
        pictures = functional.interpolate(blocks, tiny.RESOLUTION, mode="bilinear")
        latents = made.vae.encode(pictures).latent_dist.mean * made.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(1000, (COUNT,), generator=generator)
        prompts = made.text_encoder(words).last_hidden_state.expand(COUNT, -1, -1)
        _fit(made.unet, schedule.add_noise(latents, noise, times), times, prompts, noise)
    return made


def save(folder: Path) -> Path:
    """The pipeline in diffusers' layout."""
    return pipeline().save(folder)


def _fit(unet: Any, noisy: Any, times: Any, prompts: Any, noise: Any) -> None:
    seen: list[torch.Tensor] = []
    layer = unet.conv_out
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    unet(noisy, times, prompts)
    hook.remove()
    size = layer.weight[0].numel()
    patches = functional.unfold(seen[0], 3, padding=1).transpose(1, 2).reshape(-1, size).double()
    x = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
    y = noise.flatten(2).transpose(1, 2).reshape(len(x), -1).double()
    ridge = RIDGE * len(x) * torch.eye(size + 1, dtype=torch.float64)
    found = torch.linalg.solve(x.T @ x + ridge, x.T @ y).T.float()
    layer.weight.copy_(found[:, :size].reshape(layer.weight.shape))
    layer.bias.copy_(found[:, size])
