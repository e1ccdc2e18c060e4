"""Files that are made from one LoRA, with what has been done to each: the oracle of relations."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorafind.formats.delta import LowRank
from tests.formats import writers
from tests.relations import made
from tests.relations.made import Modules, lows

Tensors = dict[str, Tensor]

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file with its tensors in the given order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    blobs, offset = [], 0
    for name, t in tensors.items():
        raw = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
        blobs.append(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    return path


@dataclass(frozen=True)
class Variant:
    """A file made from the parent: what it holds, and what must be proved of it and the parent.

    kinds: the kinds of the steps, ``dtype`` left out where the variant's dtype is the parent's.
    words: what the steps must say.
    """

    tensors: Tensors
    grade: str
    kinds: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


Variants = Iterator[tuple[str, Variant]]


def variant(tensors: Tensors, grade: str, *kinds: str, words: str = "") -> Variant:
    return Variant(tensors, grade, frozenset(kinds), (words,) if words else ())


# ---------------------------------------------------------------------------- what is read


def of_diffusers(path: Path) -> Modules:
    """``unet.….to_q.lora.down.weight`` (s = 1)."""
    return _pairs(load_file(path), lambda key: key.replace("unet.", "unet/", 1), ".lora")


def of_attention_processors(path: Path) -> Modules:
    """``….attn1.processor.to_q_lora.down.weight`` (s = 1)."""

    def name(key: str) -> str:
        found = "unet/" + key.replace(".processor.", ".")
        return found + ".0" if found.endswith("to_out") else found

    return _pairs(load_file(path), name, "_lora")


def of_doubled_prefix(path: Path, like: Modules) -> Modules:
    """``lora_unet_unet_…_lora_down.weight``; the true names are those of ``like``."""
    true = {f"lora_unet_{name.replace('/', '_').replace('.', '_')}": name for name in like}
    return _pairs(load_file(path), true.__getitem__, "_lora", "_")


def _pairs(tensors: Tensors, name: Callable[[str], str], tail: str, dot: str = ".") -> Modules:
    found: Modules = {}
    for key, up in tensors.items():
        end = f"{tail}{dot}up.weight"
        if key.endswith(end):
            stem = key.removesuffix(end)
            found[name(stem)] = LowRank(up, tensors[f"{stem}{tail}{dot}down.weight"])
    assert 2 * len(found) == len(tensors)
    return found


def kohya_layout(model: str) -> dict[str, tuple[int, int]]:
    """Names and shapes of some blocks of SD1 or SDXL with attention, feed-forward and encoders."""
    if model == "sd1":
        blocks = {f"down_blocks.0.attentions.{j}": (320, 768) for j in (0, 1)}
        blocks |= {f"up_blocks.3.attentions.{j}": (320, 768) for j in range(3)}
        texts = {"te1": 768}
    else:
        blocks = {f"down_blocks.1.attentions.{j}": (640, 2048) for j in (0, 1)}
        blocks |= {f"up_blocks.1.attentions.{j}": (640, 2048) for j in (0, 1)}
        texts = {"te1": 768, "te2": 1280}
    shapes: dict[str, tuple[int, int]] = {}
    for block, (width, context) in blocks.items():
        shapes |= {f"unet/{block}.proj_{p}": (width, width) for p in ("in", "out")}
        stem = f"unet/{block}.transformer_blocks.0"
        for kind, inner in (("attn1", width), ("attn2", context)):
            shapes[f"{stem}.{kind}.to_q"] = shapes[f"{stem}.{kind}.to_out.0"] = (width, width)
            shapes[f"{stem}.{kind}.to_k"] = shapes[f"{stem}.{kind}.to_v"] = (width, inner)
        shapes[f"{stem}.ff.net.0.proj"] = (8 * width, width)
        shapes[f"{stem}.ff.net.2"] = (width, 4 * width)
    for component, width in texts.items():
        for layer in (0, 5):
            stem = f"{component}/text_model.encoder.layers.{layer}"
            shapes |= {f"{stem}.self_attn.{p}_proj": (width,) * 2 for p in ("q", "k", "v", "out")}
            shapes[f"{stem}.mlp.fc1"], shapes[f"{stem}.mlp.fc2"] = (
                (4 * width, width),
                (width, 4 * width),
            )
    return shapes


# ---------------------------------------------------------------------------- what is written


def sgm(name: str, dot: str = ".") -> str:
    """The original name of a U-Net block of SD1, SD2 and SDXL (three slots per level)."""

    def down(m: re.Match[str]) -> str:
        return dot.join(("input_blocks", str(1 + 3 * int(m[1]) + int(m[2])), "1", ""))

    def up(m: re.Match[str]) -> str:
        return dot.join(("output_blocks", str(3 * int(m[1]) + int(m[2])), "1", ""))

    place = re.escape(dot).join((r"_blocks", r"(\d)", "attentions", r"(\d)", ""))
    name = re.sub(f"down{place}", down, name)
    name = re.sub(f"up{place}", up, name)
    middle = dot.join(("mid_block", "attentions", "0", ""))
    return name.replace(middle, dot.join(("middle_block", "1", "")))


def kohya(modules: Modules, rename: Callable[[str], str] = lambda name: name) -> Tensors:
    """sd-scripts, with alpha where s is not 1; proj_in and proj_out of SD1 are convolutions."""
    double = any(name.startswith("te2/") for name in modules)
    prefix = {
        "unet": "lora_unet_",
        "te1": "lora_te1_" if double else "lora_te_",
        "te2": "lora_te2_",
    }
    tensors: Tensors = {}
    for name, d in lows(modules):
        component, _, path = rename(name).partition("/")
        stem = prefix[component] + path.replace(".", "_")
        tail = (1, 1) if not double and name.endswith(("proj_in", "proj_out")) else ()
        tensors[f"{stem}.lora_down.weight"] = d.down.reshape(*d.down.shape, *tail)
        tensors[f"{stem}.lora_up.weight"] = d.up.reshape(*d.up.shape, *tail)
        if d.scale != 1:
            tensors[f"{stem}.alpha"] = torch.tensor(d.scale * d.rank, dtype=d.up.dtype)
    return tensors


def spellings(modules: Modules) -> Iterator[tuple[str, Tensors]]:
    """The same ΔW under the names of every other tool, in the dtype of the parent."""
    found: writers.Factors = {name: ((d.up * d.scale), d.down) for name, d in lows(modules)}
    original = {sgm(name): pair for name, pair in found.items()}
    if any(name.startswith("te2/") for name in modules):
        yield "kohya-sgm", kohya(modules, sgm)
        yield "diffusers", _diffusers_xl(found)
        return
    yield "kohya", writers.kohya(found)
    yield "sgm", writers.sgm_flat(original)
    yield "onetrainer", writers.comfy(original)
    yield "diffusers", writers.diffusers(found)
    yield "peft", writers.peft(found)
    if all("attn" in name for name in found):
        yield "diffusers-old", writers.attention_processors(found)
        yield "kohya-doubled", writers.kohya_doubled(found)
    else:
        yield "diffusers-mixed", writers.diffusers_mixed(found)
    if all(name.startswith("unet/") for name in found):
        yield "lycoris", writers.lycoris(found)
        yield "hcp", writers.hcp(found)


def _diffusers_xl(found: writers.Factors) -> Tensors:
    prefix = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}
    tensors: Tensors = {}
    for name, (up, down) in found.items():
        component, _, path = name.partition("/")
        tensors[f"{prefix[component]}{path}.lora_A.weight"] = down
        tensors[f"{prefix[component]}{path}.lora_B.weight"] = up
    return tensors


def small_svd(modules: Modules, rank: Callable[[Tensor], int], dtype: torch.dtype) -> Modules:
    """kohya's resize (singular values to ``up``, alpha kept), by way of the factors' QR."""
    found: Modules = {}
    for name, d in lows(modules):
        (q, r), (p, s) = (torch.linalg.qr(t.float()) for t in (d.up, d.down.T))
        u, values, vh = torch.linalg.svd(r @ s.T)
        k = rank(values)
        up, down = q @ u[:, :k] * values[:k], vh[:k] @ p.T
        found[name] = LowRank(up.to(dtype), down.to(dtype), d.scale)
    return found


#: kohya's rules for a rank per module (networks/resize_lora.py), over falling singular values.
RULES: dict[str, Callable[[Tensor], int]] = {
    "sv_ratio": lambda s: max(1, int((s > s[0] / 2.5).sum())),
    "sv_cumulative": lambda s: max(1, int((s.cumsum(0) / s.sum() < 0.8).sum())),
    "sv_fro": lambda s: max(1, int((s.square().cumsum(0) < 0.81 * s.square().sum()).sum())),
}


# ---------------------------------------------------------------------------- what is done


def copies(modules: Modules, dtype: torch.dtype) -> Variants:
    """The same LoRA: other spellings, other ways to write the factors."""
    for name, tensors in spellings(modules):
        stored = {key: t.to(dtype) for key, t in tensors.items()}
        yield f"spelled-{name}", variant(stored, "weights")
    wide = made.refactored(made.cast(modules, torch.float32))
    yield (
        "refactored",
        variant(kohya(wide), "weights", *([] if dtype == torch.float32 else ["dtype"])),
    )
    # A turn alone keeps the factors' sizes, so that coarse dtypes can hold it.
    yield "turned", variant(kohya(made.refactored(modules, condition=1.0)), "weights")


def casts(modules: Modules, dtype: torch.dtype) -> Variants:
    """Rounded, folded and scaled."""
    for target in (torch.float16, torch.bfloat16):
        if dtype == torch.float32 or target == torch.bfloat16 != dtype:
            rounded = kohya(made.cast(modules, target))
            yield f"cast-{_NAMES[target]}", variant(rounded, "weights", "dtype")
    for target in (torch.float8_e4m3fn, torch.float8_e5m2):
        # What rounds to nothing is another matter.
        coarse = made.cast(modules, target)
        if cosine(modules, coarse) > 0.8:
            yield f"cast-{_NAMES[target]}", variant(kohya(coarse), "cast", "cast")
    if any(d.scale != 1 for _, d in lows(modules)):
        yield "folded", variant(kohya(made.folded(modules, "up")), "weights")
        lost: Modules = {name: LowRank(d.up, d.down) for name, d in lows(modules)}
        yield "alpha-lost", variant(kohya(lost), "scaled", "scaled")
    else:
        moved: Modules = {name: LowRank(d.up * 2, d.down, 0.5) for name, d in lows(modules)}
        yield "alpha-moved", variant(kohya(moved), "weights")
    for name, c, words in (("half", 0.5, "use at ×"), ("negative", -1.0, "opposite")):
        turned: Modules = {n: LowRank(d.up * c, d.down, d.scale) for n, d in lows(modules)}
        yield name, variant(kohya(turned), "scaled", "scaled", words=words)
    if dtype == torch.float32:
        third: Modules = {n: LowRank(d.up * 0.7, d.down, d.scale) for n, d in lows(modules)}
        both = kohya(made.cast(third, torch.float16))
        yield "scaled-F16", variant(both, "scaled", "scaled", "dtype", words="×0.7")


def parts(modules: Modules) -> Variants:
    """Something left out, a lower rank, block weights, noise."""
    names = list(modules)
    if any(name.startswith("te") for name in names):
        no_text = made.kept(modules, lambda n: n.startswith("unet/"))
        yield "no-text", variant(kohya(no_text), "part", "part", words="text encoder dropped")
    blocks = sorted({_block(name) for name in names})
    half = made.kept(modules, lambda n: blocks.index(_block(n)) % 2 == 0)
    yield "half", variant(kohya(half), "part", "part", words="modules dropped")
    few = set(names[:: max(1, round(len(names) / max(6, round(len(names) * 0.05))))])
    yield "twentieth", variant(kohya(made.kept(modules, few.__contains__)), "part", "part")
    weighted: Modules = {
        name: LowRank(d.up * (0.25 + 0.125 * (blocks.index(_block(name)) % 7)), d.down, d.scale)
        for name, d in lows(modules)
    }
    yield "reweighted", variant(kohya(weighted), "reweighted", "reweighted")
    # Little is left but one small group, so that the whole hardly looks alike.
    faded = made.scaled(modules, lambda n: 1.0 if "down" in n and "attn2" in n else 0.004)
    yield "faded", variant(kohya(faded), "reweighted", "reweighted")
    for level in (0.01, 0.10):
        noise = made.cast(made.noisy(modules, level), torch.float32)
        yield f"noise-{level}", variant(kohya(noise), "near")


def resizes(modules: Modules, dtype: torch.dtype) -> Variants:
    """Lower ranks, and several things at once."""
    rank = max(d.rank for _, d in lows(modules))
    wide = torch.float32 if dtype == torch.float32 else torch.float16
    also = ("dtype",) if wide != dtype else ()
    for share in (2, 4):
        small = small_svd(modules, lambda s, k=rank // share: k, wide)  # type: ignore[misc]
        words = f"resized {rank}→{rank // share}"
        found = variant(kohya(small), "resized", "resized", *also, words=words)
        yield f"resized-{share}", found
    for name, rule in RULES.items():
        small = small_svd(modules, rule, wide)
        if any(d.rank < rank for _, d in lows(small)):
            yield name, variant(kohya(small), "resized", "resized", *also)
    blocks = sorted({_block(name) for name in modules})
    half = made.kept(modules, lambda n: blocks.index(_block(n)) % 2 == 0)
    narrow = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    rounded = ("dtype",) if narrow != dtype else ()
    turned: Modules = {n: LowRank(d.up * 0.5, d.down, d.scale) for n, d in lows(half)}
    three = kohya(made.cast(turned, narrow))
    yield "half-scaled-F16", variant(three, "part", "part", "scaled", *rounded)
    small = small_svd(half, lambda s: rank // 2, narrow)
    yield "half-resized-F16", variant(kohya(small), "resized", "part", "resized", *rounded)
    weighted: Modules = {
        name: LowRank(d.up * (0.5 + 0.25 * (blocks.index(_block(name)) % 3)), d.down, d.scale)
        for name, d in lows(half)
    }
    three = kohya(made.cast(weighted, narrow))
    yield "half-reweighted-F16", variant(three, "reweighted", "part", "reweighted", *rounded)


def cosine(x: Modules, y: Modules) -> float:
    """Of two sets of the same low-rank modules, in float64."""
    dot = xx = yy = 0.0
    for (_, a), (_, b) in zip(lows(x), lows(y), strict=True):
        au, ad, bu, bd = (t.double() for t in (a.up, a.down, b.up, b.down))
        dot += a.scale * b.scale * float(((au.T @ bu) * (ad @ bd.T)).sum())
        xx += a.scale**2 * float(((au.T @ au) * (ad @ ad.T)).sum())
        yy += b.scale**2 * float(((bu.T @ bu) * (bd @ bd.T)).sum())
    return dot / math.sqrt(xx * yy) if yy else 0.0


def _block(name: str) -> str:
    found = re.match(r"(.*?(attentions|layers)\.\d+)", name)
    return found[1] if found else name


# ---------------------------------------------------------------------------- LoKr


def of_lokr(stored: Tensors) -> Variants:
    """The same for a LoKr file in kohya names with alpha, F16."""

    def each(change: Callable[[str, Tensor], Tensor]) -> Tensors:
        return {key: change(key, t) for key, t in stored.items()}

    def stem(key: str) -> str:
        return key.rpartition(".")[0]

    def keep(wanted: Callable[[str], bool]) -> Tensors:
        return {key: t for key, t in stored.items() if wanted(stem(key))}

    def noisy(level: float) -> Tensors:
        g = torch.Generator().manual_seed(3)
        return {
            key: t
            if key.endswith("alpha")
            else t.float() + level * t.float().std() * torch.randn(t.shape, generator=g)
            for key, t in stored.items()
        }

    def refactored(key: str, t: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(len(stem(key)))
        turn = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0]
        if key.endswith("w2_a"):
            return (t.double() @ turn).float()
        if key.endswith("w2_b"):
            return (turn.T @ t.double().flatten(1)).float().reshape(t.shape)
        return t.float()

    text = "lora_te_"
    blocks = sorted({key.split("_attentions_")[0] for key in map(stem, stored)})
    yield (
        "spelled-sgm",
        variant({sgm(key, "_"): t for key, t in stored.items()}, "weights"),
    )
    yield "refactored", variant(each(refactored), "weights", "dtype")
    yield "cast-BF16", variant(each(lambda k, t: t.bfloat16()), "weights", "dtype")
    yield "cast-F8", variant(each(lambda k, t: t.to(torch.float8_e5m2)), "cast", "cast")
    half = each(lambda k, t: t * 0.5 if k.endswith("lokr_w2_a") else t)
    yield "half", variant(half, "scaled", "scaled", words="use at ×")
    negative = each(lambda k, t: -t if k.endswith("lokr_w1_a") else t)
    yield "negative", variant(negative, "scaled", "scaled", words="opposite")
    no_text = keep(lambda k: not k.startswith(text))
    yield "no-text", variant(no_text, "part", "part", words="text encoder dropped")
    some = keep(lambda k: blocks.index(k.split("_attentions_")[0]) % 2 == 0)
    yield "half-of-blocks", variant(some, "part", "part")
    names = sorted(set(map(stem, stored)))
    yield "twentieth", variant(keep(set(names[::20]).__contains__), "part", "part")
    weighted = each(
        lambda k, t: (
            t * (0.25 + 0.25 * (blocks.index(stem(k).split("_attentions_")[0]) % 3))
            if k.endswith("lokr_w2_a")
            else t
        )
    )
    yield "reweighted", variant(weighted, "reweighted", "reweighted")
    for level in (0.01, 0.08):
        yield f"noise-{level}", variant(noisy(level), "near")
    three = {k: t.bfloat16() for k, t in half.items() if not k.startswith(text)}
    yield "three", variant(three, "part", "part", "scaled", "dtype")
