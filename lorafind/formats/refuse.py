"""What a file with tensors is that is no adapter, from names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorafind.files.outcome import NotAnAdapter

#: Widths of the text encoders whose embeddings are traded.
WIDTHS = frozenset({768, 1024, 1280, 2048, 4096})

#: (outcome, reason, beginnings or parts of names). The first that one name has decides.
SIGNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "controlnet",
        "it is a ControlNet, which steers the picture and is no style",
        (
            *("lora_controlnet", "lllite_", "control_model.", "input_hint_block"),
            *("zero_convs.", "controlnet_cond_embedding", "controlnet_down_blocks"),
            "controlnet_blocks",
        ),
    ),
    (
        "unsupported",
        "it is an IP-Adapter, which reads pictures and is no LoRA",
        ("image_proj.", "ip_adapter.", "image_proj_model."),
    ),
)

CHECKPOINT = (
    *(
        "model.diffusion_model.",
        "cond_stage_model.",
        "conditioner.embedders.",
        "first_stage_model.",
    ),
    *("double_blocks.", "single_blocks.", "transformer_blocks.", "down_blocks.", "input_blocks."),
)
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "first_stage_model.")
VAE = ("quant_conv.", "post_quant_conv.", "encoder.down", "decoder.up", "first_stage_model.")


def marked(names: Sequence[str]) -> NotAnAdapter | None:
    """What single telling names say, even beside factors; None where they say nothing."""
    for outcome, reason, signs in SIGNS:
        if any(sign in name for name in names for sign in signs):
            return NotAnAdapter(outcome, reason)
    return None


def without_modules(tensors: Mapping[str, Sequence[int]]) -> NotAnAdapter:
    """What a file without any factor is. tensors: name → shape."""
    names = list(tensors)
    if _embedding(tensors):
        return NotAnAdapter("embedding", "it is a textual inversion embedding, not a LoRA")
    if _hypernetwork(names):
        return NotAnAdapter("hypernetwork", "it is a hypernetwork, not a LoRA")
    if any(n.startswith(VAE) for n in names) and all(n.startswith(VAE_PARTS) for n in names):
        return NotAnAdapter("vae", "it is a VAE, not a LoRA")
    if any("motion_modules." in name for name in names):
        return NotAnAdapter("checkpoint", "it is a motion module of AnimateDiff, not an adapter")
    if any(name.startswith(CHECKPOINT) for name in names):
        return NotAnAdapter("checkpoint", "it is a model or a part of one, not an adapter")
    if any(name.endswith((".weight", ".bias")) for name in names):
        return NotAnAdapter("checkpoint", "it holds plain weights of a network, not an adapter")
    return NotAnAdapter("unsupported", f"nothing in it is known, beginning with {names[0]!r}")


def _embedding(tensors: Mapping[str, Sequence[int]]) -> bool:
    if any("string_to_param" in name or name.startswith("emb_params") for name in tensors):
        return True
    return len(tensors) <= 64 and all(
        "." not in name and 1 <= len(shape) <= 2 and shape[-1] in WIDTHS
        for name, shape in tensors.items()
    )


def _hypernetwork(names: list[str]) -> bool:
    """webui: one pair of small networks per width of the prompt."""
    return all(name.split(".")[0] in ("320", "640", "768", "1024", "1280") for name in names)
