"""Writes one set of low-rank changes in every spelling that tools use, from their own rules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: true name (``unet/…``, ``te1/…``) → (up, down); s = 1.
Factors = dict[str, tuple[Tensor, Tensor]]

#: A few layers of SD1, of every kind that every spelling can write.
SD1 = {
    "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
    "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768),
    "unet/down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0": (1280, 1280),
    "unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_v": (1280, 1280),
    "unet/up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v": (320, 768),
}
TE1 = {
    "te1/text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
    "te1/text_model.encoder.layers.11.self_attn.out_proj": (768, 768),
}
FEED = {
    "unet/up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": (10240, 1280),
    "unet/up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": (1280, 5120),
    "te1/text_model.encoder.layers.3.mlp.fc1": (3072, 768),
}
SGM = {
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.3.attentions.2": "output_blocks.11.1",
}


def factors(shapes: dict[str, tuple[int, int]], rank: int = 2, seed: int = 0) -> Factors:
    """Random factors for layers of these shapes."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(o, rank, generator=g), torch.randn(rank, n, generator=g))
        for name, (o, n) in shapes.items()
    }


def _each(
    found: Factors, key: Callable[[str, str], str], up: str, down: str, alpha: str | None = None
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (b, a) in found.items():
        component, _, path = name.partition("/")
        stem = key(component, path)
        tensors[stem + down] = a
        if alpha is None:
            tensors[stem + up] = b
        else:
            # alpha = 2r with half the up matrix: the same ΔW.
            tensors[stem + up] = b / 2
            tensors[stem + alpha] = torch.tensor(2.0 * a.shape[0])
    return tensors


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _sgm(path: str) -> str:
    for diffusers, sgm in SGM.items():
        if path.startswith(diffusers + "."):
            return sgm + path.removeprefix(diffusers)
    return path


def kohya(found: Factors) -> dict[str, Tensor]:
    """sd-scripts: underscores, alpha."""
    prefix = {"unet": "lora_unet_", "te1": "lora_te_"}
    return _each(
        found,
        lambda c, p: prefix[c] + _flat(p),
        ".lora_up.weight",
        ".lora_down.weight",
        ".alpha",
    )


def kohya_doubled(found: Factors) -> dict[str, Tensor]:
    """A converter that writes the prefix twice and an underscore before the suffix."""
    prefix = {"unet": "lora_unet_unet_", "te1": "lora_te_"}
    return _each(found, lambda c, p: prefix[c] + _flat(p), "_lora_up.weight", "_lora_down.weight")


def lycoris(found: Factors) -> dict[str, Tensor]:
    """LyCORIS alone (SimpleTuner)."""
    return _each(
        found, lambda c, p: "lycoris_" + _flat(p), ".lora_up.weight", ".lora_down.weight", ".alpha"
    )


def sgm_flat(found: Factors) -> dict[str, Tensor]:
    """OneTrainer 'kohya': underscores over the original names."""
    prefix = {"unet": "lora_unet_", "te1": "lora_te1_"}
    return _each(
        found,
        lambda c, p: prefix[c] + _flat(_sgm(p)),
        ".lora_up.weight",
        ".lora_down.weight",
        ".alpha",
    )


def comfy(found: Factors) -> dict[str, Tensor]:
    """OneTrainer 'comfy': dots over the original names."""
    prefix = {"unet": "diffusion_model.", "te1": "text_encoders.clip_l.transformer."}
    return _each(
        found, lambda c, p: prefix[c] + _sgm(p), ".lora_up.weight", ".lora_down.weight", ".alpha"
    )


def diffusers(found: Factors) -> dict[str, Tensor]:
    """diffusers with the PEFT backend."""
    prefix = {"unet": "unet.", "te1": "text_encoder."}
    return _each(found, lambda c, p: prefix[c] + p, ".lora_B.weight", ".lora_A.weight")


def diffusers_mixed(found: Factors) -> dict[str, Tensor]:
    """diffusers' own converter renames the attention only: one file, two suffixes."""
    tensors: dict[str, Tensor] = {}
    for name, pair in found.items():
        component, _, path = name.partition("/")
        if component == "te1":
            tensors |= _each(
                {name: pair},
                lambda c, p: "text_encoder." + p,
                ".lora_linear_layer.up.weight",
                ".lora_linear_layer.down.weight",
            )
        elif "attn" in path:
            tensors |= _each(
                {name: pair}, lambda c, p: "unet." + p, ".lora.up.weight", ".lora.down.weight"
            )
        else:
            tensors |= _each(
                {name: pair}, lambda c, p: "unet." + p, ".lora_B.weight", ".lora_A.weight"
            )
    return tensors


def attention_processors(found: Factors) -> dict[str, Tensor]:
    """diffusers before 0.22: attention only, without the component."""

    def key(component: str, path: str) -> str:
        head, _, leaf = path.removesuffix(".0").rpartition(".")
        if component == "te1":
            name = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
            return f"text_encoder.{head}.{name[leaf]}_lora"
        return f"{head}.processor.{leaf}_lora"

    return _each(found, key, ".up.weight", ".down.weight")


def peft(found: Factors) -> dict[str, Tensor]:
    """PEFT's save_pretrained."""
    return _each(found, lambda c, p: "base_model.model." + p, ".lora_B.weight", ".lora_A.weight")


def peft_named(found: Factors) -> dict[str, Tensor]:
    """A PEFT model's state dictionary with the adapter's name in the keys."""
    return _each(
        found,
        lambda c, p: "base_model.model." + p,
        ".lora_B.default.weight",
        ".lora_A.default.weight",
    )


def hcp(found: Factors) -> dict[str, Tensor]:
    """HCP-Diffusion."""
    prefix = {"unet": "unet.", "te1": "text_encoder."}
    return _each(
        found, lambda c, p: prefix[c] + p, ".___.layer.W_up", ".___.layer.W_down", ".___.alpha"
    )


#: writer → (spelling, whether it can write feed-forward layers).
WRITERS: dict[Callable[[Factors], dict[str, Tensor]], tuple[str, bool]] = {
    kohya: ("kohya", True),
    kohya_doubled: ("kohya", True),
    lycoris: ("kohya", True),
    sgm_flat: ("sgm", True),
    comfy: ("onetrainer", True),
    diffusers: ("diffusers", True),
    diffusers_mixed: ("diffusers", True),
    attention_processors: ("diffusers-old", False),
    peft: ("peft", True),
    peft_named: ("peft", True),
    hcp: ("diffusers", True),
}
