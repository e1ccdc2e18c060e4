"""One step of training: gradients, then the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lorafind.train import loss
from lorafind.train.adapters import Adapters, Factors, backward, inject
from lorafind.train.cache import Prepared
from lorafind.train.checkpoint import State
from lorafind.train.ema import average
from lorafind.train.memory import memory_kept
from lorafind.train.model import Base, lora_layers
from lorafind.train.optimizer import optimizer, rate
from lorafind.train.settings import Settings


class Engine:
    """N LoRAs in a base model's U-Net, with an optimiser, a gradient scaler and a mean for each.

    runs: with settings alike in all but seed and words; adapters: as :func:`inject` made them.
    """

    def __init__(
        self, base: Base, runs: Sequence[tuple[Prepared, Settings]], adapters: Adapters
    ) -> None:
        self.base, self.runs, self.adapters = base, runs, adapters
        self.settings = settings = runs[0][1]
        # diffusers walks through the whole U-Net to tell these.
        self._device, self._unet_dtype = device, dtype = base.device, base.unet.dtype
        self._dtype = torch.promote_types(dtype, torch.float32)
        self._optimizers = []
        for (_, own), row, gradient in zip(runs, adapters.values, adapters.gradients, strict=True):
            row.grad = gradient
            self._optimizers.append(optimizer(own, row))
        half = dtype is torch.float16
        self._scalers = [torch.amp.GradScaler(device.type, enabled=half) for _ in runs]
        self._means = adapters.values.clone() if settings.ema is not None else None
        self._unet: Any = torch.compile(base.unet) if settings.compile else base.unet

    @classmethod
    @contextmanager
    def on(cls, base: Base, runs: Sequence[tuple[Prepared, Settings]]) -> Iterator[Engine]:
        """With fresh LoRAs in the U-Net, which is as it was when the block ends."""
        settings = runs[0][1]
        names = lora_layers(base.unet, settings.groups)
        seeds = [own.seed for _, own in runs]
        adapters = inject(base.unet, names, settings.rank, settings.alpha, seeds)
        with ExitStack() as after:
            after.enter_context(memory_kept(base.device))
            after.callback(adapters.remove)
            if settings.gradient_checkpointing:
                base.unet.enable_gradient_checkpointing()
                after.callback(base.unet.disable_gradient_checkpointing)
            yield cls(base, runs, adapters)

    def gradients(self, step: int) -> Tensor:
        """Fill the gradients for a step (from 0); returns the losses, N, on the U-Net's device."""
        self.adapters.gradients.zero_()
        passes = self.settings.accumulate
        total = torch.zeros(len(self.runs), dtype=self._dtype, device=self._device)
        for micro in range(passes):
            drawn = [
                loss.draw(self.base.scheduler, prepared, own, step, micro, self._dtype)
                for prepared, own in self.runs
            ]
            batch = loss.together(drawn).to(self._device, self._unet_dtype)
            predicted = self._unet(batch.noisy, batch.times, batch.prompts, return_dict=False)[0]
            found = loss.losses(predicted, batch, len(self.runs)) / passes
            scaled = [scaler.scale(one) for scaler, one in zip(self._scalers, found, strict=True)]
            backward(torch.stack(scaled).sum())
            total += found.detach()
        return total

    def update(self, step: int) -> None:
        """Move the LoRAs by their gradients."""
        for (_, own), scaler, one in zip(self.runs, self._scalers, self._optimizers, strict=True):
            one.param_groups[0]["lr"] = rate(own, step)
            scaler.step(one)
            scaler.update()
        if self._means is not None and self.settings.ema is not None:
            average(self._means, self.adapters.values, self.settings.ema, step)

    def result(self, j: int) -> list[Factors]:
        """LoRA j as it is to be saved: its moving average where there is one."""
        rows = self.adapters.values if self._means is None else self._means
        return self.adapters.factors(rows[j])

    @contextmanager
    def showing(self, j: int) -> Iterator[None]:
        """While it lasts, the U-Net gives pictures as with LoRA j's result alone."""
        row = self.adapters.values[j]
        before = row.clone()
        if self._means is not None:
            row.copy_(self._means[j])
        try:
            with self.adapters.only(j):
                yield
        finally:
            row.copy_(before)

    def state(self, j: int, step: int, losses: Sequence[float], saved: Sequence[str]) -> State:
        """All of LoRA j that the next steps hang on."""
        mean = None if self._means is None else self._means[j].to("cpu", copy=True)
        return State(
            step,
            self.adapters.values[j].to("cpu", copy=True),
            mean,
            self._optimizers[j].state_dict(),
            self._scalers[j].state_dict(),
            list(losses),
            list(saved),
        )

    def restore(self, j: int, state: State) -> None:
        """Put LoRA j where it was when its state was taken."""
        self.adapters.values[j] = state.values
        if self._means is not None and state.mean is not None:
            self._means[j] = state.mean
        self._optimizers[j].load_state_dict(state.optimizer)
        self._scalers[j].load_state_dict(state.scaler)
