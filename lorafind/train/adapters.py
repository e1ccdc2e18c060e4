"""LoRAs in a U-Net, their numbers in one piece of memory.

Optimiser, moving average, checkpoint and gradient reset are then one operation each instead of one
per tensor, and several LoRAs differ by a row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafind.train.parallel import AdaptedLinear, Choice, StackedLinear
from lorafind.train.randomness import generator

if TYPE_CHECKING:
    from peft.tuners.lora import Linear


class Factors(NamedTuple):
    """ΔW = alpha/r · B·A of one layer: name as in the U-Net, A: r × i, B: o × r."""

    name: str
    a: Tensor
    b: Tensor


class Adapters:
    """N LoRAs of rank r in one U-Net, from :func:`inject` until :meth:`remove`.

    names: of the adapted layers; values, gradients: N × parameters, float32 (float64 for a U-Net of
    float64), on the U-Net's device: for every layer A and then B. The layers' parameters are views
    of the first, and autograd adds to the second.
    """

    def __init__(
        self, unet: nn.Module, names: Sequence[str], rank: int, alpha: float, count: int
    ) -> None:
        self.unet, self.names, self.rank, self.alpha = unet, tuple(names), rank, alpha
        self.layers = {name: _linear(unet, name) for name in names}
        first = next(iter(self.layers.values())).weight
        size = sum(rank * (m.in_features + m.out_features) for m in self.layers.values())
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.values = torch.zeros(count, size, dtype=dtype, device=first.device)
        self.gradients = torch.zeros_like(self.values)
        self._choice = Choice()

    @property
    def count(self) -> int:
        """N."""
        return len(self.values)

    def views(self, rows: Tensor) -> Iterator[Factors]:
        """Of N × parameters: for every layer A, N × r × i, and B, N × o × r."""
        start = 0
        for name, layer in self.layers.items():
            middle = start + self.rank * layer.in_features
            end = middle + self.rank * layer.out_features
            yield Factors(
                name,
                rows[:, start:middle].unflatten(1, (self.rank, layer.in_features)),
                rows[:, middle:end].unflatten(1, (layer.out_features, self.rank)),
            )
            start = end

    def factors(self, row: Tensor) -> list[Factors]:
        """The layers of one LoRA, from its row of ``values`` or of something like it."""
        return [Factors(name, a[0], b[0]) for name, a, b in self.views(row[None])]

    def only(self, one: int) -> AbstractContextManager[None]:
        """While it lasts, all samples go through one LoRA, whatever their number."""
        return self._choice.only(one)

    def remove(self) -> None:
        """Give the U-Net its own layers back."""
        for name, layer in self.layers.items():
            self.unet.set_submodule(name, layer)
        if hasattr(self.unet, "peft_config"):
            del self.unet.peft_config


def inject(
    unet: nn.Module, names: Sequence[str], rank: int, alpha: float, seeds: Sequence[int]
) -> Adapters:
    """Put one LoRA per seed into the linear layers of some names.

    A starts uniform in ±1/√i, as PEFT and kohya draw it, from the LoRA's seed and the layer's name;
    B at 0. One alone is put in by PEFT, several as :class:`StackedLinear`.
    """
    adapters = Adapters(unet, names, rank, alpha, len(seeds))
    for name, a, _ in adapters.views(adapters.values):
        for j, seed in enumerate(seeds):
            start = torch.empty(a.shape[1:], dtype=torch.float32)
            nn.init.kaiming_uniform_(start, math.sqrt(5), generator=generator(seed, "A", name))
            a[j] = start
    if len(seeds) == 1:
        _with_peft(adapters)
    else:
        stack(adapters)
    return adapters


def stack(adapters: Adapters) -> None:
    """Put LoRAs into the U-Net as :class:`StackedLinear`, whatever their number."""
    for name, a, b in adapters.views(adapters.values):
        layer, scale = adapters.layers[name], adapters.alpha / adapters.rank
        adapters.unet.set_submodule(name, StackedLinear(layer, a, b, scale, adapters._choice))
    _collect(adapters)


def backward(loss: Tensor) -> None:
    """Add the gradients of a loss, a scalar, to those of the LoRAs."""
    with warnings.catch_warnings():
        # A LoRA's gradients lie together, not those of a layer; torch suspects that to be slow.
        warnings.filterwarnings("ignore", "grad and param do not obey")
        loss.backward()


def _collect(adapters: Adapters) -> None:
    """From now on autograd adds to ``gradients``."""
    for name, a, b in adapters.views(adapters.gradients):
        low, high = _parameters(adapters.unet.get_submodule(name))
        low.grad, high.grad = a.view(low.shape), b.view(high.shape)


def _with_peft(adapters: Adapters) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=adapters.rank,
        # PEFT says int, and divides it by r.
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]
        target_modules=list(adapters.names),
    )
    config._register_custom_module({nn.Linear: _fused()})
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, adapters.unet)
    for name, a, b in adapters.views(adapters.values):
        layer: Any = adapters.unet.get_submodule(name)
        layer.lora_A["default"].weight = nn.Parameter(a[0])
        layer.lora_B["default"].weight = nn.Parameter(b[0])
    _collect(adapters)


def _fused() -> type[Linear]:
    """PEFT's layer with the products of :class:`AdaptedLinear`."""
    from peft.tuners.lora import Linear

    class FusedLinear(Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            low, high = _parameters(self)
            base, scale = self.base_layer, self.scaling["default"]
            y: Tensor = AdaptedLinear.apply(x, base.weight, base.bias, low[None], high[None], scale)
            return y

    return FusedLinear


def _parameters(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B of an adapted layer, with or without a first axis of N."""
    if isinstance(layer, StackedLinear):
        return layer.lora_A, layer.lora_B
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _linear(unet: nn.Module, name: str) -> nn.Linear:
    layer = unet.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name} is no linear layer but {type(layer).__name__}")
    return layer
