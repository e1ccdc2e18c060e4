"""Checkpoints in the layout of the original code, as ComfyUI and the web UI have them.

One safetensors file: ``model.diffusion_model.…`` is the U-Net, ``first_stage_model.…`` the VAE,
``cond_stage_model.transformer.[text_model.]…`` the text encoder (CompVis/latent-diffusion). It
holds no configuration: what is not the same for all Stable Diffusion 1.x is read off the shapes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafind.files.safetensors import read_header
from lorafind.files.sniff import is_pickled
from lorafind.formats.names import unet as names
from lorafind.train.model import WANTED, Base, explained, header, quiet, sha256, unet_kind
from lorafind.train.problem import TrainProblem

if TYPE_CHECKING:
    from transformers import CLIPTextModel

Shapes = Mapping[str, tuple[int, ...]]

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
#: Numbers per head of CLIP's text encoders.
_HEAD = 64
#: Parts of names → what a file is. The first that one name has decides.
_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            *("lora_up.", "lora_down.", "lora_A.", "lora_B.", "lora.up.", "lora.down."),
            *(".hada_w1", ".lokr_w", ".oft_", "lora_unet_", "lora_te"),
        ),
        "a LoRA, not a base model",
    ),
    (("control_model.", "controlnet_", "zero_convs.", "input_hint_block."), "a ControlNet"),
    (("double_blocks.", "single_transformer_blocks."), "a Flux model"),
    (("joint_blocks.",), "a Stable Diffusion 3 model"),
    (("conditioner.embedders.1.",), "an SDXL model"),
    (("conditioner.embedders.0.model.",), "an SDXL refiner"),
    (("conditioner.embedders.",), "an SDXL model"),
    (("cond_stage_model.model.",), "a Stable Diffusion 2 model"),
)
#: Beginnings of names → what a file is that has nothing of a whole checkpoint.
_ALONE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("down_blocks.", "input_blocks.", "diffusion_model."), "a U-Net alone"),
    (("encoder.down", "decoder.up", "decoder.mid"), "a VAE alone"),
    (("text_model.",), "a text encoder alone"),
    (("emb_params", "string_to_param"), "a textual inversion embedding"),
)


def load_single(path: Path, dtype: torch.dtype, offline: bool, tokenizer: Path | None) -> Base:
    """A base model from one file, on the CPU; see :func:`lorafind.train.model.load_base`.

    dtype: of the U-Net; VAE and text encoder are float32 whatever the file has. Raises
    TrainProblem.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from lorafind.train.tokenizer import find_tokenizer

    if is_pickled(path):
        raise TrainProblem(
            f"{path} is a PyTorch file, which can hold programs and is not opened: convert it to "
            "safetensors, or name another copy."
        )
    shapes = header(path)
    check(shapes, path.name)
    configs = {"unet": unet_config(shapes, path.name), "vae": vae_config(shapes, path.name)}
    words = find_tokenizer(tokenizer, path, _vocabulary(shapes, path.name), offline)
    with quiet(), explained(str(path)), tempfile.TemporaryDirectory() as folder:
        for part, config in configs.items():
            (Path(folder) / part).mkdir()
            (Path(folder) / part / "config.json").write_text(json.dumps(config))
        unet = _part(UNet2DConditionModel, path, shapes, UNET, folder, "unet", dtype)
        vae = _part(AutoencoderKL, path, shapes, VAE, folder, "vae", torch.float32)
        text = _text_encoder(path, shapes)
    prediction = _prediction(path, shapes)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    return Base(unet, vae, text, words, scheduler, str(path), sha256([path]), prediction)


def check(shapes: Shapes, said: str) -> None:
    """Raise TrainProblem where a file is no complete checkpoint of Stable Diffusion 1.x."""
    for signs, what in _SIGNS:
        if any(sign in name for name in shapes for sign in signs):
            raise TrainProblem(f"{said} is {what}; {WANTED}.")
    if not any(name.startswith(UNET) for name in shapes):
        what = next(
            (what for starts, what in _ALONE if any(name.startswith(starts) for name in shapes)),
            "no checkpoint of the original layout",
        )
        raise TrainProblem(
            f"{said} is {what}: name a whole checkpoint, or a diffusers folder with all parts."
        )
    first = shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    keys = shapes.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())
    if kind := unet_kind(first[1] if len(first) == 4 else 4, keys[1] if len(keys) == 2 else 0):
        raise TrainProblem(f"{said} is {kind}; {WANTED}.")
    for start, what in ((VAE, "VAE"), (TEXT, "text encoder")):
        if not any(name.startswith(start) for name in shapes):
            raise TrainProblem(
                f"{said} has no {what} in it: name a checkpoint with all parts, or a diffusers "
                "folder."
            )


