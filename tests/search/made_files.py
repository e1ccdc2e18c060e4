"""Files of every family in kohya names, each with its dense ΔW from the family's definition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

#: canonical name → (key, group, block, shape). The convolution is 3 × 3.
LAYERS = {
    "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "self_attn",
        "unet/down_blocks.0",
        (320, 320),
    ),
    "unet/down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_k": (
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_k",
        "self_attn",
        "unet/down_blocks.0",
        (320, 320),
    ),
    "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "cross_attn",
        "unet/down_blocks.0",
        (320, 768),
    ),
    "unet/up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v": (
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v",
        "cross_attn",
        "unet/up_blocks.3",
        (320, 768),
    ),
    "unet/up_blocks.3.attentions.1.transformer_blocks.0.ff.net.2": (
        "lora_unet_up_blocks_3_attentions_1_transformer_blocks_0_ff_net_2",
        "ff",
        "unet/up_blocks.3",
        (320, 1280),
    ),
    "unet/down_blocks.0.resnets.1.conv1": (
        "lora_unet_down_blocks_0_resnets_1_conv1",
        "conv",
        "unet/down_blocks.0",
        (320, 320 * 9),
    ),
    "te1/text_model.encoder.layers.3.self_attn.q_proj": (
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj",
        "text",
        "te1/text_model.encoder.layers.3",
        (768, 768),
    ),
}

Made = tuple[dict[str, Tensor], dict[str, Tensor]]


def make(family: str, seed: int, names: list[str] | None = None, rank: int = 3) -> Made:
    """(tensors by key, dense float64 ΔW by canonical name). alpha 2."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    tensors: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name in names or list(LAYERS):
        key, _, _, (o, n) = LAYERS[name]
        conv = "resnets" in name
        kernel = (n // 9, 3, 3) if conv else (n,)
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
        s = 2.0 / rank
        if family == "lora":
            up, down = rand(o, rank), rand(rank, *kernel)
            tensors[f"{key}.lora_up.weight"] = up[:, :, None, None] if conv else up
            tensors[f"{key}.lora_down.weight"] = down
            dense[name] = s * up.double() @ down.double().flatten(1)
        elif family == "loha":
            w = [rand(o, rank), rand(rank, n), rand(o, rank), rand(rank, n)]
            for role, t in zip(("w1_a", "w1_b", "w2_a", "w2_b"), w, strict=True):
                tensors[f"{key}.hada_{role}"] = t
            one, two = w[0].double() @ w[1].double(), w[2].double() @ w[3].double()
            dense[name] = s * one * two
        elif family == "lokr":
            w1, a, b = rand(4, 4), rand(o // 4, rank), rand(rank, n // 4)
            tensors[f"{key}.lokr_w1"] = w1
            tensors[f"{key}.lokr_w2_a"], tensors[f"{key}.lokr_w2_b"] = a, b
            dense[name] = s * torch.kron(w1.double(), a.double() @ b.double())
        else:
            diff = rand(o, *kernel)
            tensors[f"{key}.diff"] = diff
            del tensors[f"{key}.alpha"]
            dense[name] = diff.double().flatten(1)
    return tensors, dense


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """The tensors as a file."""
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    return path
