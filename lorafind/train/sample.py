"""Pictures that show how far a training is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafind.files.whole import whole
from lorafind.train.model import Base, quiet
from lorafind.train.problem import TrainProblem

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = 25
GUIDANCE = 7.5


class Sampler:
    """Draws one picture per prompt with the U-Net as it is at that moment.

    base: with VAE and text encoder; side: of the pictures, pixels. Raises TrainProblem where the
    encoders were dropped.
    """

    def __init__(self, base: Base, prompts: Sequence[str], side: int) -> None:
        with quiet():
            from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
        if base.vae is None or base.text_encoder is None:
            raise TrainProblem("Sample pictures need the VAE and the text encoder of the base.")
        self._base, self._prompts, self._side = base, prompts, side
        pipeline: Any = StableDiffusionPipeline
        self._pipeline = pipeline(
            vae=base.vae,
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
            unet=base.unet,
            scheduler=DPMSolverMultistepScheduler.from_config(base.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        with torch.no_grad():
            self._encoded = [
                self._pipeline.encode_prompt(prompt, base.device, 1, True) for prompt in prompts
            ]

    def draw(self, seed: int) -> list[Image]:
        """A picture per prompt, the seed one higher for each; at every step the same noise."""
        return [self._draw(i, seed + i) for i in range(len(self._prompts))]

    def write(self, folder: Path, name: str, seed: int) -> None:
        """PNGs ``<name>-<number>.png`` with prompt and seed inside, as A1111 writes them."""
        from PIL.PngImagePlugin import PngInfo

        folder.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(self.draw(seed)):
            said = PngInfo()
            said.add_text(
                "parameters",
                f"{self._prompts[i]}\nSteps: {STEPS}, Sampler: DPM++ 2M, CFG scale: {GUIDANCE}, "
                f"Seed: {seed + i}, Size: {self._side}x{self._side}",
            )
            with whole(folder / f"{name}-{i + 1}.png") as part:
                picture.save(part, "PNG", pnginfo=said)

    @torch.no_grad()
    def _draw(self, i: int, seed: int) -> Image:
        unet, vae = self._base.unet, self._base.vae
        prompt, negative = (part.to(unet.dtype) for part in self._encoded[i])
        latents: Tensor = self._pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            height=self._side,
            width=self._side,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        picture: Any = self._pipeline.image_processor.postprocess(decoded)[0]
        return picture
