"""Made LoRA files of real shapes in kohya names: SD1.5, SDXL, Flux.1 with its fused layers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

CONTEXT = {"sd1": 768, "sdxl": 2048}


def modules(model: str) -> list[tuple[str, int, int]]:
    """(flattened name, o, i) of the attention and feed-forward layers with proj_in and proj_out,
    for Flux.1 of all that sd-scripts trains.
    """
    if model == "flux1":
        return _flux(3072)
    if model == "sd1":
        blocks = [
            (f"down_blocks_{i}_attentions_{j}", 320 << i, 1) for i in range(3) for j in (0, 1)
        ]
        blocks += [("mid_block_attentions_0", 1280, 1)]
        blocks += [
            (f"up_blocks_{i}_attentions_{j}", 1280 >> (i - 1), 1)
            for i in (1, 2, 3)
            for j in range(3)
        ]
    else:
        blocks = [(f"down_blocks_1_attentions_{j}", 640, 2) for j in (0, 1)]
        blocks += [(f"down_blocks_2_attentions_{j}", 1280, 10) for j in (0, 1)]
        blocks += [("mid_block_attentions_0", 1280, 10)]
        blocks += [(f"up_blocks_0_attentions_{j}", 1280, 10) for j in range(3)]
        blocks += [(f"up_blocks_1_attentions_{j}", 640, 2) for j in range(3)]
    found = []
    for name, width, depth in blocks:
        found += [(f"{name}_proj_in", width, width), (f"{name}_proj_out", width, width)]
        for t in range(depth):
            stem = f"{name}_transformer_blocks_{t}"
            for kind, inner in (("attn1", width), ("attn2", CONTEXT[model])):
                found += [
                    (f"{stem}_{kind}_to_q", width, width),
                    (f"{stem}_{kind}_to_k", width, inner),
                    (f"{stem}_{kind}_to_v", width, inner),
                    (f"{stem}_{kind}_to_out_0", width, width),
                ]
            found.append((f"{stem}_ff_net_0_proj", 8 * width, width))
            found.append((f"{stem}_ff_net_2", width, 4 * width))
    return found


def _flux(h: int) -> list[tuple[str, int, int]]:
    found = []
    for n in range(19):
        for stream in ("img", "txt"):
            stem = f"double_blocks_{n}_{stream}"
            found += [(f"{stem}_attn_qkv", 3 * h, h), (f"{stem}_attn_proj", h, h)]
            found += [(f"{stem}_mlp_0", 4 * h, h), (f"{stem}_mlp_2", h, 4 * h)]
            found.append((f"{stem}_mod_lin", 6 * h, h))
    for n in range(38):
        stem = f"single_blocks_{n}"
        found += [(f"{stem}_linear1", 7 * h, h), (f"{stem}_linear2", h, 5 * h)]
        found.append((f"{stem}_modulation_lin", 3 * h, h))
    return found


def write(
    path: Path, model: str, rank: int, seed: int, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Write a random LoRA; returns its tensors."""
    g = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, o, i in modules(model):
        conv = model == "sd1" and name.endswith(("proj_in", "proj_out"))
        tail = (1, 1) if conv else ()
        down = torch.randn(rank, i, *tail, generator=g) / i**0.5
        up = torch.randn(o, rank, *tail, generator=g) * 0.01
        tensors[f"lora_unet_{name}.lora_down.weight"] = down.to(dtype)
        tensors[f"lora_unet_{name}.lora_up.weight"] = up.to(dtype)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(rank) / 2).to(dtype)
    save_file(tensors, path, {"ss_network_dim": str(rank), "ss_seed": str(seed)})
    return tensors
