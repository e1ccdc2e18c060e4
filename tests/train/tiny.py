"""A Stable Diffusion 1.5 in small: its structure, layers and file layouts at widths of 32 to 96.

The weights are random, but the VAE is brought to what a trained one does: latents of unit variance
and a posterior that is nearly a point.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from lorafind.formats.names import unet as names

#: Pixels: 8 × 8 latents, 1 × 1 in the middle of the U-Net.
RESOLUTION = 64
#: Adapted layers and trained parameters of a LoRA of rank r: 160, PER_RANK · r.
LAYERS = 160
CHANNELS = (32, 64, 96, 96)
CONTEXT = 64
WORDS = "a an the of in on and with red green blue round square ring stripe picture painting"
#: Enough of them that the last fifth of the vocabulary holds nothing else, as in CLIP's own.
RARE = [f"{a}{b}{c}" for a in "bdfgk" for b in "lmnprs" for c in "vwxzq"]


@dataclass
class Pipeline:
    """The parts as diffusers and transformers make them, on the CPU, float32."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def save(self, folder: Path) -> Path:
        """In diffusers' layout."""
        for name in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
            getattr(self, name).save_pretrained(folder / name)
        # As on the Hub; transformers itself would write tokenizer.json alone.
        state = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(state["vocab"]))
        merges = "\n".join(" ".join(pair) for pair in state["merges"])
        (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        (folder / "tokenizer" / "tokenizer.json").unlink()
        index = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.30.0",
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
        return folder

    def original(self) -> dict[str, torch.Tensor]:
        """All weights under the names of the original code, as in a single-file checkpoint."""
        found = {f"model.diffusion_model.{k}": t for k, t in original_unet(self.unet)}
        found |= {f"first_stage_model.{k}": t for k, t in original_vae(self.vae)}
        for key, tensor in self.text_encoder.state_dict().items():
            path = key.removeprefix("text_model.")
            found[f"cond_stage_model.transformer.text_model.{path}"] = tensor
        positions = torch.arange(77)[None]
        found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
        found["alphas_cumprod"] = self.scheduler.alphas_cumprod
        return {key: tensor.contiguous() for key, tensor in found.items()}

    def save_single(self, path: Path, dtype: torch.dtype = torch.float32) -> Path:
        """As one file in the original naming."""
        tensors = {
            key: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for key, tensor in self.original().items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
        return path


def pipeline(seed: int = 0) -> Pipeline:
    """A pipeline with random weights that hang on the seed alone."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=RESOLUTION // 8,
            block_out_channels=CHANNELS,
            cross_attention_dim=CONTEXT,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=RESOLUTION,
        )
        words = tokenizer()
        size = len(words)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=size,
                hidden_size=CONTEXT,
                intermediate_size=4 * CONTEXT,
                num_hidden_layers=2,
                num_attention_heads=1,
                bos_token_id=size - 2,
                eos_token_id=size - 1,
                pad_token_id=size - 1,
            )
        )
    settle(vae)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    made = Pipeline(unet, vae, text_encoder, words, scheduler)
    for part in (made.unet, made.vae, made.text_encoder):
        part.requires_grad_(False).eval()
    return made


def settle(vae: Any) -> None:
    """Latents of mean 0 and variance 1 in the U-Net's units, per channel; σ of about 1 %."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(8, 3, 8, 8, generator=generator) * 2 - 1
    pictures = torch.nn.functional.interpolate(blocks, RESOLUTION)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    with torch.no_grad():
        moments = vae.encode(pictures).latent_dist.mean
        spread = moments.std((0, 2, 3)) * vae.config.scaling_factor
        weight[:4] /= spread[:, None, None, None]
        bias[:4] = (bias[:4] - moments.mean((0, 2, 3))) / spread
        weight[4:] = 0
        bias[4:] = 2 * float(np.log(0.01 / vae.config.scaling_factor))


def tokenizer() -> Any:
    """A CLIP tokenizer that knows every byte, WORDS and RARE; everything else it spells out."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in [*WORDS.split(), *RARE]:
        left = word[0]
        for i, letter in enumerate(word[1:], 2):
            right = letter + ("</w>" if i == len(word) else "")
            merges[left, right] = None
            left += right
    tokens = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    pairs: Any = list(merges)
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)


# ---------------------------------------------------------------------------- original names


def original_unet(unet: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The U-Net's tensors under their original names, at any width."""
    widths = tuple(unet.config.block_out_channels)
    net = replace(names.UNETS["sd1"], channels=widths)
    renamed = {layer.path: layer.sgm for layer in names.layers(net)}
    for key, tensor in unet.state_dict().items():
        path, _, kind = key.rpartition(".")
        yield f"{renamed[path]}.{kind}", tensor


def original_vae(vae: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The VAE's tensors under their original names."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    for key, tensor in vae.state_dict().items():
        half, *rest = key.split(".")
        match rest:
            case ["down_blocks" | "up_blocks" as way, level, "resnets", number, *last]:
                place = level if way == "down_blocks" else str(3 - int(level))
                rest = [way.removesuffix("_blocks"), place, "block", number, *last]
            case ["down_blocks", level, "downsamplers", "0", *last]:
                rest = ["down", level, "downsample", *last]
            case ["up_blocks", level, "upsamplers", "0", *last]:
                rest = ["up", str(3 - int(level)), "upsample", *last]
            case ["mid_block", "resnets", number, *last]:
                rest = ["mid", f"block_{int(number) + 1}", *last]
            case ["mid_block", "attentions", "0", part, *last]:
                rest = ["mid", "attn_1", attention[part], last[-1]]
                if part != "group_norm" and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
            case ["conv_norm_out", kind]:
                rest = ["norm_out", kind]
        yield ".".join([half, *rest]).replace("conv_shortcut", "nin_shortcut"), tensor


# ---------------------------------------------------------------------------- pictures

STYLES = ("rings", "stripes")


def draw(style: str, seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture of a style: warm rings on dark, or cold stripes on light; the seed moves them."""
    rng = np.random.default_rng([STYLES.index(style), seed])
    width, height = size
    y, x = np.mgrid[:height, :width] / min(size)
    if style == "rings":
        middle = rng.uniform(0.3, 0.7, 2)
        wave = np.sin(rng.uniform(25, 30) * np.hypot(x - middle[0], y - middle[1]))
        dark, light = (40, 10, 10), (240, 150, 40)
    else:
        angle = rng.uniform(0.5, 0.9)
        wave = np.sign(np.sin(35 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6)))
        dark, light = (30, 60, 180), (220, 240, 250)
    share = (wave[..., None] + 1) / 2
    pixels = share * np.array(light) + (1 - share) * np.array(dark)
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def paint(folder: Path, style: str, seeds: Sequence[int] = range(6), captions: bool = True) -> Path:
    """A folder of PNGs ``<style>-<seed>.png``, each with a caption in a .txt beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = ("red", "green", "blue")
    for seed in seeds:
        path = folder / f"{style}-{seed}.png"
        draw(style, seed).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"a {colours[seed % 3]} picture", "utf-8")
    return folder
