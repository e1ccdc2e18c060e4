"""Planted collections with labels: vectors of many dimensions, and small files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score
from torch import Tensor

from lorafind.bases.kernel import Kernel
from lorafind.bases.labels import Labelled
from lorafind.evaluation.protocol import Row
from lorafind.evaluation.run import subject_of
from lorafind.evaluation.scoring import Subject
from tests.formats import writers

#: LoRAs per artist.
SPLITS = ("train",) * 8 + ("calibration",) * 3 + ("validation",) * 2 + ("test",) * 3

_BLOCK = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2"
LAYERS = {
    f"{_BLOCK}.to_q": (320, 320),
    f"{_BLOCK}.to_k": (320, 768),
    f"{_BLOCK}.to_v": (320, 768),
    f"{_BLOCK}.to_out.0": (320, 320),
}
_SPELLINGS: tuple[Callable[[writers.Factors], dict[str, Tensor]], ...] = (
    writers.kohya,
    writers.diffusers,
    writers.peft,
    writers.comfy,
)
_DTYPES = (torch.float16, torch.float32, torch.bfloat16)


def vectors(
    artists: int = 12, width: int = 20_000, signal: float = 0.12, seed: int = 0
) -> tuple[np.ndarray, list[Labelled]]:
    """n × width, and labels: an artist's style in a small space, and noise of length 1 per LoRA."""
    rng = np.random.default_rng(seed)
    space = np.linalg.qr(rng.normal(size=(width, artists - 1)))[0].T
    styles = rng.normal(size=(artists, artists - 1)) * np.linspace(1, 0.3, artists - 1)
    labels = [
        Labelled(Path(f"{a}-{k}.safetensors"), f"artist {a:02}", ("even", "odd")[a % 2], split)
        for a in range(artists)
        for k, split in enumerate(SPLITS)
    ]
    which = np.repeat(np.arange(artists), len(SPLITS))
    noise = rng.normal(size=(len(which), width)) / np.sqrt(width)
    return signal * styles[which] @ space + noise, labels


def collection(folder: Path, uniform: bool, artists: int = 5, each: int = 12) -> None:
    """A folder per artist, ``each`` LoRAs in it that share output directions.

    Training with a random A moves ΔW along G·AᵀA: B = G·Aᵀ, with a G of rank 2 per artist and
    layer. uniform: one seed, one rank and one format; otherwise ranks, seeds, alphas, strengths,
    spellings and precisions differ.
    """
    g = torch.Generator().manual_seed(7)
    start = {name: torch.randn(4, i, generator=g) for name, (_, i) in LAYERS.items()}
    for artist in range(artists):
        out = {name: torch.randn(o, 2, generator=g) for name, (o, _) in LAYERS.items()}
        into = {name: torch.randn(2, i, generator=g) for name, (_, i) in LAYERS.items()}
        place = folder / f"artist-{artist}"
        place.mkdir(parents=True)
        for number in range(each):
            rank = 4 if uniform else int(torch.randint(2, 9, (), generator=g))
            made: writers.Factors = {}
            for name, (o, i) in LAYERS.items():
                down = start[name] if uniform else torch.randn(rank, i, generator=g)
                up = out[name] @ into[name] @ down.T
                noise = torch.randn(o, rank, generator=g)
                made[name] = up / up.norm() + 0.5 * noise / noise.norm(), down
            write = _SPELLINGS[0 if uniform else number % len(_SPELLINGS)]
            tensors = write(made)
            if not uniform:
                strength = float(torch.rand((), generator=g)) + 0.5
                # ΔW is as strong, whatever alpha says.
                alpha = float(torch.randint(1, 9, (), generator=g))
                for key, tensor in tensors.items():
                    if key.endswith(".alpha"):
                        tensors[key] = tensor * alpha
                    elif "up" in key.rsplit(".", 2)[1] or "lora_B" in key:
                        spelled = any(k.endswith(".alpha") for k in tensors)
                        tensors[key] = tensor * strength / (alpha if spelled else 1.0)
            dtype = torch.float32 if uniform else _DTYPES[number % len(_DTYPES)]
            saved = {key: t.to(dtype).contiguous() for key, t in tensors.items()}
            save_file(saved, place / f"lora-{artist}-{number:02}.safetensors")


def subject(rows: np.ndarray, labels: Sequence[Labelled], feature: str = "delta") -> Subject:
    """The vectors as a feature of one group."""
    n = len(rows)
    kernel = Kernel({"other": rows @ rows.T}, {"other": np.ones(n, bool)})
    contents = [str(one.path) for one in labels]
    return subject_of(feature, kernel, labels, np.zeros(n, int), contents)


def only(rows: Sequence[Row], **wanted: object) -> Row:
    """The one row with these fields."""
    (found,) = [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]
    return found


def of(labels: Sequence[Labelled], split: str) -> np.ndarray:
    """n bools: which are of a split."""
    return np.array([one.split == split for one in labels])


def mean_precision(scores: np.ndarray, asking: np.ndarray, base: np.ndarray) -> float:
    """mAP in percent, by scikit-learn; asking, base: artists."""
    each = [average_precision_score(base == a, s) for a, s in zip(asking, scores, strict=True)]
    return 100 * float(np.mean(each))
