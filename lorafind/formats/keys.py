"""A key of a file taken apart: which module it belongs to, and which part of it it is.

A key is prefix . module . suffix (FORMATS of kohya-ss/sd-scripts, diffusers, PEFT, LyCORIS,
OneTrainer, ComfyUI). Tables, in the order in which they are tried.
"""

from __future__ import annotations

from typing import NamedTuple

#: Suffix → role, where the last word of the key alone tells.
LAST = {
    "alpha": "alpha",
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "W_down": "down",
    "W_up": "up",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "magnitude": "magnitude",
    "set_weight": "set_weight",
    "reshape_weight": "reshape_weight",
} | {
    name: name
    for name in (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
}

#: The same where ``.weight`` or ``.bias`` follows.
BEFORE_WEIGHT = {
    "lora_down": "down",
    "lora_up": "up",
    "lora_mid": "mid",
    "lora_A": "down",
    "lora_B": "up",
    "lora_magnitude_vector": "magnitude",
}

#: Words that only families write whose ΔW needs the base model or something else we lack.
FOREIGN = {
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
    "boft_s": "BOFT",
    "ia3_l": "IA3",
    "on_input": "IA3",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "vera_A": "VeRA",
    "vera_B": "VeRA",
    "fourierft_spectrum": "FourierFT",
    "hra_u": "HRA",
    "randlora_lambda": "RandLoRA",
    "randlora_gamma": "RandLoRA",
    "vblora_logits_A": "VB-LoRA",
    "vblora_logits_B": "VB-LoRA",
    "vblora_vector_bank": "VB-LoRA",
    "unilora_theta_d": "UniLoRA",
    "lora_E": "AdaLoRA",
    "ranknum": "AdaLoRA",
    "bias_indices": "LoRA with a sparse residual",
    "bias_values": "LoRA with a sparse residual",
    "bias_size": "LoRA with a sparse residual",
}

GLORA = frozenset({"a1", "a2", "b1", "b2"})


class Part(NamedTuple):
    """What a suffix says. stem: the key without it; role: of the tensor; style: who writes so."""

    stem: str
    role: str
    style: str


def split(key: str) -> Part:
    """Take the suffix off a key. Role ``plain`` for a tensor that stands for itself."""
    stem, _, last = key.rpartition(".")
    if not stem:
        return _bare(key)
    if last in FOREIGN:
        return Part(stem, "foreign", FOREIGN[last])
    if last in LAST:
        return _inner(stem, LAST[last], "peft" if last[:5] in ("lora_", "W_dow", "W_up") else "")
    if last not in ("weight", "bias"):
        return _adapter_name(stem, last) or Part(key, "plain", "")
    module, _, word = stem.rpartition(".")
    role = BEFORE_WEIGHT.get(word)
    if role is not None and module:
        if last == "bias":
            return Part(module, f"{role}_bias", "peft")
        return Part(module, role, "peft" if word in ("lora_A", "lora_B") else "kohya")
    if word in ("down", "up") and module and last == "weight":
        return _diffusers(module, word)
    if word in FOREIGN:
        return Part(module, "foreign", FOREIGN[word])
    if word in GLORA:
        return Part(module, word, "")
    for ending, role in (("_lora_down", "down"), ("_lora_up", "up"), ("_lora_mid", "mid")):
        if stem.endswith(ending) and last == "weight":
            return Part(stem.removesuffix(ending), role, "kohya")
    named = _adapter_name(module, word)
    if named is not None and named.role in ("down", "up", "magnitude"):
        return named if last == "weight" else Part(named.stem, f"{named.role}_bias", "peft")
    return Part(stem, f"plain_{last}", "")


def _bare(key: str) -> Part:
    if key.startswith(("w_a_", "w_b_")) and key[4:].isdigit():
        return Part(f"layer_{key[4:]}", "down" if key[2] == "a" else "up", "lora-vit")
    return Part(key, "plain", "")


def _inner(stem: str, role: str, style: str) -> Part:
    """Keys whose alpha or factor stands beside a module inside the module."""
    if ".processor.to_" in stem and stem.endswith("_lora"):
        return Part(_processor(stem), role, "diffusers-old")
    for tail in (".___.layer", ".___", ".lora", ".lora_linear_layer"):
        if stem.endswith(tail):
            return Part(stem.removesuffix(tail), role, style)
    return Part(stem, role, style)


def _diffusers(module: str, word: str) -> Part:
    """``<M>.lora.down``, ``<M>.lora_linear_layer.down``, ``<M>.processor.to_q_lora.down``."""
    for tail in (".lora", ".lora_linear_layer"):
        if module.endswith(tail):
            return Part(module.removesuffix(tail), word, "diffusers")
    head, _, last = module.rpartition(".")
    if last.startswith("to_") and last.endswith("_lora"):
        if head.endswith((".processor", "self_attn")):
            return Part(_processor(module), word, "diffusers-old")
        return Part(module.removesuffix("_lora"), word, "diffusers-old")
    return Part(module, word, "")


#: Text encoders in the oldest diffusers spelling name the attention as U-Nets do.
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _processor(module: str) -> str:
    head, _, last = module.rpartition(".")
    name = last.removesuffix("_lora")
    if head.endswith("self_attn"):
        return f"{head}.{OLD_TEXT.get(name, name)}"
    name = "to_out.0" if name == "to_out" else name
    return f"{head.removesuffix('.processor')}.{name}"


def _adapter_name(stem: str, name: str) -> Part | None:
    """``<M>.lora_A.<adapter>``: PEFT before it takes the adapter's name off."""
    module, _, word = stem.rpartition(".")
    role = BEFORE_WEIGHT.get(word) or LAST.get(word)
    if role is None or not module or word not in PEFT_WORDS or name in LAST:
        return None
    return Part(module, role, "peft")


PEFT_WORDS = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
    | {name for name in LAST if name.startswith(("hada_", "lokr_"))}
)
