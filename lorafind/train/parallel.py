"""A frozen linear layer with one or several LoRAs, and many LoRAs in one pass through a U-Net.

The samples of a batch lie in as many equal blocks as there are LoRAs; block j goes through LoRA j,
by batched matrix products, while the frozen layer sees one batch. No sample meets another anywhere
in the U-Net, so every LoRA gets just the gradient that it would get alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class AdaptedLinear(torch.autograd.Function):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, the LoRA's part added within the product that makes it.

    x: M × … × i, M a multiple of N; W: o × i and b: o, frozen; A: N × r × i; B: N × o × r. Composed
    of plain operations it would pass over tensors of y's size three times more.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, a: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        """y: M × … × o, in the dtype of x and W; A and B are rounded to it."""
        n, dtype = len(a), x.dtype
        low, high = a.to(dtype), up.to(dtype)
        y = functional.linear(x, w, b)
        hidden = torch.bmm(x.reshape(n, -1, x.shape[-1]), low.mT) * scale
        y.view(n, -1, y.shape[-1]).baddbmm_(hidden, high.mT)
        ctx.save_for_backward(x, w, low, high, hidden)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by x, A and B."""
        x, w, low, high, hidden = ctx.saved_tensors
        dy = gradients[0].reshape(len(low), -1, gradients[0].shape[-1])
        inner = torch.bmm(dy, high) * ctx.scale
        by_up = torch.bmm(dy.mT, hidden)
        by_a = torch.bmm(inner.mT, x.reshape(len(low), -1, x.shape[-1]))
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = functional.linear(gradients[0], w.t())
            by_x.view(len(low), -1, x.shape[-1]).baddbmm_(inner, low)
        return by_x, None, None, by_a, by_up, None


class Choice:
    """Through which of several LoRAs a batch goes; None: in equal blocks through all."""

    def __init__(self) -> None:
        self.one: int | None = None

    @contextmanager
    def only(self, one: int) -> Iterator[None]:
        """The whole batch goes through one of them."""
        self.one = one
        try:
            yield
        finally:
            self.one = None


class StackedLinear(nn.Module):
    """A frozen linear layer and N LoRAs: lora_A is N × r × i, lora_B N × o × r."""

    def __init__(
        self, base_layer: nn.Linear, a: Tensor, b: Tensor, scale: float, choice: Choice
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.scale = scale
        self._choice = choice

    def forward(self, x: Tensor) -> Tensor:
        """x: M × … × i → M × … × o."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if self._choice.one is not None:
            one = slice(self._choice.one, self._choice.one + 1)
            a, b = a[one], b[one]
        base = self.base_layer
        y: Tensor = AdaptedLinear.apply(x, base.weight, base.bias, a, b, self.scale)
        return y
