"""What a step is judged by: noise, times, targets and weights.

Denoising loss: Ho et al. 2020, equation 14. Prior preservation: DreamBooth (Ruiz et al. 2023),
equation 2. min-SNR: Hang et al. 2023, section 3.4. Offset noise: N. Guttenberg, "Diffusion with
Offset Noise", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafind.train.cache import Example, Prepared
from lorafind.train.randomness import generator, pick
from lorafind.train.settings import Settings


@dataclass(frozen=True)
class Batch:
    """S samples, on one device.

    noisy, target: S × 4 × h × w; times: S, int64; prompts: S × 77 × c; weights: S, of the samples'
    mean squared errors, so that their weighted sum is the loss. All but ``times`` have one dtype.
    """

    noisy: Tensor
    times: Tensor
    prompts: Tensor
    target: Tensor
    weights: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """What goes into the U-Net in its dtype, what it is compared with as it is."""
        return Batch(
            self.noisy.to(device, dtype, non_blocking=True),
            self.times.to(device, non_blocking=True),
            self.prompts.to(device, dtype, non_blocking=True),
            self.target.to(device, non_blocking=True),
            self.weights.to(device, non_blocking=True),
        )


def draw(
    scheduler: Any,
    prepared: Prepared,
    settings: Settings,
    step: int,
    micro: int,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """The batch of a forward pass: ``batch_size`` instances, then as many of the prior.

    scheduler: DDPMScheduler; step, micro: from 0, of the optimiser and of the pass within its step;
    the batch is a function of these, of the seed and of the examples alone. Computed in ``dtype``
    on the CPU.
    """
    count, seed = settings.batch_size, settings.seed
    start = (step * settings.accumulate + micro) * count
    examples = _examples(prepared.instance, seed, "instance", start, count)
    if prepared.prior:
        examples += _examples(prepared.prior, seed, "prior", start, count)
    mean, std, prompts = (
        torch.stack([getattr(e, field) for e in examples]).to(dtype)
        for field in ("mean", "std", "prompt")
    )
    random = generator(seed, "batch", step, micro)
    shape, size = mean.shape, len(examples)
    latents = mean + std * torch.randn(shape, generator=random).to(dtype)
    noise = torch.randn(shape, generator=random).to(dtype)
    if settings.offset_noise:
        offset = torch.randn(size, shape[1], 1, 1, generator=random).to(dtype)
        noise = noise + settings.offset_noise * offset
    kinds = scheduler.config.num_train_timesteps
    times = torch.randint(kinds, (size,), generator=random)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, times) if velocity else noise
    weights = torch.full((size,), 1 / count, dtype=dtype)
    weights[count:] *= settings.prior_weight
    if settings.min_snr is not None:
        weights *= min_snr(scheduler.alphas_cumprod[times].to(dtype), settings.min_snr, velocity)
    return Batch(scheduler.add_noise(latents, noise, times), times, prompts, target, weights)


def min_snr(alphas: Tensor, gamma: float, velocity: bool) -> Tensor:
    """Weights of the squared error at some times; alphas: ᾱ there.

    With SNR = ᾱ/(1 − ᾱ): min(SNR, γ)/SNR for models that predict the noise, min(SNR, γ)/(SNR + 1)
    for those that predict v. At SNR = 0 the first is its limit, 1.
    """
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / (snr + 1) if velocity else (gamma / snr).clamp(max=1)


def together(batches: Sequence[Batch]) -> Batch:
    """The batches of several runs, one after the other."""
    return Batch(
        *(
            torch.cat([getattr(batch, field) for batch in batches])
            for field in ("noisy", "times", "prompts", "target", "weights")
        )
    )


def losses(predicted: Tensor, batch: Batch, runs: int) -> Tensor:
    """The loss of every run, N: the samples' weighted mean squared errors, summed.

    predicted: S × 4 × h × w, the runs one after the other; computed in the dtype of the target.
    """
    errors = (predicted.to(batch.target.dtype) - batch.target).square().mean((1, 2, 3))
    return (errors * batch.weights).unflatten(0, (runs, -1)).sum(1)


def _examples(
    examples: Sequence[Example], seed: int, what: str, start: int, count: int
) -> list[Example]:
    return [examples[i] for i in pick(seed, what, start, count, len(examples))]
