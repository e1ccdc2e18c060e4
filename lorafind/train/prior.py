"""Class images for prior preservation: given, or made once with the base model.

DreamBooth (Ruiz et al., arXiv 2208.12242, section 3.3): what the model shows for the class's name
before it is trained, so that it goes on to show it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafind.index.progress import Progress
from lorafind.train.cache import VERSION, digest, embed, fingerprint, write
from lorafind.train.captions import Gathered, gather
from lorafind.train.images import Picture, decode
from lorafind.train.model import Base, quiet
from lorafind.train.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

#: DPM-Solver++ (Lu et al., arXiv 2211.01095) of second order.
STEPS = 25
GUIDANCE = 7.5
#: Images made at a time on a GPU; one on a CPU, where a larger batch gains nothing.
BATCH = 4


def class_pictures(base: Base, settings: Settings, cache: Path, watch: Progress) -> Gathered:
    """The class images of a training, with what is to be said of them.

    Made ones lie in ``class/<key>/<number>.png`` of the cache, where the key is the base's weights,
    the prompt, the size and the way of sampling. Image n comes from noise of its own, so that a run
    that was interrupted goes on, and one that wants more makes only those that are missing. They
    hang neither on the training's seed nor on its precision: once made, they are data.

    Raises TrainProblem where given ones cannot be read, OSError where the cache cannot be written.
    """
    side = settings.resolution
    if settings.class_images is not None:
        return gather([settings.class_images], "none", resolution=side, watch=watch)
    parts = [fingerprint(part) for part in (base.vae, base.text_encoder) if part is not None]
    way = [VERSION, base.sha256, *parts, base.prediction_type]
    folder = cache / "class" / digest(*way, settings.prior_prompt, side, STEPS, GUIDANCE)
    files = [folder / f"{number:05}.png" for number in range(settings.class_count)]
    missing = [n for n, file in enumerate(files) if not _readable(file)]
    watch.stage("Class images", len(missing), 0)
    size = BATCH if base.device.type == "cuda" else 1
    for start in range(0, len(missing), size):
        numbers = missing[start : start + size]
        for number, image in zip(numbers, _paint(base, settings, numbers), strict=True):
            content = io.BytesIO()
            image.save(content, "PNG")
            write(files[number], content.getvalue())
        watch.advance(len(numbers), 0)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return Gathered([Picture(f, "", d, side, side) for f, d in zip(files, digests, strict=True)])


def noise(number: int, side: int) -> torch.Tensor:
    """What class image ``number`` begins with, 1 × 4 × side/8 × side/8 float32, the same
    everywhere."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1, 4, side // 8, side // 8, generator=generator)


@torch.inference_mode()
def _paint(base: Base, settings: Settings, numbers: Sequence[int]) -> list[Image]:
    vae, side = base.vae, settings.resolution
    if vae is None:
        raise ValueError("the base's VAE was dropped already")
    dtype, device = base.unet.dtype, base.device
    with quiet():
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
        from diffusers.image_processor import VaeImageProcessor

        # Without the text encoder, whose dtype the pipeline would take for its own.
        pipeline: Any = StableDiffusionPipeline(
            vae,
            None,
            None,
            base.unet,
            DPMSolverMultistepScheduler.from_config(base.scheduler.config),
            None,
            None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        said, unsaid = (
            embed(base, text).to(device, dtype).expand(len(numbers), -1, -1)
            for text in (settings.prior_prompt, "")
        )
        latents = pipeline(
            prompt_embeds=said,
            negative_prompt_embeds=unsaid,
            latents=torch.cat([noise(n, side) for n in numbers]).to(device, dtype),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=side,
            width=side,
            output_type="latent",
        ).images
    # One by one and in the VAE's own float32: half precision overflows in some.
    images = [vae.decode(row[None].float() / vae.config.scaling_factor).sample for row in latents]
    return VaeImageProcessor().postprocess(torch.cat(images), "pil")


def _readable(file: Path) -> bool:
    try:
        decode(file.read_bytes())
    except (OSError, ValueError):
        return False
    return True