def unet_config(shapes: Shapes, said: str) -> dict[str, Any]:
    """The configuration of diffusers' UNet2DConditionModel; raises TrainProblem where it is
    another network than Stable Diffusion 1.x's.
    """
    widths = tuple(
        _first(shapes, f"{UNET}input_blocks.{3 * i + 1}.0.out_layers.3.weight") for i in range(4)
    )
    context = (*shapes.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ()), 0)
    net = replace(names.UNETS["sd1"], channels=widths, context=context[1], time=4 * widths[0])
    wanted = {f"{UNET}{layer.sgm}.weight" for layer in names.layers(net)}
    missing = sorted(wanted - set(shapes))
    if missing or 0 in widths:
        raise TrainProblem(
            f"{said} is no Stable Diffusion 1.x, or not all of it: its U-Net lacks "
            f"{len(missing) or 'some'} layers{f', {missing[0]} first' if missing else ''}."
        )
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 8,
        "block_out_channels": list(widths),
        "cross_attention_dim": context[1],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "layers_per_block": 2,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }


def vae_config(shapes: Shapes, said: str) -> dict[str, Any]:
    """The configuration of diffusers' AutoencoderKL; raises TrainProblem as ``unet_config``."""
    widths = tuple(_first(shapes, f"{VAE}encoder.down.{i}.block.0.conv1.weight") for i in range(4))
    moments = _first(shapes, f"{VAE}quant_conv.weight")
    if 0 in widths or moments != 8:
        raise TrainProblem(f"{said} has a VAE that is not Stable Diffusion 1.x's.")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def _vocabulary(shapes: Shapes, said: str) -> int:
    for part in ("text_model.", ""):
        if size := _first(shapes, f"{TEXT}{part}embeddings.token_embedding.weight"):
            return size
    raise TrainProblem(f"{said} has a text encoder that is not Stable Diffusion 1.x's.")


def _first(shapes: Shapes, name: str) -> int:
    return (*shapes.get(name, ()), 0)[0]


def _part(
    kind: Any, path: Path, shapes: Shapes, start: str, folder: str, part: str, dtype: torch.dtype
) -> Any:
    return kind.from_single_file(
        _tensors(path, shapes, start),
        config=folder,
        subfolder=part,
        local_files_only=True,
        torch_dtype=dtype,
    )


def _tensors(path: Path, shapes: Shapes, start: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in shapes if name.startswith(start)}


def _text_encoder(path: Path, shapes: Shapes) -> CLIPTextModel:
    """CLIP's text encoder; transformers before and after 5.6 differ by ``text_model.``, and so do
    checkpoints."""
    from transformers import CLIPTextConfig, CLIPTextModel

    weights = {
        name.removeprefix(TEXT).removeprefix("text_model."): tensor
        for name, tensor in _tensors(path, shapes, TEXT).items()
        # Numbers from 0 to 76, which some programs have stored rounded.
        if not name.endswith("position_ids")
    }
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}
    size, width = weights["embeddings.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=len(layers),
        num_attention_heads=width // _HEAD,
        max_position_embeddings=len(weights["embeddings.position_embedding.weight"]),
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    model = CLIPTextModel(config)
    inner = getattr(model, "text_model", model)
    inner.load_state_dict(weights)
    return model


def _prediction(path: Path, shapes: Shapes) -> str:
    """What the U-Net predicts, where the file says so: in ModelSpec's metadata, or by an empty
    tensor of that name, as ComfyUI reads it."""
    said = read_header(path).metadata.get("modelspec.prediction_type", "").lower()
    return "v_prediction" if said in ("v", "v_prediction") or "v_pred" in shapes else "epsilon"
