"""The training written plainly with diffusers and PEFT, and made-up examples to train on.

Nothing of lorafind computes here: the batches are data that both sides are given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorafind.train.cache import Example, Prepared
from lorafind.train.loss import Batch
from lorafind.train.model import Base, quiet
from lorafind.train.settings import Settings
from tests.train import tiny


def base(dtype: torch.dtype = torch.float32, prediction: str = "epsilon") -> Base:
    """The tiny pipeline as a base model."""
    from diffusers import DDPMScheduler

    pipeline = tiny.pipeline()
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction)
    with quiet():
        pipeline.unet.to(dtype)
    return Base(
        pipeline.unet,
        pipeline.vae,
        pipeline.text_encoder,
        pipeline.tokenizer,
        scheduler,
        "tiny",
        hashlib.sha256(b"tiny").hexdigest(),
        prediction,
    )


def prepared(
    seed: int = 0,
    instances: int = 4,
    priors: int = 3,
    side: int = 8,
    context: int = tiny.CONTEXT,
) -> Prepared:
    """Examples of random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def example(name: str) -> Example:
        return Example(
            torch.randn(4, side, side, generator=generator),
            torch.rand(4, side, side, generator=generator) * 0.05,
            torch.randn(77, context, generator=generator),
            name,
        )

    return Prepared(
        [example(f"instance {i}") for i in range(instances)],
        [example(f"prior {i}") for i in range(priors)],
        "ohw",
        [f"ohw a picture, {colour}" for colour in ("red", "green", "blue", "red")[:instances]],
        hashlib.sha256(f"{seed}/{instances}/{priors}".encode()).hexdigest(),
    )


def start(
    names: Sequence[str], unet: Any, rank: int, seed: int, spread: float
) -> dict[str, Tensor]:
    """Random A and B, float64, by PEFT's parameter names; B at 0 would hide the gradient of A."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        layer = unet.get_submodule(name)
        a = torch.rand(rank, layer.in_features, generator=generator, dtype=torch.float64) - 0.5
        b = torch.randn(layer.out_features, rank, generator=generator, dtype=torch.float64)
        found[f"{name}.lora_A.default.weight"] = a / layer.in_features**0.5
        found[f"{name}.lora_B.default.weight"] = b * spread
    return found


def with_peft(
    unet: Any, names: Sequence[str], settings: Settings, values: Mapping[str, Tensor]
) -> None:
    """PEFT's own LoRA layers with some values."""
    from peft import LoraConfig, inject_adapter_in_model

    alpha: Any = settings.alpha
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(names))
    inject_adapter_in_model(config, unet)
    state = dict(unet.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)


def plain_loss(unet: Any, batch: Batch, settings: Settings, instances: int) -> Tensor:
    """DreamBooth's loss of a batch whose first samples are instances, the others of the prior."""
    predicted = unet(batch.noisy, batch.times, batch.prompts).sample
    loss = functional.mse_loss(predicted[:instances], batch.target[:instances])
    if len(predicted) > instances:
        prior = functional.mse_loss(predicted[instances:], batch.target[instances:])
        loss = loss + settings.prior_weight * prior
    return loss


def plain_training(
    unet: Any,
    settings: Settings,
    batches: Callable[[int, int], Batch],
    rate: Callable[[int], float],
) -> list[float]:
    """The losses of a training; the U-Net's LoRA is changed in place."""
    trained = [p for name, p in unet.named_parameters() if "lora_" in name]
    adam = torch.optim.Adam(trained, lr=settings.learning_rate)
    losses = []
    for step in range(settings.steps):
        adam.zero_grad()
        adam.param_groups[0]["lr"] = rate(step)
        total = 0.0
        for micro in range(settings.accumulate):
            loss = plain_loss(unet, batches(step, micro), settings, settings.batch_size)
            (loss / settings.accumulate).backward()
            total += float(loss.detach()) / settings.accumulate
        adam.step()
        losses.append(total)
    return losses
