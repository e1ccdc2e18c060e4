"""Steps of training against diffusers' documented LoRA example, and many LoRAs at once.

The example is written anew after huggingface/diffusers, ``examples/dreambooth`` and the
documentation on LoRA: PEFT's layers in the U-Net, accelerate, AdamW, pictures read and encoded in
every step. ``cached`` is the same with latents and embeddings at hand, so that what remains is the
engine. The example's clipping of gradients is left out, because lorafind has none.

All ways take turns, step by step, so that what else runs on the machine weighs on all alike.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lorafind.train.cache import Example, Prepared
from lorafind.train.engine import Engine
from lorafind.train.model import DTYPES, Base, lora_layers
from lorafind.train.settings import Settings
from tests.train import tiny

if TYPE_CHECKING:
    from tests.benchmarks.__main__ import Line

PICTURES = 6
AT_ONCE = 8


@dataclass(frozen=True)
class Size:
    """unet, vae: channels of their levels; context: width of prompts; heads: per attention."""

    unet: tuple[int, int, int, int]
    vae: tuple[int, int, int, int]
    context: int
    resolution: int
    steps: int


SIZES = {
    "tiny": Size((32, 64, 96, 96), (32, 32, 64, 64), 64, 64, 20),
    "mid": Size((128, 256, 512, 512), (64, 128, 192, 192), 64, 256, 4),
    "SD1.5": Size((320, 640, 1280, 1280), (128, 256, 512, 512), 768, 512, 20),
}


def train(place: Path, scale: float) -> Iterator[Line]:
    """Ratios at small sizes on a CPU, at SD1.5's shape in bf16 on a GPU."""
    cuda = torch.cuda.is_available()
    for name in ("SD1.5",) if cuda else ("tiny", "mid"):
        size = SIZES[name]
        settings = Settings(resolution=size.resolution, precision="bf16" if cuda else "fp32")
        steps = max(2, int(size.steps * scale))
        folder = tiny.paint(place / name, "rings", range(PICTURES))
        base = _base(size, settings, "cuda" if cuda else "cpu")
        yield from _against_the_example(name, base, settings, folder, steps)
        yield from _together(name, base, settings, steps)


def _against_the_example(
    name: str, base: Base, settings: Settings, folder: Path, steps: int
) -> Iterator[Line]:
    from tests.benchmarks.__main__ import Line

    prepared, fill = _prepare(base, settings, folder)
    ways = {
        "example": _example(base, settings, folder, prepared, cached=False),
        "cached": _example(base, settings, folder, prepared, cached=True),
    }
    with Engine.on(base, [(prepared, settings)]) as engine:
        took = _turns({"ours": _stepper(engine), **ways}, steps)
    samples = 2 * settings.batch_size
    yield Line(f"train, {name}: samples/s", f"{samples / took['ours']:.2f}", "")
    yield Line("… / diffusers' example", f"{took['example'] / took['ours']:.2f}", "≥ 1.3")
    yield Line(
        "… / the example with all in the cache", f"{took['cached'] / took['ours']:.2f}", "≥ 1.0"
    )
    yield Line("… filling the cache, per picture, in steps", f"{fill / took['ours']:.2f}", "")
    yield from _memory(base)


