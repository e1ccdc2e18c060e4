"""Adapters in memory, and what people do to LoRA files, written independently of the product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorafind.files.tensors import NAMES, effective_dtype
from lorafind.formats.adapter import Adapter, Fetch, ModulePlan, Place, Plan
from lorafind.formats.delta import Delta, Full, Hadamard, Kronecker, LowRank

Modules = dict[str, Delta]
GROUPS = {"attn1": "self_attn", "attn2": "cross_attn", "ff": "ff", "resnets": "conv", "te1": "text"}


def copy(delta: Delta, **changes: object) -> Delta:
    """The same form with other fields."""
    return replace(delta, **changes)  # type: ignore[type-var]


def adapter(
    modules: Mapping[str, Delta],
    *,
    extras: Mapping[str, Tensor] | None = None,
    unknown: Mapping[str, Tensor] | None = None,
    spelling: str = "kohya",
    architecture: str = "sd1",
) -> Adapter:
    """An adapter that holds the given ΔW; keys are ``<name>|<role>`` in the given order."""
    stored: dict[str, Tensor] = {}
    plans = []
    keys: dict[str, str] = {}
    for name, delta in modules.items():
        roles = {role: f"{spelling}:{name}|{role}" for role in delta.tensors()}
        stored |= {roles[role]: t for role, t in delta.tensors().items()}
        keys |= dict.fromkeys(roles.values(), f"module:{name}")

        def bind(fetch: Fetch, delta: Delta = delta, roles: dict[str, str] = roles) -> Delta:
            return copy(delta, **{role: fetch(key) for role, key in roles.items()})

        group = next((g for part, g in GROUPS.items() if part in name), "other")
        place = Place(name, group, "up_blocks" in name, delta.shape[1] == 1)
        plans.append(
            ModulePlan(place, delta.family, tuple(roles.values()), delta.shape, delta.rank, bind)
        )
    weights = list(stored.values())
    dtypes = {NAMES[t.dtype] for t in weights}
    dtype = max(dtypes, key=lambda d: ("F8_E5M2", "F8_E4M3", "BF16", "F16", "F32").index(d))
    known = {name: f"{spelling}:{name}" for name in extras or {}}
    stored |= {known[name]: t for name, t in (extras or {}).items()} | dict(unknown or {})
    keys |= {key: f"extra:{name}" for name, key in known.items()}
    keys |= dict.fromkeys(unknown or {}, "unknown")
    plan = Plan(architecture, "lora", spelling, tuple(plans), extras=known, keys=keys)
    return Adapter(plan, stored.__getitem__, dtype, effective_dtype(weights, dtype))


def layout(width: int = 48, context: int = 40, text: int = 32) -> dict[str, tuple[int, int]]:
    """Names and shapes like a small Stable Diffusion's: 36 U-Net and 12 text encoder modules."""
    shapes: dict[str, tuple[int, int]] = {}
    for block in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"):
        inner = f"unet/{block}.attentions.0.transformer_blocks.0"
        shapes |= {f"{inner}.attn1.to_{p}": (width, width) for p in "qkv"}
        shapes |= {f"{inner}.attn2.to_{p}": (width, context) for p in "kv"}
        shapes[f"{inner}.ff.net.0.proj"] = (8 * width, width)
        shapes[f"unet/{block}.resnets.0.conv1"] = (width, 9 * width)
    for layer in range(2):
        inner = f"te1/text_model.encoder.layers.{layer}"
        shapes |= {f"{inner}.self_attn.{p}_proj": (text, text) for p in ("q", "k", "v", "out")}
        shapes[f"{inner}.mlp.fc1"] = (4 * text, text)
        shapes[f"{inner}.mlp.fc2"] = (text, 4 * text)
    return shapes


def real_layout(blocks: int = 16) -> dict[str, tuple[int, int]]:
    """Shapes of Stable Diffusion 1.5: 12 modules per transformer block, 192 in all."""
    widths = [320, 320, 640, 640, 1280, 1280, 1280, *[1280] * 3, *[640] * 3, *[320] * 3]
    shapes: dict[str, tuple[int, int]] = {}
    for i, w in enumerate(widths[:blocks]):
        inner = f"unet/{'down' if i < 8 else 'up'}_blocks.{i}.attentions.0.transformer_blocks.0"
        shapes |= {f"{inner}.attn1.to_{p}": (w, w) for p in ("q", "k", "v", "out.0")}
        shapes |= {f"{inner}.attn2.to_{p}": (w, 768 if p in "kv" else w) for p in ("q", "k", "v")}
        shapes[f"{inner}.attn2.to_out.0"] = (w, w)
        shapes[f"{inner}.ff.net.0.proj"], shapes[f"{inner}.ff.net.2"] = (8 * w, w), (w, 4 * w)
        shapes |= {f"unet/{i}.attentions.0.proj_{p}": (w, w) for p in ("in", "out")}
    return shapes


