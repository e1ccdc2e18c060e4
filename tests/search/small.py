"""Small Stable Diffusion 1 LoRAs in kohya names, with their dense ΔW as oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from lorafind.cli.app import make_app
from lorafind.index.build import build
from lorafind.index.store import Store

#: key → (o, n): attention of eight blocks, early and late.
SHAPES = {
    f"lora_unet_{block}_attentions_{i}_transformer_blocks_0_{leaf}": (width, n or width)
    for block, i, width in (
        ("down_blocks_0", 0, 320),
        ("down_blocks_0", 1, 320),
        ("up_blocks_3", 0, 320),
        ("up_blocks_3", 2, 320),
    )
    for leaf, n in (("attn1_to_q", 0), ("attn2_to_k", 768), ("attn2_to_v", 768))
}

#: key → (up, down), float32; s = 1.
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def random(seed: int, rank: int = 4, keys: Iterable[str] = SHAPES) -> Factors:
    """An adapter without relatives."""
    g = np.random.default_rng(seed)
    return {
        key: (
            (g.standard_normal((SHAPES[key][0], rank)) * 0.8 ** np.arange(rank)).astype("f4"),
            g.standard_normal((rank, SHAPES[key][1])).astype("f4"),
        )
        for key in keys
    }


def turned(start: Factors, other: Factors, degrees: float, size: float = 1.0) -> Factors:
    """On the way from one adapter to another of its down matrices: like steps of one training."""
    c, s = np.cos(np.radians(degrees)) * size, np.sin(np.radians(degrees)) * size
    return {
        key: ((c * up + s * other[key][0]).astype("f4"), down) for key, (up, down) in start.items()
    }


def each(found: Factors, change: Callable[[np.ndarray], np.ndarray]) -> Factors:
    """Every matrix changed."""
    return {key: (change(up), change(down)) for key, (up, down) in found.items()}


def resized(found: Factors, rank: int) -> Factors:
    """The best approximation of a lower rank."""
    made: Factors = {}
    for key, (up, down) in found.items():
        u, s, vh = np.linalg.svd(up.astype("f8") @ down.astype("f8"), full_matrices=False)
        made[key] = ((u[:, :rank] * s[:rank]).astype("f4"), vh[:rank].astype("f4"))
    return made


def cosine(x: Factors, y: Factors) -> float:
    """Of the dense ΔW, over the modules that both have."""
    common = [(x[k][0].astype("f8") @ x[k][1], y[k][0].astype("f8") @ y[k][1]) for k in x if k in y]
    xy = sum(float((a * b).sum()) for a, b in common)
    xx, yy = (sum(float((p[i] ** 2).sum()) for p in common) for i in (0, 1))
    return xy / (xx * yy) ** 0.5


def norm(x: Factors) -> float:
    """‖ΔW‖."""
    return sum(float(((u.astype("f8") @ d) ** 2).sum()) for u, d in x.values()) ** 0.5


def save(path: Path, found: Factors, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write in kohya's spelling; metadata that is no text becomes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, (up, down) in found.items():
        tensors[f"{key}.lora_up.weight"] = np.ascontiguousarray(up)
        tensors[f"{key}.lora_down.weight"] = np.ascontiguousarray(down)
        tensors[f"{key}.alpha"] = np.array(up.shape[1], up.dtype)
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    save_file(tensors, path, texts or None)
    return path


def index(db: Path, *paths: Path, relate: bool = True) -> None:
    """A real run of ``index``."""
    with Store.open(db, "write") as store:
        build(store, paths, device="cpu", relate=relate)


def run(db: Path, *arguments: str, input: str | bytes | None = None) -> Result:
    """The command line."""
    return CliRunner().invoke(make_app(), ["--db", str(db), *arguments], input=input)