def _together(name: str, base: Base, settings: Settings, steps: int) -> Iterator[Line]:
    from tests.benchmarks.__main__ import Line

    goal = "≥ 3" if base.device.type == "cuda" else "≥ 1.3"
    for what, own in (
        ("", settings),
        (" without prior", replace(settings, prior_weight=0.0)),
    ):
        runs = [(_made_up(base, own, seed), replace(own, seed=seed)) for seed in range(AT_ONCE)]
        alone = copy.copy(base)
        alone.unet = copy.deepcopy(base.unet)
        with Engine.on(base, runs) as many, Engine.on(alone, runs[:1]) as one:
            took = _turns({"many": _stepper(many), "one": _stepper(one)}, max(2, steps // 2))
        ratio = AT_ONCE * took["one"] / took["many"]
        yield Line(f"--parallel {AT_ONCE} / {AT_ONCE} runs, {name}{what}", f"{ratio:.2f}", goal)
    yield from _memory(base)


def _memory(base: Base) -> Iterator[Line]:
    from tests.benchmarks.__main__ import Line

    if base.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        yield Line("… most memory so far, all ways side by side", f"{peak:.1f} GiB", "")


def _turns(ways: dict[str, Callable[[], None]], steps: int) -> dict[str, float]:
    """Median seconds of a step of each way, after one that warms up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(steps + 1):
        for way, step in ways.items():
            began = time.perf_counter()
            step()
            if turn:
                times[way].append(time.perf_counter() - began)
    return {way: statistics.median(some) for way, some in times.items()}


def _stepper(engine: Engine) -> Callable[[], None]:
    place = iter(range(10**9))

    def step() -> None:
        number = next(place)
        losses = engine.gradients(number)
        engine.update(number)
        losses.tolist()

    return step


# ---------------------------------------------------------------------------- models and pictures


def _base(size: Size, settings: Settings, device: str) -> Base:
    """Random weights; the U-Net in the precision, the encoders in float32."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    words = tiny.tokenizer()
    unet_kind: Any = UNet2DConditionModel
    vae_kind: Any = AutoencoderKL
    unet = unet_kind(
        sample_size=size.resolution // 8,
        block_out_channels=size.unet,
        cross_attention_dim=size.context,
        attention_head_dim=8,
    ).to(DTYPES[settings.precision])
    vae = vae_kind(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=size.resolution,
    )
    deep = size.context == 768
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=size.context,
            intermediate_size=4 * size.context,
            num_hidden_layers=12 if deep else 2,
            num_attention_heads=12 if deep else 1,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval().to(device)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Base(unet, vae, text_encoder, words, scheduler, "random", "0" * 64, "epsilon")


class _Pictures(Dataset[dict[str, torch.Tensor]]):
    """Pixels and tokens, read anew each time."""

    def __init__(self, folder: Path, tokenizer: Any, side: int) -> None:
        self._files, self._tokenizer, self._side = sorted(folder.glob("*.png")), tokenizer, side

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        with Image.open(self._files[i]) as picture:
            square = picture.convert("RGB").resize(
                (self._side, self._side), Image.Resampling.BILINEAR
            )
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 127.5 - 1
        caption = self._files[i].with_suffix(".txt").read_text()
        tokens = self._tokenizer(
            caption, truncation=True, padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids[0]
        return {"pixels": pixels, "tokens": tokens}


def _encode(base: Base, batch: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """The VAE's posterior and the prompts' embeddings."""
    with torch.no_grad():
        posterior = base.vae.encode(batch["pixels"].to(base.device, base.vae.dtype)).latent_dist
        return posterior, base.text_encoder(batch["tokens"].to(base.device))[0]


def _prepare(base: Base, settings: Settings, folder: Path) -> tuple[Prepared, float]:
    """The cache's contents, and the seconds that one picture took."""
    pictures = _Pictures(folder, base.tokenizer, settings.resolution)
    examples = []
    began = time.perf_counter()
    scale = base.vae.config.scaling_factor
    for i in range(len(pictures)):
        one = {key: tensor[None] for key, tensor in pictures[i].items()}
        posterior, prompts = _encode(base, one)
        mean, std = (posterior.mean[0] * scale).cpu(), (posterior.std[0] * scale).cpu()
        examples.append(Example(mean, std, prompts[0].cpu(), str(i)))
    took = (time.perf_counter() - began) / len(pictures)
    return Prepared(examples, examples, "", ["a picture"] * len(examples), "0" * 64), took


def _made_up(base: Base, settings: Settings, seed: int) -> Prepared:
    """Random numbers in place of pictures."""
    side, width = settings.resolution // 8, base.unet.config.cross_attention_dim
    random = torch.Generator().manual_seed(seed)
    examples = [
        Example(
            torch.randn(4, side, side, generator=random),
            torch.full((4, side, side), 0.01),
            torch.randn(77, width, generator=random),
            str(i),
        )
        for i in range(4)
    ]
    priors = examples if settings.prior_weight else []
    return Prepared(examples, priors, "", ["a picture"] * 4, str(seed))


# ---------------------------------------------------------------------------- the example


def _example(
    base: Base, settings: Settings, folder: Path, prepared: Prepared, cached: bool
) -> Callable[[], None]:
    """A step of the documented loop."""
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig

    half = settings.precision != "fp32"
    accelerator: Any = Accelerator(
        mixed_precision=settings.precision if half else "no", cpu=base.device.type == "cpu"
    )
    dtype = DTYPES[settings.precision]
    own = copy.copy(base)
    own.unet, own.vae, own.text_encoder = (
        copy.deepcopy(part).to(dtype) for part in (base.unet, base.vae, base.text_encoder)
    )
    unet: Any = own.unet
    alpha: Any = settings.alpha
    unet.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=lora_layers(unet, settings.groups),
        )
    )
    trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_scheduler("constant", optimizer=optimizer)
    pictures = _Pictures(folder, base.tokenizer, settings.resolution)
    loader = DataLoader(pictures, batch_size=settings.batch_size, shuffle=True)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    unet.train()

    def endless() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from loader

    batches = endless()
    scale = base.vae.config.scaling_factor
    # Instances and class images are one batch, as the example puts them together.
    held = [
        torch.stack([getattr(e, field) for e in prepared.instance]).to(base.device)
        for field in ("mean", "std", "prompt")
    ]

    def latents_and_prompts() -> tuple[torch.Tensor, torch.Tensor]:
        if cached:
            chosen = torch.randint(len(held[0]), (2 * settings.batch_size,))
            mean, std, prompts = (tensor[chosen] for tensor in held)
            return mean + std * torch.randn_like(mean), prompts
        first, second = next(batches), next(batches)
        both = {key: torch.cat([first[key], second[key]]) for key in first}
        posterior, prompts = _encode(own, both)
        return posterior.sample() * scale, prompts

    def step() -> None:
        with accelerator.accumulate(unet):
            latents, prompts = latents_and_prompts()
            noise = torch.randn_like(latents)
            kinds = base.scheduler.config.num_train_timesteps
            times = torch.randint(0, kinds, (len(latents),), device=latents.device).long()
            noisy = base.scheduler.add_noise(latents, noise, times)
            predicted = unet(
                noisy.to(dtype), times, encoder_hidden_states=prompts.to(dtype), return_dict=False
            )[0]
            (mine, prior), (target, other) = predicted.chunk(2), noise.chunk(2)
            loss = functional.mse_loss(mine.float(), target.float())
            loss = loss + settings.prior_weight * functional.mse_loss(prior.float(), other.float())
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        loss.detach().item()

    return step