def trained(
    shapes: Mapping[str, tuple[int, int]],
    rank: int | Callable[[int], int] = 4,
    *,
    seed: int = 0,
    seed_a: int | None = None,
    alpha: float | None = None,
    decay: float = 0.8,
) -> Modules:
    """LoRA modules in F32 like training makes them: A near its start, B smaller, energy falling.

    seed_a: seed of the A factors where they come from another initialisation.
    """
    left = torch.Generator().manual_seed(seed)
    right = torch.Generator().manual_seed(seed + 7919 if seed_a is None else seed_a)
    modules: Modules = {}
    for i, (name, (o, n)) in enumerate(shapes.items()):
        r = rank(i) if callable(rank) else rank
        up = torch.randn(o, r, generator=left) * 0.02 * decay ** torch.arange(r)
        # A few channels matter more than the others.
        up *= torch.exp(0.7 * torch.randn(o, 1, generator=left))
        down = torch.randn(r, n, generator=right) / math.sqrt(3 * n)
        modules[name] = LowRank(up, down, 1.0 if alpha is None else alpha / r)
    return modules


def lows(modules: Modules) -> Iterable[tuple[str, LowRank]]:
    """The modules, which must all be LoRA."""
    for name, delta in modules.items():
        assert isinstance(delta, LowRank)
        yield name, delta


def cast(modules: Modules, dtype: torch.dtype) -> Modules:
    """Every tensor to ``dtype``, alpha kept."""
    return {
        name: copy(delta, **{role: t.to(dtype) for role, t in delta.tensors().items()})
        for name, delta in modules.items()
    }


def scaled(modules: Modules, c: float | Callable[[str], float]) -> Modules:
    """alpha times c."""
    return {
        name: copy(delta, scale=delta.scale * (c(name) if callable(c) else c))
        for name, delta in modules.items()
    }


def folded(modules: Modules, where: str) -> Modules:
    """alpha folded into ``up``, ``down`` or, as a root, into ``both``."""
    found: Modules = {}
    for name, d in lows(modules):
        up = {"up": d.scale, "down": 1.0, "both": math.sqrt(d.scale)}[where]
        down = {"up": 1.0, "down": d.scale, "both": math.sqrt(d.scale)}[where]
        found[name] = LowRank((d.up * up).to(d.up.dtype), (d.down * down).to(d.down.dtype))
    return found


def refactored(
    modules: Modules, *, condition: float = 10.0, seed: int = 5, dtype: torch.dtype = torch.float32
) -> Modules:
    """(B·G, G⁻¹·A) with random G of the given condition number, computed in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    found: Modules = {}
    for name, d in lows(modules):
        r = d.rank
        u, v = (torch.linalg.qr(torch.randn(r, r, generator=generator).double())[0] for _ in "uv")
        g = u * torch.logspace(0, -math.log10(condition), r, dtype=torch.float64) @ v
        up = d.up.to(dtype).reshape(-1, r) @ g.to(dtype)
        down = torch.linalg.inv(g).to(dtype) @ d.down.to(dtype).reshape(r, -1)
        found[name] = LowRank(up.to(d.up.dtype), down.to(d.down.dtype), d.scale)
    return found


def resized(modules: Modules, rank: Callable[[Tensor], int], dtype: torch.dtype) -> Modules:
    """kohya's resize: SVD in F32 without alpha, rank by a rule over the singular values."""
    found: Modules = {}
    for name, d in lows(modules):
        u, s, vh = torch.linalg.svd(d.up.float() @ d.down.float(), full_matrices=False)
        k = rank(s)
        found[name] = LowRank((u[:, :k] * s[:k]).to(dtype), vh[:k].to(dtype), d.scale)
    return found


def kept(modules: Modules, wanted: Callable[[str], bool]) -> Modules:
    """The modules of the names that are wanted."""
    return {name: delta for name, delta in modules.items() if wanted(name)}


def noisy(modules: Modules, level: float, seed: int = 9) -> Modules:
    """Every factor with noise of ``level`` times its size."""
    generator = torch.Generator().manual_seed(seed)
    found: Modules = {}
    for name, d in lows(modules):
        up, down = (
            t + level * t.norm() / math.sqrt(t.numel()) * torch.randn(t.shape, generator=generator)
            for t in (d.up.float(), d.down.float())
        )
        found[name] = LowRank(up, down, d.scale)
    return found


def merged(x: Modules, y: Modules, weight: float) -> Modules:
    """X + weight·Y by concatenation of the ranks."""
    found: Modules = {}
    for (name, a), (_, b) in zip(lows(x), lows(y), strict=True):
        up = torch.cat([a.up * a.scale, b.up * (b.scale * weight)], 1)
        found[name] = LowRank(up, torch.cat([a.down, b.down]))
    return found


def others(seed: int = 0) -> Modules:
    """A LoHa, a LoKr, a full, a Tucker and a bias module."""
    g = torch.Generator().manual_seed(seed)

    def n(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) * 0.1

    return {
        "unet/a.attn1.loha": Hadamard(n(64, 3), n(3, 80), n(64, 3), n(3, 80), 0.5),
        "unet/b.attn1.lokr": Kronecker(w1=n(4, 8), w2_a=n(16, 2), w2_b=n(2, 10), scale=0.5),
        "unet/c.attn1.lokr": Kronecker(w1=n(4, 8), w2=n(16, 10)),
        "unet/d.attn1.full": Full(n(40, 56)),
        "unet/e.resnets.tucker": LowRank(n(64, 4, 1, 1), n(4, 48, 1, 1), 0.5, n(4, 4, 3, 3)),
        "unet/f.resnets.bias": Full(n(320)),
    }
