"""What a training needs before it begins: numbers, memory, time.

Memory is found by going through a whole step on the meta device, where tensors have shapes but no
contents, and counting what lives at the same time: the same code, for any batch, resolution,
precision, number of LoRAs and with or without checkpointing, in a few seconds.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lorafind.train.adapters import Adapters, backward, stack
from lorafind.train.cache import Example, Prepared
from lorafind.train.engine import Engine
from lorafind.train.memory import enough_memory
from lorafind.train.model import DTYPES, Base, lora_layers, quiet
from lorafind.train.settings import Settings

#: Bytes that Python, torch and diffusers take by themselves, with the working space of convolutions
#: and of attention on a CPU (measured at the shape of SD1.5, with and without checkpointing).
PROGRAM = 1 << 30
#: Words in a prompt.
_WORDS = 77


@dataclass(frozen=True)
class Estimate:
    """Of one training, or of several at once. All sizes in bytes.

    layers, parameters: adapted and trained per LoRA; weights: of the frozen U-Net; adapters: all
    LoRAs; gradients; optimizer: its moments and moving averages; activations: the most that lives
    at once in a step beside these; encoders: VAE and text encoder, where they are needed for sample
    pictures; program: everything else.
    """

    layers: int
    parameters: int
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    encoders: int
    program: int = PROGRAM

    @property
    def memory(self) -> int:
        """The sum, bytes."""
        sizes = (self.weights, self.adapters, self.gradients, self.optimizer)
        return sum(sizes) + self.activations + self.encoders + self.program


def estimate(
    base: Base | Mapping[str, Any], settings: Settings, runs: int = 1, prior: bool = True
) -> Estimate:
    """Parameters and memory of a training.

    base: a base model, or the configuration of a U-Net that was not loaded yet; runs: LoRAs at
    once; prior: there are class images.
    """
    from diffusers import UNet2DConditionModel

    config = base.unet.config if isinstance(base, Base) else base
    dtype = base.unet.dtype if isinstance(base, Base) else DTYPES[settings.precision]
    model: Any = UNet2DConditionModel
    with torch.device("meta"):
        with quiet():
            unet = model.from_config(dict(config)).to(dtype).requires_grad_(False).eval()
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing(_checkpoint)
        names = lora_layers(unet, settings.groups)
        adapters = Adapters(unet, names, settings.rank, settings.alpha, runs)
        stack(adapters)
        samples = runs * settings.batch_size * (2 if prior and settings.prior_weight else 1)
        activations = _step(unet, adapters, samples, settings.resolution // 8, dtype)
    values = adapters.values.nbytes
    # Moments in eight bits have a scale per block besides.
    moments = values // 2 if settings.optimizer == "adam8bit" else 2 * values
    means = values if settings.ema is not None else 0
    encoders = 0
    if settings.sample_prompts and isinstance(base, Base):
        parts = (part for part in (base.vae, base.text_encoder) if part is not None)
        encoders = sum(p.nbytes for part in parts for p in part.parameters())
    return Estimate(
        layers=len(names),
        parameters=adapters.values.shape[1],
        weights=sum(layer.nbytes for layer in unet.parameters() if not layer.requires_grad),
        adapters=values,
        gradients=adapters.gradients.nbytes,
        optimizer=moments + means,
        activations=activations,
        encoders=encoders,
    )


def seconds_per_step(
    base: Base, settings: Settings, runs: int = 1, prior: bool = True, steps: int = 2
) -> float:
    """The time of a step, measured on examples of random numbers after a first step that warms up.

    The base model is as it was afterwards. Raises TrainProblem where the memory does not suffice.
    """
    side, width = settings.resolution // 8, base.unet.config.cross_attention_dim
    example = Example(
        torch.zeros(4, side, side), torch.ones(4, side, side), torch.ones(_WORDS, width), ""
    )
    some = [example] * settings.batch_size
    made_up = Prepared(some, some if prior and settings.prior_weight else [], "", [""], "")
    settings = replace(settings, steps=steps + 1, warmup=0, compile=False)
    began = 0.0
    several = [(made_up, settings)] * runs
    with enough_memory(settings, runs), Engine.on(base, several) as engine:
        for step in range(steps + 1):
            losses = engine.gradients(step)
            engine.update(step)
            # Reading a number waits for the device.
            losses.tolist()
            if step == 0:
                began = time.perf_counter()
    return (time.perf_counter() - began) / steps


def _step(unet: Any, adapters: Adapters, samples: int, side: int, dtype: torch.dtype) -> int:
    """The most bytes that a step's own tensors take at once."""
    meter = _Meter([*unet.parameters(), *unet.buffers(), adapters.values, adapters.gradients])
    with _Attention(), meter:
        noisy = torch.empty(samples, 4, side, side, dtype=dtype)
        prompts = torch.empty(samples, _WORDS, unet.config.cross_attention_dim, dtype=dtype)
        times = torch.empty(samples, dtype=torch.int64)
        predicted = unet(noisy, times, prompts, return_dict=False)[0]
        backward(predicted.float().square().mean())
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as these live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, object] = {t.untyped_storage()._cdata: t for t in known}
        self._bytes = self.peak = 0

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)


class _Attention(TorchFunctionMode):
    """Attention without its matrix, which the meta device would write out as no other does."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _Flash.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def _checkpoint(block: Callable[..., Any], *args: Any) -> Any:
    """As diffusers does it; a mode ends where the backward pass begins, so it is entered anew."""
    return checkpoint(
        block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _Attention())
    )


class _Flash(torch.autograd.Function):
    """Keeps what fused attention keeps: query, key, value, result, and one number per place."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])
