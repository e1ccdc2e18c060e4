"""Files that could be adapters: names of all spellings, tensors of all families, and slips in both.

The names and shapes are written out from the formats' own documents, not taken from the reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tests.fuzz.source import Source


class Described(NamedTuple):
    """A tensor without its numbers."""

    dtype: str
    shape: tuple[int, ...]


Tensors = dict[str, Described]

PREFIXES = (
    *("", "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_unet_unet_"),
    *("lycoris_", "lora_transformer_", "lora_prior_unet_", "oft_unet_", "base_model.model."),
    *("base_model.model.transformer.", "transformer.", "unet.", "diffusion_model."),
    *("model.diffusion_model.", "text_encoder.", "text_encoder_2.", "text_encoders."),
    *("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", "vae."),
)

#: Names of layers with their (o, n), over all architectures; dotted ones are flattened at times.
BODIES: tuple[tuple[str, int, int], ...] = (
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 320, 320),
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 320, 768),
    ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v", 640, 2048),
    ("up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj", 5120, 640),
    ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", 1280, 1280),
    ("down_blocks.0.resnets.1.conv1", 320, 320),
    ("down_blocks.0.attentions.0.proj_in", 320, 320),
    ("conv_in", 320, 4),
    ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", 640, 640),
    ("output_blocks.0.1.proj_out", 1280, 1280),
    ("text_model.encoder.layers.3.self_attn.q_proj", 768, 768),
    ("text_model.encoder.layers.31.mlp.fc1", 5120, 1280),
    ("text_projection", 1280, 1280),
    ("double_blocks.0.img_attn.qkv", 9216, 3072),
    ("double_blocks.18.txt_mlp.2", 3072, 12288),
    ("double_blocks.1.processor.qkv_lora1", 9216, 3072),
    ("single_blocks.37.linear1", 21504, 3072),
    ("single_blocks.0.linear2", 3072, 15360),
    ("single_blocks.0.modulation.lin", 9216, 3072),
    ("final_layer.adaLN_modulation.1", 6144, 3072),
    ("transformer_blocks.0.attn.to_q", 3072, 3072),
    ("transformer_blocks.0.attn.add_k_proj", 3072, 3072),
    ("transformer_blocks.0.norm1.linear", 18432, 3072),
    ("single_transformer_blocks.0.proj_mlp", 12288, 3072),
    ("norm_out.linear", 6144, 3072),
    ("joint_blocks.0.x_block.attn.qkv", 4608, 1536),
    ("layers.0.attention.qkv", 11520, 3840),
    ("layers.0.attention.to_q", 3840, 3840),
    ("layers.0.feed_forward.w1", 10240, 3840),
    ("blocks.0.self_attn.q", 5120, 5120),
    ("blocks.29.ffn.0", 13824, 5120),
    ("blocks.0.cross_attn.norm_k", 5120, 1),
    ("transformer_blocks.0.img_mlp.net.0.proj", 12288, 3072),
    ("encoder.block.0.layer.0.SelfAttention.q", 4096, 4096),
    ("model.layers.0.self_attn.v_proj", 1024, 4096),
    ("model.layers.7.mlp.experts.3.down_proj", 64, 48),
    ("model.embed_tokens", 100, 64),
    ("time_embedding.linear_1", 1280, 320),
    ("net.deep.layer", 8, 6),
    ("a", 4, 4),
    ("w_a_000", 8, 8),
)

Shape = tuple[int, ...]
#: Makes the suffixes of one module with their shapes from o, n, r and a kernel (empty: linear).
Family = Callable[[int, int, int, Shape], dict[str, Shape]]


def _lokr(o: int, n: int, r: int, kernel: Shape) -> dict[str, Shape]:
    f = next(k for k in (4, 2, 1) if o % k == 0 and n % k == 0)
    return {".lokr_w1": (f, f), ".lokr_w2_a": (o // f, r), ".lokr_w2_b": (r, n // f, *kernel)}


def _lokr_whole(o: int, n: int, r: int, kernel: Shape) -> dict[str, Shape]:
    f = next(k for k in (4, 2, 1) if o % k == 0 and n % k == 0)
    return {".lokr_w1": (f, f), ".lokr_w2": (o // f, n // f, *kernel), ".alpha": ()}


def _blocks(o: int, r: int) -> Shape:
    b = next((b for b in (r, 4, 2) if b and o % b == 0), 1)
    return (o // b, b, b)


FAMILIES: dict[str, Family] = {
    "kohya": lambda o, n, r, k: {
        ".lora_up.weight": (o, r, *(1 for _ in k)),
        ".lora_down.weight": (r, n, *k),
        ".alpha": (),
    },
    "tucker": lambda o, n, r, k: {
        ".lora_up.weight": (o, r, 1, 1),
        ".lora_down.weight": (r, n, 1, 1),
        ".lora_mid.weight": (r, r, *(k or (3, 3))),
        ".alpha": (1,),
    },
    "peft": lambda o, n, r, k: {".lora_A.weight": (r, n, *k), ".lora_B.weight": (o, r)},
    "peft-bias": lambda o, n, r, k: {
        ".lora_A.weight": (r, n),
        ".lora_B.weight": (o, r),
        ".lora_B.bias": (o,),
    },
    "adapter": lambda o, n, r, k: {
        ".lora_A.default.weight": (r, n),
        ".lora_B.default.weight": (o, r),
        ".lora_magnitude_vector.default.weight": (o,),
    },
    "diffusers": lambda o, n, r, k: {".lora.up.weight": (o, r), ".lora.down.weight": (r, n)},
    "linear-layer": lambda o, n, r, k: {
        ".lora_linear_layer.up.weight": (o, r),
        ".lora_linear_layer.down.weight": (r, n),
    },
    "old": lambda o, n, r, k: {
        ".processor.to_q_lora.up.weight": (o, r),
        ".processor.to_q_lora.down.weight": (r, n),
    },
    "bare-up-down": lambda o, n, r, k: {".up.weight": (o, r), ".down.weight": (r, n)},
    "embedding": lambda o, n, r, k: {".lora_embedding_A": (r, o), ".lora_embedding_B": (n, r)},
    "loha": lambda o, n, r, k: {
        ".hada_w1_a": (o, r),
        ".hada_w1_b": (r, n, *k),
        ".hada_w2_a": (o, r),
        ".hada_w2_b": (r, n, *k),
        ".alpha": (),
    },
    "loha-tucker": lambda o, n, r, k: {
        ".hada_w1_a": (r, o),
        ".hada_w1_b": (r, n),
        ".hada_w2_a": (r, o),
        ".hada_w2_b": (r, n),
        ".hada_t1": (r, r, *(k or (3, 3))),
        ".hada_t2": (r, r, *(k or (3, 3))),
    },
    "lokr": _lokr,
    "lokr-whole": _lokr_whole,
    "lokr-tucker": lambda o, n, r, k: {
        ".lokr_w1_a": (2, r),
        ".lokr_w1_b": (r, 2),
        ".lokr_w2_a": (r, o),
        ".lokr_w2_b": (r, n),
        ".lokr_t2": (r, r, *(k or (3, 3))),
        ".dora_scale": (o, 1),
    },
    "full": lambda o, n, r, k: {".diff": (o, n, *k), ".diff_b": (o,)},
    "norm": lambda o, n, r, k: {".w_norm": (o,), ".b_norm": (o,)},
    "norm-diff": lambda o, n, r, k: {".diff": (o,), ".diff_b": (o,)},
    "dora": lambda o, n, r, k: {
        ".lora_A.weight": (r, n),
        ".lora_B.weight": (o, r),
        ".dora_scale": (o, 1),
    },
    "dora-input": lambda o, n, r, k: {
        ".lora_up.weight": (o, r),
        ".lora_down.weight": (r, n),
        ".dora_scale": (1, n),
    },
    "glora": lambda o, n, r, k: {
        ".a1.weight": (n, r),
        ".a2.weight": (r, n),
        ".b1.weight": (o, r),
        ".b2.weight": (r, n),
        ".alpha": (),
    },
    "glora-old": lambda o, n, r, k: {
        ".a1.weight": (r, n),
        ".a2.weight": (n, r),
        ".b1.weight": (r, n),
        ".b2.weight": (o, r),
    },
    "ia3": lambda o, n, r, k: {".weight": (o,), ".on_input": ()},
    "ia3-peft": lambda o, n, r, k: {".ia3_l": (1, n)},
    "oft": lambda o, n, r, k: {".oft_blocks": _blocks(o, r), ".alpha": ()},
    "boft": lambda o, n, r, k: {".oft_blocks": (2, *_blocks(o, r)), ".rescale": (o, 1)},
    "oft-diag": lambda o, n, r, k: {".oft_diag": _blocks(o, r)},
    "oft-peft": lambda o, n, r, k: {".oft_R.weight": (_blocks(n, r)[0], r * (r - 1) // 2)},
    "boft-peft": lambda o, n, r, k: {".boft_R": (1, *_blocks(n, r)), ".boft_s": (o, 1)},
    "vera": lambda o, n, r, k: {".vera_lambda_b": (o,), ".vera_lambda_d": (r,)},
    "randlora": lambda o, n, r, k: {".randlora_lambda": (r, 2), ".randlora_gamma": (2, min(o, n))},
    "adalora": lambda o, n, r, k: {
        ".lora_A": (r, n),
        ".lora_B": (o, r),
        ".lora_E": (r, 1),
        ".ranknum": (),
    },
    "sparse": lambda o, n, r, k: {
        ".lora_up.weight": (o, r),
        ".lora_down.weight": (r, n),
        ".bias_indices": (2, 5),
        ".bias_values": (5,),
        ".bias_size": (2,),
    },
    "tlora": lambda o, n, r, k: {
        ".q_layer.weight": (r, n),
        ".p_layer.weight": (o, r),
        ".lambda_layer": (1, r),
    },
    "set": lambda o, n, r, k: {".set_weight": (o, n), ".reshape_weight": (2,)},
    "hra": lambda o, n, r, k: {".hra_u": (n, r)},
    "fourier": lambda o, n, r, k: {".fourierft_spectrum": (r,)},
    "vblora": lambda o, n, r, k: {".vblora_logits_A": (r, n, 2), ".vblora_logits_B": (r, n, 2)},
    "plain": lambda o, n, r, k: {".weight": (o, n, *k), ".bias": (o,)},
    "scaled": lambda o, n, r, k: {
        ".lora_up.weight": (o, r),
        ".lora_down.weight": (r, n),
        ".scale": (),
        ".alpha": (),
    },
}
SUFFIXES = (
    *dict.fromkeys(suffix for make in FAMILIES.values() for suffix in make(4, 4, 2, ())),
    *(".lora_up.bias", ".W_up", ".W_down", ".magnitude", ".bm.weight", ".diff_m", ".initial_norm"),
    *(".dora_multiplier", ".oft_r", ".scaled_oft", ".vera_A", ".vera_B", ".randlora_A", "", "."),
    *(".lokr_w2_b.default", ".lora.lora_A.weight", ".___.lora_A.weight", ".lora_down"),
)

#: Tensors that belong to no module.
ALONE: tuple[tuple[str, Shape], ...] = (
    *(("bundle_emb.word.string_to_param.*", (2, 768)), ("bundle_emb.", (1,)), ("<s1>", (768,))),
    *(("emb_params", (2, 768)), ("clip_l", (2, 768)), ("_aux.slider", (1,)), ("lora_te_", (1,))),
    *(("unet:0:up", (8, 2)), ("unet:0:down", (2, 8)), ("unet:1:up", (8, 2)), ("0", (8, 2))),
    *(("1", (2, 8)), ("text_encoder:0:up", (768, 4)), ("text_encoder:0:down", (4, 768))),
    *(("base_model.vera_A", (2, 8)), ("base_model.vera_B", (8, 2)), ("alpha", ()), (".alpha", ())),
    *(("image_proj.weight", (4, 4)), ("lora_controlnet", (1,)), ("zero_convs.0.weight", (4, 4))),
    *(("quant_conv.weight", (8, 8, 1, 1)), ("model.diffusion_model.out.2.weight", (4, 320))),
    *(("768.0.linear.weight", (4, 4)), ("lora_unet_.lora_up.weight", (2, 2)), ("..", (1,))),
)

DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F64", "I64", "BOOL", "I8", "C64")
RARE_DTYPES = ("F4", "F6_E2M3", "F8_E8M0", "U8", "I32", "F8_E4M3FNUZ", "U64")
NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 320, 768, 1024, 4096, 65536, 2**31, 2**62)


def tensors(source: Source) -> Tensors:
    """A file of a few modules, in one spelling and family or in several."""
    made: Tensors = {}
    prefix, family = source.pick(PREFIXES), source.pick(tuple(FAMILIES))
    flat = bool(source.number(0, 1))
    dtype = source.pick(DTYPES) if source.seldom(4) else source.pick(DTYPES[:5])
    rank = source.pick((1, 2, 3, 4, 8)) if not source.seldom(8) else source.pick(NUMBERS[:15])
    for _ in range(source.number(1, 6)):
        body, o, n = source.pick(BODIES)
        if source.seldom(6):
            prefix, family = source.pick(PREFIXES), source.pick(tuple(FAMILIES))
        if source.seldom(8):
            flat, dtype = not flat, source.pick(DTYPES)
        if source.seldom(6):
            o, n = source.pick(NUMBERS[1:14]), source.pick(NUMBERS[1:14])
        kernel: Shape = (3, 3) if "conv" in body or source.seldom(12) else ()
        stem = prefix + (body.replace(".", "_") if flat else body)
        for suffix, shape in FAMILIES[family](o, n, rank, kernel).items():
            made[stem + suffix] = Described(dtype, shape)
    if source.seldom(4):
        for _ in range(source.number(1, 3)):
            name, shape = source.pick(ALONE)
            made[name] = Described(dtype, shape)
    if source.seldom(2):
        made = slipped(source, made)
    return made


def slipped(source: Source, made: Tensors) -> Tensors:
    """The same with a few slips of a careless or hostile writer."""
    for _ in range(source.number(1, 4)):
        names = list(made)
        if not names:
            break
        name = source.pick(names)
        info = made[name]
        slip = source.number(0, 8)
        if slip == 0:
            del made[name]
        elif slip == 1:
            made[_other_suffix(source, name)] = info
        elif slip == 2:
            made[name] = info._replace(dtype=source.pick(DTYPES + RARE_DTYPES))
        elif slip == 3:
            made[name] = info._replace(shape=_other_shape(source, info.shape))
        elif slip == 4:
            made[_other_suffix(source, name)] = made.pop(name)
        elif slip == 5:
            made[name + source.pick(SUFFIXES)] = info
        elif slip == 6:
            made[source.pick(PREFIXES) + name] = info
        elif slip == 7:
            made[source.text(12)] = info
        else:
            at = source.number(0, len(name))
            made[name[:at] + source.text(3) + name[at + 1 :]] = made.pop(name)
    return made


def _other_suffix(source: Source, name: str) -> str:
    stem = next((name[: -len(s)] for s in SUFFIXES if s and name.endswith(s)), name)
    return stem + source.pick(SUFFIXES)


def _other_shape(source: Source, shape: Shape) -> Shape:
    changed = list(shape)
    kind = source.number(0, 4)
    if kind == 0 or not changed:
        changed.insert(source.number(0, len(changed)), source.pick(NUMBERS))
    elif kind == 1:
        changed.pop(source.number(0, len(changed) - 1))
    elif kind == 2:
        changed[source.number(0, len(changed) - 1)] = source.pick(NUMBERS)
    elif kind == 3:
        changed.reverse()
    else:
        changed = [source.pick(NUMBERS) for _ in range(source.number(0, 5))]
    return tuple(changed)


# ---------------------------------------------------------------------------- beside the tensors

VALUES: Sequence[Any] = (
    *(0, 1, 4, 8.5, -1, True, None, "8", [], {}, 10**400, 1e300, 5e-324, float("nan")),
    *(float("inf"), {"a": 4}, {".*to_q": 2}, {"(a+)+$": 8}, {"[": 1}, {"": float("nan")}),
)
SETTINGS = (
    *("r", "lora_alpha", "alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("peft_type", "fan_in_fan_out", "modules_to_save", "target_modules", "bias"),
)
TEXTS = (
    *("ss_network_alpha", "ss_network_dim", "ss_base_model_version", "ss_tag_frequency"),
    *("modelspec.architecture", "ss_datasets", "ss_training_started_at", "ss_network_args"),
    *("sshs_model_hash", "ss_steps", "format", "ss_dataset_dirs", "modelspec.trigger_phrase"),
)


def settings(source: Source) -> dict[str, Any]:
    """An adapter_config.json."""
    return {source.pick(SETTINGS): source.pick(VALUES) for _ in range(source.number(0, 4))}


def metadata(source: Source) -> dict[str, str]:
    """The texts of a header."""
    found = {
        source.pick(TEXTS): source.text(8) if source.seldom(3) else json.dumps(source.pick(VALUES))
        for _ in range(source.number(0, 3))
    }
    if source.seldom(4):
        parts = ("transformer.", "unet.", "text_encoder.", "")
        inner = {source.pick(parts) + name: v for name, v in settings(source).items()}
        found["lora_adapter_metadata"] = json.dumps(inner)
    return found
