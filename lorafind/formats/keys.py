"""A key of a file taken apart: which module it belongs to, and which part of it it is.

A key is prefix . module . suffix (FORMATS of kohya-ss/sd-scripts, diffusers, PEFT, LyCORIS,
OneTrainer, ComfyUI). Tables, in the order in which they are tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
} | {
    name: name
    for name in (
        *("set_weight", "reshape_weight", "diff_m", "initial_norm", "dora_multiplier"),
        *("bias_indices", "bias_values", "bias_size", "lora_E", "ranknum"),
        *("oft_blocks", "oft_diag", "oft_R", "oft_r", "boft_R", "boft_s", "ia3_l", "on_input"),
        *("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B", "fourierft_spectrum", "hra_u"),
        *("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
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
    "oft_R": "oft_R",
}

#: Beginnings of words that only families write which are not read.
FOREIGN = {
    "vblora_": "VB-LoRA",
    "unilora_": "UniLoRA",
    "c3a_": "C3A",
    "miss_block": "MiSS",
    "bone_block": "Bone",
    "shira_": "SHiRA",
    "road_theta": "RoAd",
    "road_alpha": "RoAd",
    "delora_": "DeLoRA",
    "waveft_": "WaveFT",
    "gralora_": "GraLoRA",
    "lily_": "Lily",
    "psoft_": "PSOFT",
    "hira_": "HiRA",
    "tinylora_": "TinyLoRA",
    "frod_": "FRoD",
    "pvera_": "PVeRA",
    "adamss_": "AdaMSS",
    "peanut_": "PEANuT",
    "osf_svd_params": "OSF",
    "deft_": "DEFT",
    "poly_lora_": "Poly",
    "beft_bias": "BEFT",
    "supertuning_": "SuperTuning",
    "glora_": "PEFT's GLoRA",
    "trainable_tokens_delta": "trainable tokens",
    "oft_embedding_R": "OFT of an embedding",
    "lambda_layer": "T-LoRA",
}
_FOREIGN = tuple(FOREIGN)
#: Beginnings of words that PEFT alone writes.
_PEFT = (
    "lora_",
    "W_",
    "oft_R",
    "oft_r",
    "boft_",
    "ia3_l",
    "hra_",
    "fourierft_",
    "vera_",
    "randlora_",
)

#: Words before ``.weight`` that mean something only where the first four stand together.
GLORA = frozenset({"a1", "a2", "b1", "b2"})
GLORA_WORDS = GLORA | {"bm"}

#: T-LoRA's factors, beside its ``lambda_layer``.
TLORA = ("q_layer", "p_layer")

#: Last words that mean something only beside tensors of an adapter: word → (role, what must be
#: there too; empty: anything).
BESIDE = {
    "weight": ("ia3_weight", "on_input"),
    "rescale": ("rescale", "oft_blocks"),
    "scale": ("scale", ""),
}


class Part(NamedTuple):
    """What a suffix says. stem: the key without it; role: of the tensor; style: who writes so."""

    stem: str
    role: str
    style: str


def split_all(names: Iterable[str]) -> dict[str, Part]:
    """:func:`split` of every key of a file; a word can mean another thing beside others."""
    parts = {key: split(key) for key in names}
    roles: dict[str, set[str]] = {}
    for part in parts.values():
        if not part.role.startswith("plain"):
            roles.setdefault(part.stem, set()).add(part.role)
    for key, part in parts.items():
        parts[key] = _beside(key, part, roles)
    return parts


def _beside(key: str, part: Part, roles: Mapping[str, set[str]]) -> Part:
    """A part with regard to the roles of all stems."""
    stem, _, last = key.rpartition(".")
    if part.role in GLORA_WORDS and not roles[part.stem] >= GLORA:
        return Part(stem, f"plain_{last}", "")
    if not part.role.startswith("plain"):
        return part
    if last in BESIDE and stem in roles:
        role, needed = BESIDE[last]
        if not needed or needed in roles[stem]:
            return Part(stem, role, "")
    module, _, word = stem.rpartition(".")
    if word in TLORA and "foreign" in roles.get(module, ()):
        return Part(module, "foreign", FOREIGN["lambda_layer"])
    return part


def split(key: str) -> Part:
    """Take the suffix off a key. Role ``plain`` for a tensor that stands for itself."""
    stem, _, last = key.rpartition(".")
    if not stem:
        return _bare(key)
    if last.startswith(_FOREIGN):
        return Part(stem, "foreign", _family(last))
    if last in LAST:
        return _inner(stem, LAST[last], "peft" if last.startswith(_PEFT) else "")
    if last == "scaled_oft" and stem.endswith(".oft_R"):
        return Part(stem.removesuffix(".oft_R"), last, "peft")
    if last not in ("weight", "bias"):
        return _adapter_name(stem, last) or Part(key, "plain", "")
    module, _, word = stem.rpartition(".")
    role = BEFORE_WEIGHT.get(word)
    if role is not None and module:
        if last == "bias":
            return Part(module, f"{role}_bias", "peft")
        return Part(module, role, "peft" if word in PEFT_WORDS else "kohya")
    if word in ("down", "up") and module and last == "weight":
        return _diffusers(module, word)
    if word.startswith(_FOREIGN) and module:
        return Part(module, "foreign", _family(word))
    if word in GLORA_WORDS and last == "weight" and module:
        return Part(module, word, "")
    for ending, role in (("_lora_down", "down"), ("_lora_up", "up"), ("_lora_mid", "mid")):
        if stem.endswith(ending) and last == "weight":
            return Part(stem.removesuffix(ending), role, "kohya")
    named = _adapter_name(module, word)
    if named is not None and named.role in ("down", "up", "magnitude", "oft_R"):
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
    if module and word.startswith(_FOREIGN):
        return Part(module, "foreign", _family(word))
    role = BEFORE_WEIGHT.get(word) or LAST.get(word)
    if role is None or not module or word not in PEFT_WORDS or name in LAST:
        return None
    return Part(module, role, "peft")


def _family(word: str) -> str:
    return next(name for start, name in FOREIGN.items() if word.startswith(start))


#: Words after which PEFT writes the adapter's name, until it takes it off.
PEFT_WORDS = frozenset(
    {"lora_A", "lora_B", "lora_E", "ranknum", "lora_embedding_A", "lora_embedding_B"}
    | {"lora_magnitude_vector", "oft_R", "oft_r", "boft_R", "boft_s", "ia3_l", "hra_u"}
    | {"fourierft_spectrum"}
    | {name for name in LAST if name.startswith(("hada_", "lokr_", "vera_", "randlora_"))}
)
